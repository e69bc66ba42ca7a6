//! What a task may use, seen by its processes.

use serde_json::json;

use super::*;

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
