//! TaskStats: the first sample, the last one, and the source of the figures. Without cgroups, that is if the tests do not run as root, no
//! figures are reported.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use dev_agent::Plugin;
use nomad_driver_nspawn::cgroup::{Group, UsageFiles};
use nomad_driver_nspawn::container::Usage;
use nomad_driver_nspawn::proto::base::{
    ClientTopology, ClientTopologyCore, NomadConfig, NomadDriverConfig, SetConfigRequest,
};
use nomad_driver_nspawn::proto::driver::{
    TaskStats, TaskStatsRequest, TaskStatsResponse, cpu_usage, memory_usage,
};
use nomad_driver_nspawn::sys::procfs::own_mounts;
use support::not_applicable;
use tonic::Streaming;

use crate::harness::{Host, Running, is_root, within};

/// Opens the stats stream of a task.
pub(crate) async fn stream(
    plugin: &Plugin,
    id: &str,
    every: Duration,
) -> Streaming<TaskStatsResponse> {
    let request = TaskStatsRequest {
        task_id: id.to_owned(),
        collection_interval: Some(every.try_into().unwrap()),
    };
    let answer = within("TaskStats", async {
        plugin.driver().task_stats(request).await
    })
    .await;
    answer.unwrap().into_inner()
}

async fn sample(stream: &mut Streaming<TaskStatsResponse>) -> TaskStats {
    let response = within("a sample", stream.message()).await.unwrap().unwrap();
    response.stats.unwrap()
}

/// Whether the task has a cgroup, which is the source of the figures.
async fn is_measured(plugin: &Plugin, task: &Running) -> bool {
    let attributes = task
        .inspect(plugin)
        .await
        .unwrap()
        .driver
        .unwrap()
        .attributes;
    let measured = attributes.contains_key("cgroup");
    assert_eq!(measured, is_root(), "{attributes:?}");
    measured
}

#[tokio::test] // Conformance check 21.
async fn ticks_come_from_the_topology() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let core = || ClientTopologyCore {
        base_speed: 2500,
        ..Default::default()
    };
    let topology = ClientTopology {
        cores: vec![core(), core()],
        ..Default::default()
    };
    let request = SetConfigRequest {
        msgpack_config: rmp_serde::to_vec(&host.config()).unwrap(),
        nomad_config: Some(NomadConfig {
            driver: Some(NomadDriverConfig {
                topology: Some(topology),
                ..Default::default()
            }),
        }),
        plugin_api_version: "v0.1.0".to_owned(),
    };
    plugin.base().set_config(request).await.unwrap();
    let task = host.start(&plugin, host.shell("while :; do :; done")).await;
    let mut stats = stream(&plugin, &task.id, Duration::from_millis(100)).await;
    if is_measured(&plugin, &task).await {
        let busy = async {
            loop {
                let cpu = sample(&mut stats)
                    .await
                    .agg_resource_usage
                    .unwrap()
                    .cpu
                    .unwrap();
                if cpu.percent > 0.0 {
                    return cpu;
                }
            }
        };
        let cpu = within("a busy task", busy).await;
        assert!(
            cpu.measured_fields
                .contains(&cpu_usage::Fields::TotalTicks.into())
        );
        assert!(
            (cpu.total_ticks - cpu.percent / 100.0 * 2500.0).abs() < 0.001,
            "{cpu:?}"
        );
    } else {
        let cpu = sample(&mut stats)
            .await
            .agg_resource_usage
            .unwrap()
            .cpu
            .unwrap();
        assert!(
            cpu.measured_fields.is_empty() && cpu.total_ticks == 0.0,
            "{cpu:?}"
        );
    }
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 58.
async fn the_first_sample() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    let before = SystemTime::now();
    // The interval is longer than any test, so this is the sample that is sent immediately.
    let mut stats = stream(&plugin, &task.id, Duration::from_secs(1000)).await;
    let sample = sample(&mut stats).await;
    let taken = SystemTime::try_from(sample.timestamp.unwrap()).unwrap();
    assert!(before <= taken && taken <= SystemTime::now());
    let usage = sample.agg_resource_usage.unwrap();
    let (cpu, memory) = (usage.cpu.unwrap(), usage.memory.unwrap());
    // Percentages need two readings.
    assert!(
        !cpu.measured_fields
            .contains(&cpu_usage::Fields::Percent.into())
    );
    if is_measured(&plugin, &task).await {
        assert!(
            memory
                .measured_fields
                .contains(&memory_usage::Fields::Rss.into())
                && memory.rss > 0,
            "{memory:?}"
        );
    } else {
        assert!(memory.measured_fields.is_empty());
    }
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 59.
async fn the_samples_end_with_the_task() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(
            &plugin,
            host.shell("trap 'exit 0' USR1; echo up; while :; do sleep 0.05; done"),
        )
        .await;
    let mut stats = stream(&plugin, &task.id, Duration::from_secs(1000)).await;
    sample(&mut stats).await;
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    let end = within("the end of the samples", stats.message()).await;
    assert_eq!(end.unwrap(), None);
    task.destroy(&plugin).await;
    let mut nothing = stream(&plugin, &task.id, Duration::from_secs(1)).await;
    assert_eq!(
        within("the end of no samples", nothing.message())
            .await
            .unwrap(),
        None
    );
}

/// Cgroups of cgroup v1 controllers with one process, which are removed at the end.
struct ControllerGroups {
    groups: BTreeMap<String, PathBuf>,
    process: Child,
}

impl ControllerGroups {
    /// A process in a new cgroup of each of these controllers, which ends with its stdin. `None` if this host has not all of them.
    fn new(names: &[&str]) -> Option<Self> {
        let mounts = own_mounts().unwrap();
        let group = |name: &&str| {
            let mut mounts = mounts.iter().filter(|mount| mount.kind == "cgroup");
            let mount = mounts.find(|mount| mount.has_option(name))?;
            let leaf = format!("nspawn-test-{}-{name}", std::process::id());
            Some(((*name).to_owned(), mount.target.join(leaf)))
        };
        let groups = names.iter().map(group).collect::<Option<_>>()?;
        // It holds 8 MiB, and all its memory is charged to the cgroup that it is in when it begins.
        let script =
            "read go; x=$(head -c 8388608 /dev/zero | tr '\\0' x); echo up; read end; : $x";
        let process = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let all = Self { groups, process };
        for group in all.groups.values() {
            fs::create_dir(group).unwrap();
            fs::write(group.join("cgroup.procs"), all.process.id().to_string()).unwrap();
        }
        Some(all)
    }

    /// Lets the process begin, and waits until it has its memory.
    fn fill(&mut self) {
        use std::io::{BufRead as _, BufReader, Write as _};
        let mut stdin = self.process.stdin.as_ref().unwrap();
        stdin.write_all(b"go\n").unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(self.process.stdout.as_mut().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
    }

    /// Ends the process and removes the cgroups.
    fn remove(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for group in self.groups.values() {
            let group = Group::new(group);
            group.wait_empty(Duration::from_secs(10));
            let _ = group.remove();
        }
    }
}

impl Drop for ControllerGroups {
    fn drop(&mut self) {
        self.remove();
    }
}

#[test]
fn the_controllers_of_cgroup_v1_are_read_until_their_groups_are_gone() {
    if !is_root() {
        return not_applicable("only root can make cgroups");
    }
    let Some(mut made) = ControllerGroups::new(&["memory", "cpu", "cpuacct"]) else {
        return not_applicable("this host has not these controllers of cgroup v1");
    };
    let mut files = UsageFiles::new(None, &made.groups);
    let before = files.read(true).unwrap();
    assert_eq!(before.processes.unwrap().len(), 1);
    made.fill();
    let reading = files.read(true).unwrap();
    let usage = reading.usage;
    for (what, bytes) in [
        ("rss", usage.memory_rss),
        ("usage", usage.memory_usage),
        ("peak", usage.memory_peak),
    ] {
        assert!(bytes >= Some(8 << 20), "{what}: {usage:?}");
    }
    assert!(usage.memory_peak >= usage.memory_usage, "{usage:?}");
    // The kernel may charge all of it to one of the two.
    let time = |usage: Usage| usage.cpu_user_ns.unwrap() + usage.cpu_system_ns.unwrap();
    assert!(time(usage) > time(before.usage), "{usage:?}");
    assert!(usage.memory_cache.is_some() && usage.memory_swap.is_some());
    assert_eq!(
        (usage.throttled_periods, usage.throttled_ns),
        (Some(0), Some(0))
    );
    let group = &made.groups["memory"];
    for (file, value) in [
        ("memory.kmem.usage_in_bytes", usage.memory_kernel),
        ("memory.kmem.max_usage_in_bytes", usage.memory_kernel_peak),
    ] {
        assert_eq!(value.is_some(), group.join(file).exists(), "{file}");
    }
    let process = i32::try_from(made.process.id()).unwrap();
    let processes = reading.processes.unwrap();
    let found = processes.iter().find(|usage| usage.process.pid == process);
    let found = found.unwrap();
    assert!(found.memory_rss >= 8 << 20, "{found:?}");
    assert!(found.cpu_user_ns + found.cpu_system_ns > 0, "{found:?}");
    made.remove();
    assert_eq!(files.read(true), None);
    assert_eq!(files.read(false), None);
}
