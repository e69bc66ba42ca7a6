//! A command that has started only when it says so. The scenario says it in its place, on the socket of the host that the command has too.

use std::os::unix::net::UnixDatagram;

use nomad_driver_nspawn::container::Readiness;

use super::*;

fn notifies(world: &World, script: &str, limit: Duration) -> ContainerSpec {
    world
        .spec(script)
        .with(|spec| spec.payload.readiness = Readiness::Notify(limit))
}

/// Sends this as the command would.
fn say(world: &World, message: &str) {
    let socket = world.task_dir("task").ready_socket();
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(message.as_bytes(), socket).unwrap();
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_started_when_it_says_so(world: World) {
    let spec = notifies(&world, "echo up; exec sleep 1000", LIMIT);
    let is_said = std::cell::Cell::new(false);
    let said = async {
        world.received("up").await;
        say(&world, "STATUS=READY=1\nREADY=0");
        tokio::time::sleep(Duration::from_millis(200)).await;
        is_said.set(true);
        say(&world, "STATUS=at work\nREADY=1\n");
        std::future::pending().await
    };
    let started = tokio::select! {
        started = world.start(spec) => started,
        () = said => unreachable!("it goes on until the start has succeeded"),
    };
    assert!(is_said.get(), "it has started before");
    within(world.backend.stop(&started, None, Duration::ZERO))
        .await
        .unwrap();
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_silent_or_ends_has_not_started(world: World) {
    let spec = notifies(&world, "exec sleep 1000", Duration::from_millis(300));
    let silent = world.refused(spec).await.to_string();
    let expected = "the task was not ready within 0.3 s (config.ready_timeout)";
    assert!(silent.contains(expected), "{silent}");
    let ended = world.refused(notifies(&world, "exit 7", LIMIT)).await;
    let expected = "the task has ended before it was ready, with exit code 7";
    assert!(ended.to_string().contains(expected), "{ended}");
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reason_has_the_last_status(world: World) {
    let spec = notifies(&world, "echo up; exec sleep 1000", Duration::from_secs(2));
    let said = async {
        world.received("up").await;
        say(&world, "STATUS=waiting for \x1b[1mthe database");
        std::future::pending::<()>().await;
    };
    let error = tokio::select! {
        error = world.refused(spec) => error.to_string(),
        () = said => unreachable!("it waits"),
    };
    let expected = "The last it said: waiting for [1mthe database";
    assert!(error.contains(expected), "{error}");
    world.leave(&[]).await;
}
