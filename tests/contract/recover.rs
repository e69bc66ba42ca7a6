//! What a later backend finds, and what happens if a process of the driver dies.

use nomad_driver_nspawn::container::Process;

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_backend_recovers_a_container(world: World) {
    found_again(world, |_| {}).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_with_a_stopped_supervisor_is_recovered(world: World) {
    found_again(world, |started| {
        strike(started.supervisor.pid, signal("SIGSTOP"));
    })
    .await;
}

/// Attaches with another backend after `meanwhile`.
async fn found_again(world: World, meanwhile: impl FnOnce(&Started)) {
    let started = world
        .up(world.spec("trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done"))
        .await;
    meanwhile(&started);
    let other = NspawnBackend::new(world.settings.clone());
    assert_eq!(*within(other.attach(&started)).await.unwrap(), started);
    assert_eq!(
        *within(other.attach(&started)).await.unwrap(),
        started,
        "attaching twice"
    );
    within(other.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (12, 0));
    assert_eq!(
        ended(&world.end(&started).await),
        (12, 0),
        "the first one is sent it too"
    );
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_in_the_meantime_is_known(world: World) {
    let started = world.start(world.spec("exit 13")).await;
    world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.attach(&started)).await.unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (13, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_container_is_lost(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    within(world.backend.remove(&started.id)).await.unwrap();
    lost(&world, &started).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_of_another_boot_is_lost(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    lost(
        &world,
        &Started {
            boot: "00000000-0000-0000-0000-000000000000".into(),
            ..started.clone()
        },
    )
    .await;
    assert!(is_alive(started.leader), "what was not meant was touched");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_of_another_process_is_lost(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    let leader = Process {
        start: started.leader.start + 1,
        ..started.leader
    };
    lost(
        &world,
        &Started {
            leader,
            ..started.clone()
        },
    )
    .await;
    lost(
        &world,
        &Started {
            id: "another/one/2".into(),
            ..started.clone()
        },
    )
    .await;
    assert!(is_alive(started.leader), "what was not meant was touched");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_supervisor_ends_the_container(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.supervisor.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert_ne!(exit.code, 0);
    assert!(
        exit.error
            .as_ref()
            .is_some_and(|text| text.contains("supervisor")),
        "{exit:?}"
    );
    assert!(!is_alive(started.leader), "the container runs on unwatched");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_nspawn_ends_the_container(world: World) {
    nspawn_struck_by(world, "SIGKILL").await;
}

/// Up to 252 the signal that lowers systemd's log level kills systemd-nspawn.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nspawn_ended_by_a_real_time_signal_is_noticed(world: World) {
    nspawn_struck_by(world, "SIGRTMIN+25").await;
}

async fn nspawn_struck_by(world: World, name: &str) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal(name));
    let exit = world.end(&started).await;
    let number = signal(name).number();
    assert_eq!(ended(&exit), (128 + number, number));
    assert!(
        exit.error
            .as_ref()
            .is_some_and(|text| text.contains("systemd-nspawn")),
        "{exit:?}"
    );
    assert!(!is_alive(started.leader), "the container runs on unwatched");
    world.leave(&[&started]).await;
}
