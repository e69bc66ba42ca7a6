//! TaskStats and InspectTask of real processes: what a task uses is what its processes do. The sources are those of the host: the files of the
//! task's cgroup, or its processes where a controller is missing.

use nomad_driver_nspawn::proto::driver::{
    CpuUsage, MemoryUsage, TaskResourceUsage, TaskStats, cpu_usage, memory_usage,
};
use serde_json::json;
use support::not_applicable;
use support::wire::{Running, Samples};

use super::*;

/// The shortest interval.
const EVERY: Duration = Duration::from_millis(100);
/// What the payload of [`HOLDS`] has in memory, at least.
const HELD: u64 = 30 << 20;
/// Fills a variable with 30 MiB, and keeps it.
const HOLDS: &str =
    "x=$(head -c 31457280 /dev/zero | tr '\\0' x); echo up; while :; do sleep 1; done";
/// Uses a whole core.
const BUSY: &str = "echo up; while :; do :; done";

/// Whether the task has a cgroup, from which its statistics come; reports it if not.
async fn is_measured(plugin: &Plugin, task: &Running) -> bool {
    let inspected = task.inspect(plugin).await.unwrap();
    let measured = inspected.driver.unwrap().attributes.contains_key("cgroup");
    if !measured {
        not_applicable("without a cgroup there are no statistics");
    }
    measured
}

async fn sample(stats: &mut Samples) -> TaskStats {
    let next = within("a sample", stats.message()).await;
    next.unwrap().unwrap().stats.unwrap()
}

fn parts(usage: Option<&TaskResourceUsage>) -> (CpuUsage, MemoryUsage) {
    let usage = usage.unwrap().clone();
    (usage.cpu.unwrap(), usage.memory.unwrap())
}

/// The first sample whose figures satisfy `is_it`.
async fn until(stats: &mut Samples, is_it: impl Fn(&CpuUsage, &MemoryUsage) -> bool) -> TaskStats {
    let search = async {
        loop {
            let sample = sample(stats).await;
            let (cpu, memory) = parts(sample.agg_resource_usage.as_ref());
            if is_it(&cpu, &memory) {
                return sample;
            }
        }
    };
    within("such a sample", search).await
}

fn has_percent(cpu: &CpuUsage) -> bool {
    cpu.measured_fields
        .contains(&cpu_usage::Fields::Percent.into())
}

#[rstest]
#[tokio::test]
async fn a_loop_is_busy_and_a_sleeper_is_not(world: impl World) {
    let plugin = world.plugin().await;
    let busy = world.up(&plugin, world.shell(BUSY)).await;
    let other = world.shell(ON_AND_ON).named("idle");
    let idle = other.with("image", json!(world.tree("idle")));
    let idle = world.up(&plugin, idle).await;
    if is_measured(&plugin, &busy).await {
        let mut stats = busy.stats(&plugin, EVERY).await;
        let (first, _) = parts(sample(&mut stats).await.agg_resource_usage.as_ref());
        assert!(!has_percent(&first), "one reading has no rate: {first:?}");
        // A host with more work than cores gives it less than a core.
        let loop_runs = until(&mut stats, |cpu, _| cpu.percent > 20.0).await;
        let (cpu, _) = parts(loop_runs.agg_resource_usage.as_ref());
        assert!(cpu.user_mode > cpu.system_mode, "{cpu:?}");
        let mut stats = idle.stats(&plugin, EVERY).await;
        until(&mut stats, |cpu, _| has_percent(cpu) && cpu.percent < 1.0).await;
    }
    for task in [&busy, &idle] {
        task.destroy(&plugin).await;
    }
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn memory_is_what_the_payload_holds(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(HOLDS)).await;
    if is_measured(&plugin, &task).await {
        let mut stats = task.stats(&plugin, EVERY).await;
        let holds = until(&mut stats, |_, memory| memory.rss >= HELD).await;
        let (_, memory) = parts(holds.agg_resource_usage.as_ref());
        let measured = |field: memory_usage::Fields| memory.measured_fields.contains(&field.into());
        assert!(measured(memory_usage::Fields::Rss), "{memory:?}");
        for (field, value) in [
            (memory_usage::Fields::Usage, memory.usage),
            (memory_usage::Fields::MaxUsage, memory.max_usage),
        ] {
            assert!(!measured(field) || value >= HELD, "{field:?}: {memory:?}");
        }
        let largest = |sample: &TaskStats| {
            let processes = sample.resource_usage_by_pid.values();
            processes.map(|usage| parts(Some(usage)).1.rss).max()
        };
        assert!(largest(&holds) >= Some(HELD), "{holds:?}");
    }
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn each_process_has_figures_of_its_own(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(ON_AND_ON)).await;
    if is_measured(&plugin, &task).await {
        let mut stats = task.stats(&plugin, EVERY).await;
        let processes = [task.leader(), task.nspawn()].map(|pid| pid.to_string());
        let of = |sample: &TaskStats, pid: &str| parts(sample.resource_usage_by_pid.get(pid));
        let first = sample(&mut stats).await;
        for pid in &processes {
            let (cpu, memory) = of(&first, pid);
            assert!(!has_percent(&cpu), "{cpu:?}");
            assert_eq!(memory.measured_fields, [memory_usage::Fields::Rss as i32]);
        }
        // An estimate before Linux 6.17, which may be 0 for a process that has just begun.
        let all_known = async {
            let mut latest = first;
            while processes.iter().any(|pid| of(&latest, pid).1.rss == 0) {
                latest = sample(&mut stats).await;
            }
        };
        within("the memory of both", all_known).await;
    }
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn statistics_go_on_after_recovery(world: impl World) {
    let mut plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(BUSY)).await;
    let mut stats = task.stats(&plugin, EVERY).await;
    sample(&mut stats).await;
    plugin.kill().await;
    let plugin = world.recovered(&task).await;
    if is_measured(&plugin, &task).await {
        let mut stats = task.stats(&plugin, EVERY).await;
        let (first, _) = parts(sample(&mut stats).await.agg_resource_usage.as_ref());
        assert!(!has_percent(&first) && first.percent == 0.0, "{first:?}");
        let next = until(&mut stats, |cpu, _| cpu.percent > 0.0).await;
        let (cpu, memory) = parts(next.agg_resource_usage.as_ref());
        assert!(cpu.percent.is_finite() && memory.rss > 0, "{next:?}");
    }
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
