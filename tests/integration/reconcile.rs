//! Leftovers of dead plugins are removed once the agent has had time to recover its tasks, and nothing else is.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dev_agent::Plugin;
use nomad_driver_nspawn::cgroup::{Group, Layout};
use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::proto::driver::{TaskConfig, TaskState};
use nomad_driver_nspawn::state::TaskDir;
use serde_json::json;
use support::not_applicable;

use crate::harness::{Host, Running, eventually, is_root, within};
use support::trap::Trap;

const TRAPS: &str = "trap 'echo got; exit 12' USR1; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";

/// A plugin that reconciles soon after its start, or after the last recovery of a task. It has already started a task, so that it knows
/// which tasks belong to its agent.
async fn reconciling(host: &Host) -> Plugin {
    let plugin = host.plugin_with(&json!({"reconcile_after": "200ms"})).await;
    let image = json!(host.tree(&format!("asked-{}", plugin.pid())));
    let task = host.shell("exit 0").named("asked").with("image", image);
    let task = host.start(&plugin, task).await;
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
    plugin
}

/// A task with its own tree, so that several can run at once.
async fn started(host: &Host, plugin: &Plugin, name: &str, script: &str) -> Running {
    let task = host.shell(script).named(name);
    host.up(plugin, task.with("image", json!(host.tree(name))))
        .await
}

fn directory(task: &Running) -> PathBuf {
    task.state(&["state"]).as_str().unwrap().into()
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn supervisor(task: &Running) -> i32 {
    i32::try_from(task.state(&["supervisor", "pid"]).as_i64().unwrap()).unwrap()
}

/// Waits until this directory has been removed and returns the log line.
async fn cleared(host: &Host, directory: &Path) -> String {
    let path = format!("\"path\":\"{}\"", directory.display());
    let line = || {
        let lines = host.log().text();
        let mut of_it = lines.into_iter().filter(|line| line.contains(&path));
        of_it.find(|line| line.contains("removed a"))
    };
    eventually("the start is cleared away", || line().is_some()).await;
    let line = line().unwrap_or_default();
    assert!(!directory.exists(), "{}", directory.display());
    line
}

/// An unfinished start: its removal shows that a plugin has reconciled.
fn half_made(host: &Host) -> PathBuf {
    use std::os::unix::fs::DirBuilderExt;
    let path = host.state().join("half.0123456789abcdef");
    fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
    path
}

/// Gives a file a timestamp of long ago.
fn age(path: &Path) {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    let then = nix::sys::time::TimeSpec::new(1_000_000_000, 0);
    let flags = UtimensatFlags::NoFollowSymlink;
    utimensat(nix::fcntl::AT_FDCWD, path, &then, &then, flags).unwrap();
}

/// A word that only this test uses.
fn unique(host: &Host) -> String {
    let name = host.path().file_name().unwrap().to_string_lossy();
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "")
}

fn state_is_empty(host: &Host) -> bool {
    fs::read_dir(host.state()).unwrap().next().is_none()
}

#[tokio::test]
async fn an_unclaimed_task_is_removed_and_a_recovered_one_stays() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let wanted = started(&host, &plugin, "wanted", TRAPS).await;
    let unwanted = started(&host, &plugin, "unwanted", DEAF).await;
    plugin.kill().await;
    // The delay starts again with a new configuration, so the recovery before that can't come too late.
    let plugin = host.plugin().await;
    within("RecoverTask", plugin.recover(wanted.stored()))
        .await
        .unwrap();
    let mut config = host.config();
    config["reconcile_after"] = json!("200ms");
    within("SetConfig", plugin.configure(&config))
        .await
        .unwrap();
    let line = cleared(&host, &directory(&unwanted)).await;
    assert!(
        line.contains(&unwanted.id) && line.contains("a running container that no agent recovered"),
        "{line}"
    );
    let inspected = wanted.inspect(&plugin).await.unwrap();
    assert_eq!(inspected.task.unwrap().state(), TaskState::Running);
    wanted.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(wanted.wait(&plugin).await.code, 12);
    wanted.destroy(&plugin).await;
    host.quiet(&[plugin.pid()]).await;
    assert!(state_is_empty(&host));
}

#[tokio::test]
async fn an_unclaimed_exit_record_is_removed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "over", "echo up; exit 4").await;
    assert_eq!(task.wait(&plugin).await.code, 4);
    plugin.kill().await;
    host.quiet(&[]).await;
    assert!(directory(&task).exists(), "an end is kept until then");
    let _plugin = reconciling(&host).await;
    let line = cleared(&host, &directory(&task)).await;
    assert!(line.contains("a task that has ended"), "{line}");
}

#[tokio::test]
async fn two_plugins_leave_each_others_tasks_alone() {
    let host = Host::new();
    let first = reconciling(&host).await;
    let running = started(&host, &first, "running", TRAPS).await;
    let over = started(&host, &first, "over", "echo up; exit 5").await;
    assert_eq!(over.wait(&first).await.code, 5);
    let half = half_made(&host);
    let second = reconciling(&host).await;
    cleared(&host, &half).await;
    let other = started(&host, &second, "other", TRAPS).await;
    // A third one reconciles while both are alive.
    let half = half_made(&host);
    let third = reconciling(&host).await;
    eventually("the third has looked", || !half.exists()).await;
    for (task, plugin) in [(&running, &first), (&other, &second)] {
        task.signal(plugin, "SIGUSR1").await.unwrap();
        assert_eq!(task.wait(plugin).await.code, 12);
        task.destroy(plugin).await;
    }
    within("RecoverTask", third.recover(over.stored()))
        .await
        .unwrap();
    assert_eq!(over.wait(&third).await.code, 5, "its end is still known");
    over.destroy(&third).await;
    assert!(state_is_empty(&host));
}

#[tokio::test]
async fn a_container_whose_supervisor_was_killed_is_removed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", DEAF).await;
    plugin.kill().await;
    kill(supervisor(&task));
    let _plugin = reconciling(&host).await;
    cleared(&host, &directory(&task)).await;
    host.quiet(&[_plugin.pid()]).await;
}

#[tokio::test]
async fn a_supervisor_without_records_is_killed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", DEAF).await;
    plugin.kill().await;
    fs::remove_dir_all(directory(&task)).unwrap();
    let plugin = reconciling(&host).await;
    let line = host.log().contains("ended a supervisor").await;
    assert!(
        line.contains(directory(&task).to_str().unwrap())
            && line.contains(&supervisor(&task).to_string()),
        "{line}"
    );
    host.quiet(&[plugin.pid()]).await;
    assert!(state_is_empty(&host));
}

/// Only the command line of the supervisor shows which task it belongs to.
#[tokio::test]
async fn an_unrecorded_stopped_supervisor_can_be_destroyed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let mut trap = Trap::at(&host.state(), Failpoint::CgroupMade);
    let agent = async {
        let (_, supervisor) = within("the step", trap.reached()).await;
        let supervisor = nix::unistd::Pid::from_raw(supervisor);
        nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGSTOP).unwrap();
        kill(plugin.pid());
    };
    let start = host.try_start(&plugin, host.shell("exit 9"));
    let (refused, ()) = tokio::join!(start, agent);
    refused.unwrap_err();
    drop(trap);
    plugin.kill().await;
    let start = fs::read_dir(host.state()).unwrap().next().unwrap().unwrap();
    let id = TaskDir::new(start.path()).launch_spec().unwrap().id;
    let plugin = host.plugin().await;
    within("DestroyTask", plugin.destroy(&id, true))
        .await
        .unwrap();
    host.quiet(&[plugin.pid()]).await;
    assert!(state_is_empty(&host));
}

/// Only the kernel still knows about the container.
#[tokio::test]
async fn a_container_without_supervisor_and_records_is_killed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", DEAF).await;
    plugin.kill().await;
    kill(supervisor(&task));
    fs::remove_dir_all(directory(&task)).unwrap();
    if !is_root() {
        // Without cgroups it can't be distinguished from other containers: the test itself has to kill it.
        kill(task.leader());
        return host.quiet(&[]).await;
    }
    let plugin = reconciling(&host).await;
    // Leftover cgroups of plugins running in parallel may be removed first.
    let group = task.state(&["cgroup"]).as_str().unwrap().to_owned();
    host.log().contains(&format!("\"path\":\"{group}\"")).await;
    host.quiet(&[plugin.pid()]).await;
    assert!(host.groups().iter().all(|group| !group.exists()));
}

/// The same below a cgroup that Nomad has created for the task, where other cgroups exist too.
#[tokio::test]
async fn a_container_without_records_is_killed_in_nomads_cgroup_too() {
    let Some(tracking) = Layout::of_this_host().tracking.filter(|_| is_root()) else {
        return not_applicable("a control group needs root");
    };
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let granted = tracking.join(format!("{}.scope", unique(&host)));
    let foreign = granted.join("foreign.0123456789abcdef");
    fs::create_dir_all(&foreign).unwrap();
    age(&foreign);
    let allocation = Arc::new(host.allocation(host.shell(DEAF)));
    let grant = |task: &mut TaskConfig| {
        let linux = &mut task.resources.get_or_insert_default().linux_resources;
        linux.get_or_insert_default().cpuset_cgroup = granted.to_str().unwrap().to_owned();
    };
    let task = host.start_edited(&plugin, allocation, grant).await.unwrap();
    task.stdout.contains("up").await;
    let group = PathBuf::from(task.state(&["cgroup"]).as_str().unwrap());
    assert_eq!(group.parent(), Some(&*granted));
    plugin.kill().await;
    kill(supervisor(&task));
    fs::remove_dir_all(directory(&task)).unwrap();
    let plugin = reconciling(&host).await;
    host.quiet(&[plugin.pid()]).await;
    eventually("the group is gone", || !group.exists()).await;
    fs::remove_dir(foreign).unwrap();
    fs::remove_dir(granted).unwrap();
}

#[tokio::test]
async fn an_unreadable_launch_spec_is_removed_with_its_container() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", DEAF).await;
    plugin.kill().await;
    kill(supervisor(&task));
    fs::write(directory(&task).join("order"), "{\"id\":").unwrap();
    let plugin = reconciling(&host).await;
    let line = cleared(&host, &directory(&task)).await;
    assert!(line.contains("can't be read"), "{line}");
    host.quiet(&[plugin.pid()]).await;
}

#[tokio::test]
async fn a_start_of_another_boot_is_removed() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", "echo up; exit 6").await;
    task.wait(&plugin).await;
    plugin.kill().await;
    host.quiet(&[]).await;
    let path = directory(&task).join("order");
    let mut order: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    order["boot"] = json!("00000000-0000-0000-0000-000000000000");
    fs::write(&path, order.to_string()).unwrap();
    let _plugin = reconciling(&host).await;
    let line = cleared(&host, &directory(&task)).await;
    assert!(line.contains("another boot"), "{line}");
}

#[tokio::test]
async fn foreign_files_are_reported_once_and_kept() {
    let host = Host::new();
    let outside = host.join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("order"), "{}").unwrap();
    let foreign = [
        "note",
        "else",
        "x.0123456789abcdef",
        "link.0123456789abcdef",
    ];
    let [note, dir, like, link] = foreign.map(|name| host.state().join(name));
    fs::write(&note, "").unwrap();
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&like).unwrap();
    fs::write(like.join("exit"), "{}").unwrap();
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    let half = half_made(&host);
    let plugin = reconciling(&host).await;
    cleared(&host, &half).await;
    for path in [
        &note,
        &dir,
        &like.join("exit"),
        &link,
        &outside.join("order"),
    ] {
        assert!(path.symlink_metadata().is_ok(), "{}", path.display());
    }
    for path in [&note, &dir, &like, &link] {
        let name = format!("\"path\":\"{}\"", path.display());
        let lines = host.log().text();
        let lines: Vec<_> = lines.iter().filter(|line| line.contains(&name)).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains("warn") && lines[0].contains("did not make it"),
            "{lines:?}"
        );
    }
    assert!(!plugin.has_exited());
}

#[tokio::test]
async fn reconcile_after_0_disables_reconciliation() {
    let host = Host::new();
    let half = half_made(&host);
    let never = host.plugin_with(&json!({"reconcile_after": "0"})).await;
    // A plugin that does reconcile shows that there was something to remove.
    let task = started(&host, &never, "task", "echo up; exit 7").await;
    assert_eq!(task.wait(&never).await.code, 7);
    task.destroy(&never).await;
    assert!(half.exists());
    let _plugin = reconciling(&host).await;
    cleared(&host, &half).await;
}

#[tokio::test]
async fn the_socket_of_a_killed_plugin_is_removed() {
    let host = Host::new();
    let mut dead = host.plugin().await;
    let socket = dead.address().to_owned();
    dead.kill().await;
    assert!(socket.exists());
    let living = host.plugin().await;
    let line = host.log().contains("removed the socket").await;
    assert!(line.contains(socket.to_str().unwrap()), "{line}");
    assert!(!socket.exists());
    let another = host.plugin().await;
    for plugin in [&living, &another] {
        assert!(plugin.address().exists());
        Plugin::reattach(plugin.address(), plugin.pid())
            .await
            .unwrap();
    }
}

/// Of the driver's cgroups without records only those are removed that are empty and old.
#[tokio::test]
async fn an_old_empty_cgroup_is_removed() {
    if !is_root() {
        return not_applicable("a control group needs root");
    }
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = started(&host, &plugin, "task", "echo up; exit 8").await;
    let group = PathBuf::from(task.state(&["cgroup"]).as_str().unwrap());
    task.wait(&plugin).await;
    plugin.kill().await;
    host.quiet(&[]).await;
    let unique = unique(&host);
    let named = |hash: &str| group.with_file_name(format!("{unique}.{hash}"));
    let (old, young) = (named("00000000000000aa"), named("00000000000000bb"));
    let foreign = group.with_file_name(format!("{unique}-foreign"));
    for group in [&old, &young, &foreign] {
        // Another test may be removing the empty parent at this moment.
        Group::new(group).create().unwrap();
    }
    age(&old);
    age(&foreign);
    let _plugin = reconciling(&host).await;
    // It belongs to no state directory, so any plugin on the machine may remove it.
    eventually("the old group is gone", || !old.exists()).await;
    for spared in [&young, &foreign] {
        fs::remove_dir(spared).unwrap();
    }
    let _ = fs::remove_dir(group.parent().unwrap());
}
