//! InspectTask: what a person needs to know about a task, and no secret.

use std::collections::HashMap;

use serde_json::json;
use support::wire::Running;

use super::*;

async fn attributes(plugin: &Plugin, task: &Running) -> HashMap<String, String> {
    let inspected = task.inspect(plugin).await.unwrap();
    inspected.driver.unwrap().attributes
}

#[rstest]
#[tokio::test]
async fn a_task_is_described_without_its_secrets(world: impl World) {
    const SECRET: &str = "correct-horse-battery";
    let mut plugin = world.plugin().await;
    let job = world
        .shell(&format!(
            "echo up; : --password={SECRET} s3cr; exec sleep 1000"
        ))
        .env("DB_PASSWORD", SECRET)
        .env("PIN", "s3cr");
    let task = world.up(&plugin, job).await;
    let found = attributes(&plugin, &task).await;
    let image = task.allocation.spec().config["image"].clone();
    let command = r#"/bin/sh -c "echo up; : --password=${DB_PASSWORD} ${PIN}; exec sleep 1000""#;
    for (name, wanted) in [
        ("machine", task.state(&["machine"])),
        ("pid", json!(task.leader().to_string())),
        ("supervisor_pid", json!(task.supervisor().to_string())),
        ("image", image),
        ("command", json!(command)),
        ("network", json!("host")),
    ] {
        assert_eq!(json!(found[name]), wanted, "{name}: {found:?}");
    }
    assert!(!found.contains_key("addresses"), "{found:?}");
    let handle = String::from_utf8_lossy(&task.stored().driver_state).into_owned();
    for secret in [SECRET, "s3cr"] {
        assert!(!handle.contains(secret), "{handle}");
    }
    plugin.kill().await;
    let plugin = world.recovered(&task).await;
    assert_eq!(attributes(&plugin, &task).await, found);
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
