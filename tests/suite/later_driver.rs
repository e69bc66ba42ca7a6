//! Starts whose records a later driver wrote, as found after a downgrade. This driver can't release what they acquired, so it ends none of
//! them: the driver that wrote them may be installed again, and recovers them.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nomad_driver_nspawn::state::TaskDir;
use serde_json::{Value, json};
use support::eventually;

use super::*;

const TRAPS: &str = "trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done";
const NOT_REMOVED: &str = "not removed: a later version of this driver started it";

/// A launch spec that has been changed to one of a later driver.
struct Later {
    directory: PathBuf,
    text: Vec<u8>,
}

impl Later {
    fn new(world: &impl World, task: &Running) -> Self {
        let directory = TaskDir::for_task(&world.state(), &task.id)
            .path()
            .to_owned();
        let text = fs::read(directory.join("order")).unwrap();
        let mut order: Value = serde_json::from_slice(&text).unwrap();
        order["form"] = json!(2);
        fs::write(directory.join("order"), order.to_string()).unwrap();
        Self { directory, text }
    }

    /// As if the later driver were installed again: a plugin that knows the records recovers the task, which still runs.
    async fn recover_again(self, world: impl World, mut plugin: Plugin, task: &Running) {
        plugin.kill().await;
        fs::write(self.directory.join("order"), self.text).unwrap();
        let plugin = world.recovered(task).await;
        task.signal(&plugin, "SIGUSR1").await.unwrap();
        assert_eq!(task.wait(&plugin).await.code, 12, "it was ended");
        task.destroy(&plugin).await;
        world.leave(plugin).await;
    }
}

/// A running task whose plugin is dead.
async fn orphan(world: &impl World) -> Running {
    let mut plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(TRAPS)).await;
    plugin.kill().await;
    task
}

/// An agent destroys what it can't recover.
#[rstest]
#[tokio::test]
async fn destroying_a_task_of_a_later_driver_is_refused_and_ends_nothing(world: impl World) {
    let task = orphan(&world).await;
    let later = Later::new(&world, &task);
    let plugin = world.plugin().await;
    let recover = within("RecoverTask", plugin.recover(task.stored())).await;
    let destroy = within("DestroyTask", plugin.destroy(&task.id, true)).await;
    for status in [refusal(recover), refusal(destroy)] {
        for words in [
            "format 2, which is newer than format 1 of this driver",
            "install the driver that wrote it, or remove the directory",
        ] {
            assert!(status.message().contains(words), "{}", status.message());
        }
    }
    later.recover_again(world, plugin, &task).await;
}

#[rstest]
#[tokio::test]
async fn reconciliation_names_a_task_of_a_later_driver_once_and_ends_nothing(world: impl World) {
    let task = orphan(&world).await;
    let later = Later::new(&world, &task);
    let plugin = world
        .plugin_with(&json!({"reconcile_after": "200ms"}))
        .await;
    // Each request shows another directory of allocations, so that the plugin reconciles again.
    for number in 0..3 {
        let half = half_made(&world.state());
        let mut handle = task.stored();
        let config = handle.config.as_mut().unwrap();
        if number > 0 {
            config.alloc_dir = format!("/allocations-{number}/a");
        }
        refusal(within("RecoverTask", plugin.recover(handle)).await);
        eventually("the plugin has reconciled", || !half.exists()).await;
    }
    let path = format!("\"path\":\"{}\"", later.directory.display());
    let lines = world.log().text();
    let lines: Vec<_> = lines.iter().filter(|line| line.contains(&path)).collect();
    assert!(
        lines.len() == 1 && lines[0].contains(NOT_REMOVED) && lines[0].contains("format 2"),
        "{lines:?}"
    );
    later.recover_again(world, plugin, &task).await;
}

/// An incomplete start, which every reconciliation removes.
fn half_made(state: &Path) -> PathBuf {
    let path = state.join("half.0123456789abcdef");
    DirBuilder::new().mode(0o700).create(&path).unwrap();
    path
}

/// Nothing has to be released any more, only the directory is left.
#[rstest]
#[tokio::test]
async fn a_start_that_a_later_driver_has_released_is_removed(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell("echo up; exit 3")).await;
    assert_eq!(task.wait(&plugin).await.code, 3);
    let directory = TaskDir::for_task(&world.state(), &task.id);
    eventually("the release of its resources", || directory.is_freed()).await;
    Later::new(&world, &task);
    let again = world
        .start_in(&plugin, Arc::clone(&task.allocation))
        .await
        .unwrap();
    assert!(!directory.path().exists());
    assert_eq!(again.wait(&plugin).await.code, 3);
    again.destroy(&plugin).await;
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
