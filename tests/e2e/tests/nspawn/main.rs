//! Tier (a): the real plugin binary and the real systemd-nspawn. Every option has the effect that `docs/configuration.md` describes, and
//! nothing is lost or left if the plugin dies. Each test gives the reason why the fake is not sufficient.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use dev_agent::{Plugin, TaskEvents, TaskExit};
use e2e::stage::{Namespace, Running, Stage, end, within};
use e2e::{debian, until};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::{Value, json};
use support::wire::Task;

mod credentials;
mod devices;
mod ends;
mod exec;
mod host_devices;
mod inside;
mod interfaces;
mod journal;
mod later_mounts;
mod limits;
mod network;
mod network_modes;
mod own_network;
mod ready;
mod root;
mod system;
mod system_ends;
mod system_network;
mod units;
mod users;
mod volumes;

/// More time than any task needs that exits on request.
const AMPLE: Duration = Duration::from_secs(30);

/// The same small tree with everything below `/usr`, as systemd requires it.
fn merged_tree(stage: &Stage, name: &str) -> PathBuf {
    let tree = stage.tree(name);
    fs::remove_dir(tree.join("usr/bin")).unwrap();
    fs::rename(tree.join("bin"), tree.join("usr/bin")).unwrap();
    symlink("usr/bin", tree.join("bin")).unwrap();
    tree
}

/// A copy of the Debian tree whose unit `e2e.service` runs `start` and, when the system stops, `stop`.
fn debian_tree(stage: &Stage, start: &str, stop: &str) -> PathBuf {
    let tree = stage.join("debian");
    debian::copy(&tree, start, stop);
    tree
}

/// A task that boots this tree.
fn booted(stage: &Stage, tree: &Path) -> Task {
    let task = stage.words(&[]).with("image", json!(tree));
    task.with("boot", true)
}

/// The text of the next event of a task that is about the task, and not about a machine without controllers; `None` once there is no plugin.
async fn next_event(events: &mut TaskEvents) -> Option<String> {
    loop {
        let event = within("the event", events.message()).await;
        let text = event.ok()??.message;
        if !text.starts_with("these limits are not enforced on this node") {
            return Some(text);
        }
    }
}

fn bind(source: &Path, target: &str) -> Value {
    json!([{ (source.to_str().unwrap()): target }])
}

/// systemd-nspawn without the driver, to distinguish limits of this machine from errors of the driver.
fn bare(words: &[&str]) -> Output {
    // Two containers in one cgroup would share its child cgroups, so this one gets a cgroup of its own.
    let group = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(Path::new)
        .into_iter()
        .find(|mount| mount.join("cgroup.procs").exists())
        .expect("cgroup v2")
        .join(format!("bare{}", e2e::unique()));
    fs::create_dir(&group).unwrap();
    let output = Command::new("sh")
        .args(["-c", "echo $$ > \"$0\"/cgroup.procs; exec \"$@\""])
        .arg(&group)
        .args([
            "systemd-nspawn",
            "--settings=no",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
        ])
        .args(words)
        .output()
        .unwrap();
    let named = Path::new("/sys/fs/cgroup/systemd").join(group.file_name().unwrap());
    for group in [group, named] {
        for below in ["payload", "supervisor", ""] {
            let _ = fs::remove_dir(group.join(below));
        }
        assert!(!group.exists(), "{} is left", group.display());
    }
    output
}

// Arguments, streams, processes.

/// Real only: a pseudo terminal of systemd-nspawn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_console_pipe_keeps_the_streams_separate_and_unchanged() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "echo out; echo err >&2; test -t 1 && echo terminal; exit 3";
    for console in [None, Some("pipe"), Some("autopipe")] {
        let mut task = stage.shell(text);
        if let Some(console) = console {
            task = task.with("console", console);
        }
        let ended = stage.run_on(&plugin, task).await;
        let got = (&*ended.stdout, &*ended.stderr, ended.exit.code);
        assert_eq!(got, ("out\n", "err\n", 3), "{console:?}");
    }
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("console", "read-only"))
        .await;
    for word in ["out\r\n", "err\r\n", "terminal\r\n"] {
        assert!(ended.stdout.contains(word), "{ended:?}");
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: in a pid namespace orphans become children of PID 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_two_runs_below_an_init_that_reaps() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    assert_eq!(
        stage.run_on(&plugin, stage.shell("echo $$")).await.said(),
        "1\n"
    );
    let text = "echo $$; (sh -c 'echo $PPID > /tmp/parent; sleep 0.01' &); \
        until test -s /tmp/parent; do sleep 0.01; done; \
        while pgrep sleep >/dev/null; do sleep 0.02; done; exit 5";
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("process_two", true))
        .await;
    assert_eq!((&*ended.stdout, ended.exit.code), ("2\n", 5), "{ended:?}");
    end(plugin).await;
    stage.leave();
}

/// Real only: users are looked up in a real root, and switching to them needs root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_runs_as_the_user_of_the_config_or_of_the_task() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = || stage.words(&["/bin/id", "-un"]);
    let tasks = [
        (task(), "root\n"),
        (task().with("user", "bob"), "bob\n"),
        (task().user("bob"), "bob\n"),
        (task().user("bob").with("user", "root"), "root\n"),
    ];
    for (task, want) in tasks {
        assert_eq!(stage.run_on(&plugin, task).await.said(), want);
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: the directory is in the container's own root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_working_directory_is_where_the_command_starts() {
    let stage = Stage::new();
    let task = stage.words(&["/bin/pwd"]).with("working_directory", "/srv");
    assert_eq!(stage.run(task).await.said(), "/srv\n");
    stage.leave();
}
