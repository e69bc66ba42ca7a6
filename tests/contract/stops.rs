//! Stops: signal, grace period, force.

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_reaches_a_sigterm_handler(world: World) {
    stopped(world, Mode::Plain, HEARS_TERM, "TERM", None, (3, 0)).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_reaches_a_sigint_handler(world: World) {
    stopped(
        world,
        Mode::Plain,
        "trap 'exit 4' INT; echo up; while :; do sleep 0.05; done",
        "INT",
        None,
        (4, 0),
    )
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_reaches_a_second_process(world: World) {
    stopped(world, Mode::ProcessTwo, HEARS_TERM, "TERM", None, (3, 0)).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chosen_stop_signal_is_sent(world: World) {
    stopped(
        world,
        Mode::Plain,
        "trap 'exit 6' USR1; trap '' TERM INT; echo up; while :; do sleep 0.05; done",
        "USR1",
        Some("SIGUSR1"),
        (6, 0),
    )
    .await;
}

async fn stopped(
    world: World,
    mode: Mode,
    script: &str,
    handled: &str,
    with: Option<&str>,
    want: (i32, i32),
) {
    let started = world
        .up(world.spec(script).with(|spec| spec.payload.mode = mode))
        .await;
    if mode == Mode::Plain {
        world.handles(&started, handled).await;
    }
    within(world.backend.stop(&started, with.map(signal), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), want);
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_ignores_signals_is_killed_after_the_timeout(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .up(world
                .named(&format!("{mode:?}").to_lowercase(), DEAF)
                .with(|spec| spec.payload.mode = mode))
            .await;
        within(
            world
                .backend
                .stop(&started, None, Duration::from_millis(100)),
        )
        .await
        .unwrap();
        assert_eq!(ended(&world.end(&started).await), (137, 9));
        within(world.backend.remove(&started.id)).await.unwrap();
        assert!(!is_alive(started.leader));
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_timeout_means_an_immediate_kill(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    within(world.backend.stop(&started, None, Duration::ZERO))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (137, 9));
    assert!(!world.said("stdout").contains("term"), "the handler ran");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_after_the_exit_succeeds(world: World) {
    let started = world.start(world.spec("exit 9")).await;
    world.end(&started).await;
    within(world.backend.stop(&started, None, AMPLE))
        .await
        .unwrap();
    within(world.backend.signal(&started, signal("TERM")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (9, 0));
    world.leave(&[&started]).await;
}

/// Before the command runs there may be no handler for the signal; the grace period ends all the same.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_right_after_the_start_is_carried_out(world: World) {
    for number in 0..5 {
        let task = format!("t{number}");
        let started = world.start(world.named(&task, HEARS_TERM)).await;
        let grace = Duration::from_millis(20 * number);
        within(world.backend.stop(&started, None, grace))
            .await
            .unwrap();
        let exit = world.end(&started).await;
        // A shell reacts to SIGINT before it has executed the line with the trap for SIGTERM. It then tries to die of that signal: PID 1
        // can't, and exits with 130; the fake's shell is not PID 1, and systemd-nspawn returns 0 for that death.
        assert!(
            [(3, 0), (137, 9), (130, 0), (0, 0)].contains(&ended(&exit)),
            "{number}: {exit:?}"
        );
        within(world.backend.remove(&started.id)).await.unwrap();
        assert!(!is_alive(started.leader));
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_stops_all_succeed(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let stop = || stopped_politely(&world.backend, &started, (3, 0));
    tokio::join!(stop(), stop(), stop());
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_overtakes_a_graceful_stop(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let patient = world.backend.stop(&started, None, Duration::MAX);
    let force = world.backend.stop(&started, None, Duration::ZERO);
    let (patient, force) = within(async { tokio::join!(patient, force) }).await;
    patient.unwrap();
    force.unwrap();
    assert_eq!(ended(&world.end(&started).await), (137, 9));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlimited_timeout_ends_with_the_task(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_during_the_timeout_keeps_its_code(world: World) {
    let script = "trap 'heard=1' TERM; echo up; while [ -z \"$heard\" ]; do sleep 0.02; done; sleep 0.1; exit 24";
    let started = world.up(world.spec(script)).await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (24, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_during_a_stop_succeed(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let signals = async {
        for _ in 0..50 {
            world.backend.signal(&started, signal("SIGHUP")).await?;
        }
        Ok::<_, BackendError>(())
    };
    let stop = stopped_politely(&world.backend, &started, (3, 0));
    let (sent, ()) = within(async { tokio::join!(signals, stop) }).await;
    sent.unwrap();
    world.leave(&[&started]).await;
}

/// The payload's handlers are considered only if the job names no signal.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_signal_is_sent_even_if_another_is_handled(world: World) {
    let script = "trap 'exit 22' INT; trap 'exit 23' TERM; echo up; while :; do sleep 0.05; done";
    stopped(world, Mode::Plain, script, "INT", Some("SIGINT"), (22, 0)).await;
}

/// Uses a backend that has not received the supervisor's status yet, like a plugin that was just restarted.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_backend_stops_it_gracefully(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let other = NspawnBackend::new(world.settings.clone());
    stopped_politely(&other, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_of_a_removed_container_is_an_error(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    within(world.backend.remove(&started.id)).await.unwrap();
    let stopped = within(world.backend.stop(&started, None, AMPLE)).await;
    let signalled = within(world.backend.signal(&started, Signal::TERM)).await;
    for error in [stopped.unwrap_err(), signalled.unwrap_err()] {
        assert!(matches!(error, BackendError::Lost { .. }), "{error:?}");
    }
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removal_overtakes_a_graceful_stop(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let patient = world.backend.stop(&started, None, Duration::MAX);
    let removed = world.backend.remove(&started.id);
    let (patient, removed) = within(async { tokio::join!(patient, removed) }).await;
    patient.unwrap();
    removed.unwrap();
    world.leave(&[&started]).await;
}

/// The exit is known before systemd-nspawn has removed the root.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_container_with_an_ephemeral_root_is_reported_once(world: World) {
    let started = world
        .up(world.spec(DEAF).with(|spec| spec.rootfs.ephemeral = true))
        .await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    let first = world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    assert_eq!(within(other.wait(&started)).await.unwrap(), first);
    world.leave(&[&started]).await;
}
