//! The release of what a task held on the host, which can take minutes.

use nomad_driver_nspawn::failpoint::Failpoint;
use support::trap::Trap;

use super::*;

/// The supervisor has reported the exit to a plugin that is dead by now.
#[rstest]
#[tokio::test]
async fn a_plugin_that_starts_during_a_long_release_learns_the_exit(world: impl World) {
    let (gate, inside) = world.gate();
    let mut plugin = world.plugin().await;
    let script = format!("echo up; until test -e {inside}; do sleep 0.01; done; exit 21");
    let task = world.up(&plugin, world.shell(&script)).await;
    plugin.kill().await;
    let mut releasing = Trap::at(&world.state(), Failpoint::Releasing);
    std::fs::write(gate, "").unwrap();
    within("the release", releasing.reached()).await;
    let plugin = world.recovered(&task).await;
    let exit = task.stop(&plugin, DEADLINE, "SIGTERM").await;
    assert_eq!((exit.code, exit.signal, exit.error), (21, 0, None));
    drop(releasing);
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
