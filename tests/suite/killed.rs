//! What is reported if a process of the driver or systemd-nspawn itself is killed. `tests/matrix/` does this at every step of a task.

use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::sys::process::ProcessHandle;

use super::*;

/// Starts a task, kills one of its processes with this signal and returns what is reported.
async fn ended_by(world: impl World, victim: impl Fn(&Running) -> i32, signal: &str) -> TaskExit {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(ON_AND_ON)).await;
    let signal: Signal = signal.parse().unwrap();
    ProcessHandle::open(victim(&task))
        .unwrap()
        .signal(signal)
        .unwrap();
    let exit = task.wait(&plugin).await;
    task.destroy(&plugin).await;
    world.leave(plugin).await;
    exit
}

#[rstest]
#[case("SIGKILL", 9)]
// A real-time signal, which has no name among the standard ones: its status must not be lost.
#[case("SIGRTMIN+6", 40)]
#[tokio::test]
async fn a_killed_systemd_nspawn_ends_its_task_with_a_reason(
    world: impl World,
    #[case] signal: &str,
    #[case] number: i32,
) {
    let exit = ended_by(world, Running::nspawn, signal).await;
    assert_eq!((exit.code, exit.signal), (128 + number, number));
    let reason = exit.error.as_ref();
    assert!(reason.is_some_and(|text| text.contains(signal)), "{exit:?}");
}

#[rstest]
#[tokio::test]
async fn a_killed_supervisor_ends_its_task_with_a_reason(world: impl World) {
    let exit = ended_by(world, Running::supervisor, "SIGKILL").await;
    assert_ne!(exit.code, 0);
    let reason = exit.error.as_ref();
    assert!(
        reason.is_some_and(|text| text.contains("supervisor")),
        "{exit:?}"
    );
}
