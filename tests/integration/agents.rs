//! Several Nomad agents on one state directory: no plugin ends a task that another agent may recover, and every plugin still removes its
//! own agent's leftovers.

use std::fs;
use std::path::{Path, PathBuf};

use dev_agent::Plugin;
use serde_json::{Value, json};

use crate::harness::{Host, Running, eventually};

const HEARS: &str = "trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done";

/// A plugin of this host's agent that reconciles a state directory soon after its start.
async fn reconciling(host: &Host, state_dir: &Path) -> Plugin {
    host.plugin_with(&json!({"reconcile_after": "100ms", "state_dir": state_dir}))
        .await
}

/// A running task whose agent and plugin have ended.
async fn left(host: &Host) -> Running {
    let mut plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(HEARS)).await;
    plugin.kill().await;
    task
}

/// A short task that shows a plugin where its agent keeps its allocations.
async fn asked(host: &Host, plugin: &Plugin) {
    let task = host.shell("exit 0").named("asked");
    let task = host
        .start(plugin, task.with("image", json!(host.tree("asked"))))
        .await;
    task.wait(plugin).await;
    task.destroy(plugin).await;
}

fn directory(task: &Running) -> PathBuf {
    task.state(&["state"]).as_str().unwrap().into()
}

/// The next line of a host's log about this start.
async fn said_of(host: &Host, task: &Running) -> String {
    let path = format!("\"path\":\"{}\"", directory(task).display());
    host.log().contains(&path).await
}

/// The task keeps running, and its own agent can recover it.
async fn lives(host: &Host, task: &Running) {
    let plugin = host.recovered(task).await;
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
}

fn edit_order(task: &Running, edit: impl FnOnce(&mut Value)) {
    let path = directory(task).join("order");
    let mut order = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut order);
    fs::write(&path, order.to_string()).unwrap();
}

#[tokio::test]
async fn a_second_agent_on_the_state_directory_ends_no_task_of_the_first() {
    let (first, second) = (Host::new(), Host::new());
    let task = left(&first).await;
    let plugin = reconciling(&second, &first.state()).await;
    asked(&second, &plugin).await;
    let warnings = || {
        let lines = second.log().text();
        let of_another = |line: &&String| line.contains("it belongs to another Nomad agent");
        lines.iter().filter(of_another).cloned().collect::<Vec<_>>()
    };
    eventually("a line about the first agent's task", || {
        let path = directory(&task).display().to_string();
        let text = second.log().text().join("\n");
        text.contains("removed a") || warnings().iter().any(|line| line.contains(&path))
    })
    .await;
    let root = first.join("alloc").display().to_string();
    let said = warnings();
    assert_eq!(said.len(), 1, "{:?}", second.log().text());
    assert!(
        said[0].contains(&root) && said[0].contains("remove this directory"),
        "{said:?}"
    );
    lives(&first, &task).await;
}

#[tokio::test]
async fn before_its_first_task_an_agent_removes_no_leftovers() {
    let host = Host::new();
    let task = left(&host).await;
    let plugin = reconciling(&host, &host.state()).await;
    let line = said_of(&host, &task).await;
    assert!(
        line.contains("not removed yet: the first task of this agent"),
        "{line}"
    );
    assert!(directory(&task).exists());
    asked(&host, &plugin).await;
    host.log().contains("removed a running container").await;
    eventually("the record is gone", || !directory(&task).exists()).await;
    host.quiet(&[plugin.pid()]).await;
}

#[tokio::test]
async fn a_task_whose_allocation_was_removed_belongs_to_no_agent() {
    let (first, second) = (Host::new(), Host::new());
    let task = left(&first).await;
    fs::remove_dir_all(task.allocation.dir()).unwrap();
    let _plugin = reconciling(&second, &first.state()).await;
    let line = said_of(&second, &task).await;
    assert!(line.contains("removed a"), "{line}");
    first.quiet(&[]).await;
}

#[tokio::test]
async fn launch_specs_of_older_drivers_belong_to_the_agent_of_their_fifos() {
    let (first, second) = (Host::new(), Host::new());
    let task = left(&first).await;
    edit_order(&task, |order| {
        order.as_object_mut().unwrap().remove("alloc_dir").unwrap();
    });
    let plugin = reconciling(&second, &first.state()).await;
    asked(&second, &plugin).await;
    let line = second
        .log()
        .contains("it belongs to another Nomad agent")
        .await;
    assert!(
        line.contains(&directory(&task).display().to_string()),
        "{line}"
    );
    let plugin = reconciling(&first, &first.state()).await;
    asked(&first, &plugin).await;
    first.log().contains("removed a running container").await;
    first.quiet(&[plugin.pid()]).await;
}

#[tokio::test]
async fn a_launch_spec_without_an_agent_is_left_alone() {
    let host = Host::new();
    let task = left(&host).await;
    edit_order(&task, |order| {
        for name in ["alloc_dir", "stdout", "stderr"] {
            order[name] = Value::Null;
        }
    });
    let plugin = reconciling(&host, &host.state()).await;
    asked(&host, &plugin).await;
    let line = said_of(&host, &task).await;
    assert!(line.contains("does not say which Nomad agent"), "{line}");
    drop(plugin);
    lives(&host, &task).await;
}
