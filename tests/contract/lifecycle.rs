//! From the start to the removal.

use super::*;

/// The start succeeds before the command is executed, so this is an exit, not a failed start.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_command_fails_by_name(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        no_command(&world, mode, "/no/such/program", 127).await;
        no_command(&world, mode, "no-such-program", 127).await;
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_cannot_be_executed_fails_by_name(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        no_command(&world, mode, "/proc/version", 126).await;
        no_command(&world, mode, "/proc", 126).await;
    }
    world.leave(&[]).await;
}

async fn no_command(world: &World, mode: Mode, command: &str, code: i32) {
    let started = world
        .start(world.spec("").with(|spec| {
            spec.payload.mode = mode;
            spec.payload.command = vec![command.into()];
        }))
        .await;
    let exit = world.end(&started).await;
    assert_eq!(ended(&exit), (code, 0), "{mode:?} {command}");
    let reported = exit.error.clone().unwrap_or_default();
    assert!(reported.contains(command), "{mode:?}: {reported:?}");
    let said = world.said("stderr");
    assert!(said.contains(command), "{mode:?}: {said:?}");
    within(world.backend.remove(&started.id)).await.unwrap();
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_exits_immediately_has_started(world: World) {
    let started = world
        .start(
            world
                .spec("")
                .with(|spec| spec.payload.command = vec!["/bin/true".into()]),
        )
        .await;
    assert!(started.leader.pid > 0);
    assert_eq!(ended(&world.end(&started).await), (0, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_waiters_get_the_exit(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let wait = || world.end(&started);
    // All three waits are pending before the stop is requested: `join!` polls in this order.
    let stop = world.backend.stop(&started, Some(signal("TERM")), AMPLE);
    let (first, second, third, stopped) =
        within(async { tokio::join!(wait(), wait(), wait(), stop) }).await;
    stopped.unwrap();
    let late = wait().await;
    assert_eq!(ended(&late), (3, 0));
    for early in [first, second, third] {
        assert_eq!(early, late);
    }
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_wait_changes_nothing(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    let given_up =
        tokio::time::timeout(Duration::from_millis(50), world.backend.wait(&started)).await;
    assert!(given_up.is_err());
    assert!(is_alive(started.leader));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removing_kills_a_running_container(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removing_is_safe_to_repeat(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    world.end(&started).await;
    for _ in 0..3 {
        within(world.backend.remove(&started.id)).await.unwrap();
    }
    within(world.backend.remove("never/was/there"))
        .await
        .unwrap();
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_start_can_be_repeated(world: World) {
    let empty = world.scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    world
        .refused(
            world
                .spec("exit 0")
                .with(|spec| spec.rootfs.source = Root::Directory(empty)),
        )
        .await;
    let started = world.start(world.spec("exit 14")).await;
    assert_eq!(ended(&world.end(&started).await), (14, 0));
    world.leave(&[&started]).await;
}

/// The same as after a plugin that died between the start and its response: Nomad retries with the same id.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_start_of_an_id_replaces_the_first(world: World) {
    let first = world.up(world.spec(DEAF)).await;
    let other = NspawnBackend::new(world.settings.clone());
    let second = within(other.start(world.spec("exit 15"))).await.unwrap();
    assert!(!is_alive(first.leader), "the first one lives on");
    assert_eq!(ended(&within(other.wait(&second)).await.unwrap()), (15, 0));
    world.leave(&[&second]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_containers_run_side_by_side(world: World) {
    let mut all = Vec::new();
    for number in 0..5 {
        let mut spec = world.named(
            &format!("t{number}"),
            &format!("trap 'exit {number}' TERM; echo up{number}; while :; do sleep 0.05; done"),
        );
        spec.rootfs.volatile = Volatile::Overlay;
        all.push(world.start(spec).await);
    }
    for (number, started) in (0..).zip(&all) {
        world.received(&format!("up{number}")).await;
        within(world.backend.stop(started, Some(signal("TERM")), AMPLE))
            .await
            .unwrap();
        assert_eq!(ended(&world.end(started).await), (number, 0));
    }
    world.leave(&Vec::from_iter(&all)).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn usage_can_be_read(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let mut reader = world.backend.usage_reader(&started);
    let reading = reader.read(true).unwrap();
    let usage = reading.usage;
    let reported = usage.cpu_user_ns.is_some() && usage.memory_rss.is_some_and(|bytes| bytes > 0);
    assert_eq!(reported, started.cgroup.is_some(), "{usage:?}");
    let processes = reading.processes.unwrap();
    let leader = processes
        .iter()
        .find(|process| process.process == started.leader);
    assert_eq!(leader.is_some(), started.cgroup.is_some(), "{processes:?}");
    assert!(leader.is_none_or(|leader| leader.memory_rss > 0));
    world.leave(&[&started]).await;
    let after = reader.read(true);
    assert_eq!(after.is_none(), started.cgroup.is_some(), "{after:?}");
}
