//! Tasks that use up their memory. What the kernel counts for one of them is in the contract, `tests/contract/limits.rs`.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;

/// How many tasks die. On an emulated processor (`NOMAD_DRIVER_NSPAWN_E2E_EMULATED`), where each takes seconds, it is fewer.
const DEATHS: usize = 200;
const DEATHS_EMULATED: usize = 16;
/// So much that the script that uses it up is far larger than any other process in the cgroup when the kernel chooses a victim.
const MEMORY_MIB: i64 = 32;
/// A script whose shell doubles a variable until the kernel kills it, which takes a fraction of a second.
const HUNGRY: &str = "x=0123456789abcdef; while :; do x=$x$x; done";

/// The kernel counts a kill while the task exits and its cgroup is removed, so a driver that reads the counter late misses some of them.
#[rstest] // Conformance check 64.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_fast_deaths_for_memory_is_reported(world: impl World) {
    if !resources::limits(&world, "memory") {
        return world.unused();
    }
    let emulated = std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_EMULATED").is_some();
    let deaths = if emulated { DEATHS_EMULATED } else { DEATHS };
    let plugin = world.plugin().await;
    let begun = AtomicUsize::new(0);
    // Each in a tree of its own, which systemd-nspawn locks.
    let worker = async |number: usize| {
        let tree = world.tree(&format!("tree{number}"));
        let mut ends = Vec::new();
        loop {
            let turn = begun.fetch_add(1, Ordering::Relaxed);
            if turn >= deaths {
                return ends;
            }
            let job = world
                .shell(HUNGRY)
                .with("image", json!(tree))
                .with("memory_swap", format!("{MEMORY_MIB}m"))
                .with("process_two", turn.is_multiple_of(2))
                .with_memory(MEMORY_MIB);
            let task = world.start(&plugin, job).await;
            let exit = task.wait(&plugin).await;
            task.destroy(&plugin).await;
            ends.push((exit.code, exit.signal, exit.oom_killed, exit.error));
        }
    };
    #[rustfmt::skip]
    let ends: [_; 8] = tokio::join!(
        worker(0), worker(1), worker(2), worker(3), worker(4), worker(5), worker(6), worker(7),
    ).into();
    let ends = ends.concat();
    assert_eq!(ends.len(), deaths);
    let other: Vec<_> = ends
        .iter()
        .filter(|end| **end != (137, 9, true, None))
        .collect();
    assert!(other.is_empty(), "{} of {deaths}: {other:?}", other.len());
    world.leave(plugin).await;
}
