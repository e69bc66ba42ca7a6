//! The environment of every hermetic test: its own directory with fake tools, a small root tree and allocations, and the real plugin binary
//! started by the development agent that ships with the driver. Tests share nothing and run in parallel. At the end of a test its [`Host`]
//! looks for leftover processes and cgroups and fails the test if there are any.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_agent::{Launch, Plugin};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nomad_driver_nspawn::cgroup::{Group, Layout};
use nomad_driver_nspawn::proto::driver::TaskConfig;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

mod output;

pub(crate) use output::Written;
pub(crate) use support::wire::{Fixture, Need, Refused, Running, Task, World, end, refusal};
pub(crate) use support::{DEADLINE, eventually, within};

/// How long processes that are about to exit may take before they count as leftovers.
const OUTGOING: Duration = Duration::from_secs(20);

/// Whether the tests run as root. Without root there are no cgroups, and the driver's fingerprint is "undetected".
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The arguments of a call in the call log.
pub(crate) fn argv(start: &Value) -> Vec<String> {
    serde_json::from_value(start["argv"].clone()).unwrap()
}

/// The machine of one test.
#[derive(Debug)]
pub(crate) struct Host {
    fixture: Fixture,
}

impl Deref for Host {
    type Target = Fixture;

    fn deref(&self) -> &Fixture {
        &self.fixture
    }
}

impl Host {
    /// A plugin for tasks with networks that the driver makes. Without root it makes none.
    pub(crate) async fn plugin_in_new_network(&self) -> Plugin {
        match is_root() {
            true => self.plugin_by("exec unshare --net \"$0\"").await,
            false => self.plugin().await,
        }
    }
}

impl World for Host {
    fn lacks(&self, need: Need) -> Option<&'static str> {
        match need {
            Need::Root => (!is_root()).then_some("needs root"),
            Need::MountNamespace => Some("needs a real container: the fake mounts nothing"),
        }
    }

    fn tree(&self, name: &str) -> PathBuf {
        Self::tree(self, name)
    }

    fn use_version(&self, version: u32, _: &[u32]) -> Result<u32, String> {
        self.scenario(&json!({ "version": version }));
        Ok(version)
    }

    fn use_init(&self, version: u32, ends: &Value) -> bool {
        self.scenario(&json!({ "version": version, "calls": [{ "instead": ends }] }));
        true
    }

    fn gate(&self) -> (PathBuf, String) {
        let gate = self.join("gate");
        (gate.clone(), gate.display().to_string())
    }

    fn nspawn_opens(&self, target: &str) -> bool {
        let own = ["signalfd", "pipe"].contains(&target);
        own || [".#root.lck", "bin/ledger.jsonl"]
            .map(|name| self.join(name))
            .iter()
            .any(|file| Path::new(target) == file)
    }

    async fn is_clean(&self, plugin: &Plugin) {
        self.quiet(&[plugin.pid()]).await;
        let empty = || support::starts_in(&self.state()).is_empty();
        eventually("the state directory is empty", empty).await;
        for group in self.groups() {
            eventually("the control group is gone", || !group.exists()).await;
        }
    }

    fn unused(self) {}

    async fn leave(self, plugin: Plugin) {
        self.is_clean(&plugin).await;
        end(plugin).await;
    }
}

impl Host {
    /// A healthy machine with an image named `root`.
    pub(crate) fn new() -> Self {
        let dir = Fixture::directory("nd-", &["bin"]);
        let bin = dir.path().join("bin");
        let nspawn = bin.join("systemd-nspawn");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fake-nspawn"), &nspawn).unwrap();
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let mut launch = Launch::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn")).set("PATH", path);
        launch.start_timeout = DEADLINE;
        let fixture = Fixture::new(dir, launch, "web", "root");
        let host = Self {
            fixture: fixture.configured("nspawn_path", json!(nspawn)),
        };
        host.tree("root");
        host
    }

    /// The root tree of tasks that name no other.
    pub(crate) fn root(&self) -> PathBuf {
        self.join("root")
    }

    /// Creates a small root tree of this name, complete enough for systemd-nspawn, with an init.
    pub(crate) fn tree(&self, name: &str) -> PathBuf {
        let root = self.join(name);
        fill_tree(&root);
        root
    }

    /// Sets the scenario of the fake tools from now on, in the format of their `scenario.rs`.
    pub(crate) fn scenario(&self, scenario: &Value) {
        let path = self.join("bin/scenario.json");
        fs::write(self.join("bin/scenario.new"), scenario.to_string()).unwrap();
        // Renamed, so that a tool that runs at this moment reads either the old one or the new one.
        fs::rename(self.join("bin/scenario.new"), path).unwrap();
    }

    /// All events that the fake tools have logged so far, in order.
    pub(crate) fn call_log(&self) -> Vec<Value> {
        let text = match fs::read_to_string(self.join("bin/ledger.jsonl")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => panic!("ledger: {error}"),
        };
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The calls of systemd-nspawn that were starts, in order.
    pub(crate) fn starts(&self) -> Vec<Value> {
        let mut events = self.call_log();
        events.retain(|event| event["event"] == "call" && event["number"].is_u64());
        events
    }

    /// Starts this task with these bytes as its `config` block.
    pub(crate) async fn start_packed(
        &self,
        plugin: &Plugin,
        task: Task,
        config: Vec<u8>,
    ) -> Result<Running, Refused> {
        let allocation = Arc::new(self.allocation(task));
        let edit = |task: &mut TaskConfig| task.msgpack_driver_config = config;
        self.start_edited(plugin, allocation, edit).await
    }

    /// Waits until no process of this test is left, except the pids in `spared`.
    pub(crate) async fn quiet(&self, spared: &[i32]) {
        let others = || {
            self.processes()
                .into_iter()
                .filter(|found| !spared.contains(&found.pid))
        };
        eventually("everything has ended", || others().next().is_none()).await;
    }

    /// The cgroups that exist for the starts of this test, in every hierarchy.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        let mut leaves = BTreeSet::new();
        for start in self.starts() {
            let text = start["cgroup"].as_str().unwrap();
            let groups = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
            let below = groups.filter_map(|group| group.split_once("nomad-driver-nspawn/"));
            let leaf = |(_, below): (&str, &str)| below.split('/').next().unwrap().to_owned();
            leaves.extend(below.map(leaf));
        }
        match leaves.is_empty() {
            true => Vec::new(),
            false => Layout::of_this_host().leaves(|name| leaves.contains(name)),
        }
    }

    /// The processes of this test: its directory is in their arguments, environment or working directory.
    pub(crate) fn processes(&self) -> Vec<Found> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            if let Some(one) = Found::of(pid, self.path()) {
                found.push(one);
            }
        }
        found
    }
}

/// Creates a small root tree that is complete enough for systemd-nspawn, with an init.
pub(crate) fn fill_tree(root: &Path) {
    for path in [
        "usr/bin",
        "usr/lib/systemd",
        "etc",
        "var",
        "tmp",
        "root",
        "proc",
        "sys",
        "dev",
        "run",
    ] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib")] {
        std::os::unix::fs::symlink(target, root.join(link)).unwrap();
    }
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(root.join("etc/resolv.conf"), "").unwrap();
    fs::write(root.join("etc/os-release"), "ID=test\nVERSION_ID=1\n").unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").unwrap();
    for tool in ["usr/bin/sh", "usr/lib/systemd/systemd"] {
        fs::write(root.join(tool), "#!/bin/sh\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(root.join(tool), mode).unwrap();
    }
    std::os::unix::fs::symlink("usr/lib/systemd/systemd", root.join("init")).unwrap();
}

impl Drop for Host {
    fn drop(&mut self) {
        let patience = if std::thread::panicking() {
            Duration::ZERO
        } else {
            OUTGOING
        };
        let end = Instant::now() + patience;
        let mut left = Vec::new();
        for process in self.processes() {
            if !process.gone(end.saturating_duration_since(Instant::now())) {
                // An error means that it has exited meanwhile.
                let _ = pidfd_send_signal(&process.pidfd, Signal::KILL);
                process.gone(OUTGOING);
                left.push(process.command);
            }
        }
        // The cgroups of processes killed here would not be removed otherwise.
        for group in self.groups() {
            if group.exists() && Group::new(&group).remove().is_ok() {
                left.push(format!("(control group) {}", group.display()));
            }
        }
        assert!(
            left.is_empty() || std::thread::panicking(),
            "processes were left:\n{}\nplugin's log:\n{}",
            left.join("\n"),
            self.log().text().join("\n")
        );
    }
}

/// A process of this test, held by a pidfd so that its pid can't be reused.
#[derive(Debug)]
pub(crate) struct Found {
    /// Its pid.
    pub(crate) pid: i32,
    /// Its arguments.
    pub(crate) command: String,
    pidfd: OwnedFd,
}

impl Found {
    fn of(pid: i32, dir: &Path) -> Option<Self> {
        if pid == std::process::id().cast_signed() {
            return None;
        }
        // Opened before reading /proc: what is read afterwards belongs to this process, or it has exited.
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let environment = String::from_utf8_lossy(&read("environ")).into_owned();
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let name = dir.to_string_lossy();
        let ours = command.contains(&*name) || environment.contains(&*name) || cwd.starts_with(dir);
        ours.then_some(Self {
            pid,
            command,
            pidfd,
        })
    }

    /// Waits until it has exited.
    fn gone(&self, wait: Duration) -> bool {
        let end = Instant::now() + wait;
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match poll(&mut fds, PollTimeout::try_from(left).unwrap()) {
                // SIGCHLD, which tokio handles, may have been delivered to this thread.
                Err(nix::Error::EINTR) => {}
                ready => return matches!(ready, Ok(1..)),
            }
        }
    }
}

/// The environment of a call in the call log.
pub(crate) fn environment(start: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(start["environment"].clone()).unwrap()
}
