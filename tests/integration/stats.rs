//! TaskStats: the first sample, the last one, and the source of the figures. Without cgroups, that is if the tests do not run as root, no
//! figures are reported.

use std::time::{Duration, SystemTime};

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::base::{
    ClientTopology, ClientTopologyCore, NomadConfig, NomadDriverConfig, SetConfigRequest,
};
use nomad_driver_nspawn::proto::driver::{
    TaskStats, TaskStatsRequest, TaskStatsResponse, cpu_usage, memory_usage,
};
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
    if is_measured(&plugin, &task).await {
        assert!(!cpu.measured_fields.is_empty());
        assert!(
            memory
                .measured_fields
                .contains(&memory_usage::Fields::Rss.into())
                && memory.rss > 0,
            "{memory:?}"
        );
    } else {
        assert!(cpu.measured_fields.is_empty() && memory.measured_fields.is_empty());
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
