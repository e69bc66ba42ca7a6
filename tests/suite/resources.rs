//! What a task may use, seen by its processes and in the files of its cgroups.

use std::fs;
use std::path::PathBuf;

use nomad_driver_nspawn::cgroup::Layout;
use serde_json::json;
use support::not_applicable;

use super::*;

/// Whether tasks have limits of this controller in this world; reports the reason if not.
pub(super) fn limits(world: &impl World, controller: &str) -> bool {
    if !world.has(&[Need::Root]) {
        return false;
    }
    let has = Layout::of_this_host()
        .usable_controllers()
        .contains(controller);
    if !has {
        not_applicable(&format!("needs the {controller} controller"));
    }
    has
}

/// The limit of memory in a file of a task, in bytes; `None` if there is none.
fn memory_limit(task: &Running, version_1: &str, version_2: &str) -> Option<u64> {
    let group = |path: &[&str]| task.state(path).as_str().map(PathBuf::from);
    let file = match group(&["controllers", "memory"]) {
        Some(group) => group.join(version_1),
        None => group(&["cgroup"]).unwrap().join(version_2),
    };
    let text = fs::read_to_string(file).unwrap();
    // In cgroup v1 the highest number of pages means no limit.
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
}

#[rstest]
#[tokio::test]
async fn the_resource_limits_of_the_job_are_those_of_the_command(
    world: impl World,
    #[values(false, true)] process_two: bool,
) {
    let plugin = world.plugin().await;
    let script = "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc";
    let job = world
        .shell(script)
        .with("process_two", process_two)
        .with("ulimit", json!([{ "nofile": "100:200", "core": "0" }]));
    let ended = world.start(&plugin, job).await.finish(&plugin).await;
    assert_eq!((ended.said(), &*ended.stderr), ("100\n200\n0\n0\n", ""));
    world.leave(plugin).await;
}

/// Fewer would not be enough for the start itself.
#[rstest]
#[tokio::test]
async fn a_task_starts_with_the_lowest_limit_of_open_files(
    world: impl World,
    #[values(false, true)] process_two: bool,
) {
    let plugin = world.plugin().await;
    let job = |limit| {
        world
            .shell("ulimit -n")
            .with("process_two", process_two)
            .with("ulimit", json!([{ "nofile": limit }]))
    };
    let ended = world.start(&plugin, job("16")).await.finish(&plugin).await;
    assert_eq!((ended.said(), &*ended.stderr), ("16\n", ""));
    let status = refusal(world.try_start(&plugin, job("15")).await);
    let words = "config.ulimit[\"nofile\"]: 15 is below 16";
    assert!(status.message().contains(words), "{status}");
    world.leave(plugin).await;
}

#[rstest] // Conformance check 65.
#[case(96, Some(96 << 20))]
#[case(-1, None)]
#[tokio::test]
async fn memory_max_is_the_limit_and_memory_is_reserved(
    world: impl World,
    #[case] memory_max: i64,
    #[case] limit: Option<u64>,
) {
    if !limits(&world, "memory") {
        return world.unused();
    }
    let plugin = world.plugin().await;
    let mut job = world.shell(ON_AND_ON).with_memory(64);
    job.spec.memory_max_mb = memory_max;
    let task = world.up(&plugin, job).await;
    let hard = memory_limit(&task, "memory.limit_in_bytes", "memory.max");
    assert_eq!(hard, limit);
    let reserved = memory_limit(&task, "memory.soft_limit_in_bytes", "memory.low");
    assert_eq!(reserved, Some(64 << 20));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest] // Conformance check 66.
#[tokio::test]
async fn a_task_runs_on_its_reserved_cores_only(world: impl World) {
    if !limits(&world, "cpuset") {
        return world.unused();
    }
    let plugin = world.plugin().await;
    let mut job = world.shell(ON_AND_ON);
    job.spec.cores = 1;
    let task = world.up(&plugin, job).await;
    let status = fs::read_to_string(format!("/proc/{}/status", task.leader())).unwrap();
    let mut lines = status.lines();
    let allowed = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let config = task.started.handle.config.as_ref().unwrap();
    let reserved = config.resources.as_ref().unwrap().linux_resources.as_ref();
    assert_eq!(allowed.unwrap().trim(), reserved.unwrap().cpuset_cpus);
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
