//! How a task ends by itself, by a signal or by a stop, and what WaitTask reports.

use nomad_driver_nspawn::sys::process::{ProcessHandle, children};

use super::*;

#[rstest] // Conformance check 36.
#[tokio::test]
async fn an_exit_status(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.start(&plugin, world.shell("exit 7")).await;
    let exit = task.wait(&plugin).await;
    assert_eq!(
        (exit.code, exit.signal, exit.oom_killed, exit.error),
        (7, 0, false, None)
    );
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest] // Conformance check 37.
#[case(false)]
#[case(true)]
#[tokio::test]
async fn death_by_sigkill(world: impl World, #[case] process_two: bool) {
    let plugin = world.plugin().await;
    let job = world.shell(ON_AND_ON).with("process_two", process_two);
    let task = world.up(&plugin, job).await;
    task.signal(&plugin, "SIGKILL").await.unwrap();
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (137, 9, None));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

/// Starts a task that ignores the signal, stops it with this grace period, and checks that none of its processes is left.
async fn stopped_by_force(world: impl World, grace: Duration) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(DEAF)).await;
    let mut payload = vec![ProcessHandle::open(task.leader()).unwrap()];
    payload.extend(
        children(task.leader())
            .into_iter()
            .filter_map(|pid| ProcessHandle::open(pid).ok()),
    );
    let exit = task.stop(&plugin, grace, "SIGTERM").await;
    assert_eq!((exit.code, exit.signal, exit.error), (137, 9, None));
    assert!(payload.iter().all(|process| process.wait(DEADLINE)));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest] // Conformance check 40.
#[tokio::test]
async fn a_task_that_ignores_the_signal_is_killed_after_the_timeout(world: impl World) {
    stopped_by_force(world, Duration::from_millis(300)).await;
}

#[rstest] // Conformance check 41.
#[tokio::test]
async fn no_timeout_means_an_immediate_kill(world: impl World) {
    stopped_by_force(world, Duration::ZERO).await;
}

#[rstest]
#[tokio::test]
async fn a_graceful_stop_keeps_the_tasks_exit_code(world: impl World) {
    let plugin = world.plugin().await;
    let job = world.shell("trap 'echo bye; exit 3' USR1; echo up; while :; do sleep 0.05; done");
    let task = world.up(&plugin, job).await;
    let exit = task.stop(&plugin, DEADLINE, "SIGUSR1").await;
    assert_eq!((exit.code, exit.signal), (3, 0));
    assert_eq!(task.stdout.all().await, "up\nbye\n");
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
