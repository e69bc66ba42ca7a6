//! Signals that a job sends.

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_reaches_its_handler(world: World) {
    let started = world.up(world.spec("trap 'echo hup' HUP; trap 'echo usr; exit 8' USR2; echo up; while :; do sleep 0.05; done")).await;
    within(world.backend.signal(&started, signal("SIGHUP")))
        .await
        .unwrap();
    world.received("hup").await;
    assert!(is_alive(started.leader));
    within(world.backend.signal(&started, signal("SIGUSR2")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (8, 0));
    world.leave(&[&started]).await;
}

/// The kernel drops signals to PID 1 of a pid namespace that it has no handler for.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unhandled_signal_does_not_end_the_first_process(world: World) {
    let started = world
        .up(world.spec("trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done"))
        .await;
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    within(world.backend.signal(&started, signal("SIGHUP")))
        .await
        .unwrap();
    world.received("hup").await;
    assert!(is_alive(started.leader));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_reaches_a_second_process(world: World) {
    let script = "trap 'echo got; exit 11' USR1; echo up; while :; do sleep 0.05; done";
    let started = world
        .up(world
            .spec(script)
            .with(|spec| spec.payload.mode = Mode::ProcessTwo))
        .await;
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (11, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_is_delivered_with_a_stopped_supervisor(world: World) {
    let started = world
        .up(world.spec("trap 'echo usr' USR1; echo up; while :; do sleep 0.05; done"))
        .await;
    world.handles(&started, "USR1").await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    world.received("usr").await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_right_after_the_start_is_harmless(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    for name in ["SIGHUP", "SIGUSR1", "SIGRTMIN+5", "SIGWINCH"] {
        within(world.backend.signal(&started, signal(name)))
            .await
            .unwrap();
    }
    world.received("up").await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_arrives_as_often_as_it_is_sent(world: World) {
    let script = "n=0; trap 'n=$((n+1)); echo usr-$n' USR1; echo up; while :; do sleep 0.02; done";
    let started = world.up(world.spec(script)).await;
    world.handles(&started, "USR1").await;
    for number in 1..=3 {
        within(world.backend.signal(&started, signal("SIGUSR1")))
            .await
            .unwrap();
        world.received(&format!("usr-{number}")).await;
    }
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_can_be_stopped_and_continued(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let send = async |name| {
        within(world.backend.signal(&started, signal(name)))
            .await
            .unwrap();
    };
    let path = format!("/proc/{}/stat", started.leader.pid);
    let is_stopped = || fs::read_to_string(&path).unwrap().contains(") T ");
    send("SIGSTOP").await;
    within(async {
        while !is_stopped() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    send("SIGCONT").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sigkill_is_reported_as_137(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .up(world
                .named(&format!("{mode:?}").to_lowercase(), HEARS_TERM)
                .with(|spec| spec.payload.mode = mode))
            .await;
        within(world.backend.signal(&started, Signal::KILL))
            .await
            .unwrap();
        let exit = world.end(&started).await;
        assert_eq!((ended(&exit), exit.error), ((137, 9), None));
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_time_signal_reaches_its_handler(world: World) {
    let started = world
        .up(world.spec("trap 'exit 21' 36; echo up; while :; do sleep 0.05; done"))
        .await;
    world.handles(&started, "SIGRTMIN+2").await;
    within(world.backend.signal(&started, signal("SIGRTMIN+2")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (21, 0));
    world.leave(&[&started]).await;
}
