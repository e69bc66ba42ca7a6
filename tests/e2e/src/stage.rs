//! The environment of the tests of tier (a): its own directory, the real plugin binary started by the development agent that ships with the
//! driver, real containers. Everything in it carries the stage's mark, and [`Stage::leave`] fails the test if anything with the mark is
//! left.

use std::ffi::OsString;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dev_agent::{Allocation, Launch, Plugin};
use nix::sched::{CloneFlags, setns};
use nomad_driver_nspawn::proto::driver::TaskConfig;
use serde_json::{Value, json};
use support::not_applicable;
pub use support::wire::{Ended, Fixture, Need, Refused, Running, Task, World, end};
pub use support::within;

use crate::DEADLINE;
use crate::leftovers::Marks;

/// The environment of one test.
#[derive(Debug)]
pub struct Stage {
    fixture: Fixture,
    marks: Marks,
    name: String,
    left: bool,
}

impl Deref for Stage {
    type Target = Fixture;

    fn deref(&self) -> &Fixture {
        &self.fixture
    }
}

impl World for Stage {
    fn lacks(&self, need: Need) -> Option<&'static str> {
        match need {
            // A stage can't be made without root.
            Need::Root | Need::MountNamespace => None,
        }
    }

    fn tree(&self, name: &str) -> PathBuf {
        Self::tree(self, name)
    }

    fn use_version(&self, version: u32, all: &[u32]) -> Result<u32, String> {
        let installed = crate::nspawn_version();
        let counts_as = all.iter().rfind(|one| **one <= installed);
        if counts_as == Some(&version) {
            return Ok(installed);
        }
        Err(format!(
            "needs systemd-nspawn {version}, this is {installed}"
        ))
    }

    fn use_init(&self, _: u32, ends: &Value) -> bool {
        if !ends.is_null() {
            not_applicable("a first process can't be made to end by any code and signal");
            return false;
        }
        let init = self.join("tree/sbin/init");
        fs::create_dir_all(self.join("tree/sbin")).expect("a directory");
        fs::write(&init, "#!/bin/sh\nexec sleep 1000\n").expect("an init");
        fs::set_permissions(init, fs::Permissions::from_mode(0o755)).expect("an init");
        true
    }

    fn gate(&self) -> (PathBuf, String) {
        (self.join("tree/srv/gate"), "/srv/gate".to_owned())
    }

    fn nspawn_opens(&self, target: &str) -> bool {
        const KINDS: &[&str] = &[
            "socket",
            "eventpoll",
            "signalfd",
            "eventfd",
            "pipe",
            "pidfd",
        ];
        KINDS.contains(&target)
            || Path::new(target) == self.join(".#tree.lck")
            || target.starts_with("/run/systemd/nspawn/locks/")
            // From 257 on: the container's kernel log.
            || target.starts_with("/run/.#proc-kmsg")
            // The same: the root directory, and in cgroup v2 the memory pressure of its own cgroup.
            || target == "/"
            || target.ends_with("/supervisor/memory.pressure")
    }

    async fn is_clean(&self, plugin: &Plugin) {
        let own = format!("process {} ", plugin.pid());
        let left = || {
            let recorded = support::starts_in(&self.state()).into_iter();
            let recorded = recorded.map(|path| format!("record {}", path.display()));
            let mut left = self.marks.left();
            left.retain(|line| !line.starts_with(&own));
            left.extend(recorded);
            left
        };
        let end = Instant::now() + DEADLINE;
        let mut found = left();
        while !found.is_empty() {
            assert!(Instant::now() < end, "left on the machine: {found:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
            found = left();
        }
    }

    fn unused(self) {
        Self::leave(self);
    }

    async fn leave(self, plugin: Plugin) {
        self.is_clean(&plugin).await;
        end(plugin).await;
        Self::leave(self);
    }
}

impl Stage {
    /// A stage with the driver, a small tree and no running process.
    pub fn new() -> Self {
        crate::needs_root();
        let dir = Fixture::directory("nde-", &[]);
        let plugin = dir.path().join("plugins/nomad-driver-nspawn");
        crate::install(&crate::driver(), &plugin);
        let name = format!("t{}", crate::unique());
        let marks = Marks::new(dir.path()).named(&name);
        let fixture = Fixture::new(dir, Launch::new(plugin), &name, "tree");
        let stage = Self {
            marks,
            fixture: fixture.for_every_task("resolv_conf", "off").healthy(),
            name,
            left: false,
        };
        stage.tree("tree");
        stage
    }

    /// A name that only this stage uses: the name of its tasks and the prefix of their machine names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The marks of this stage.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Creates another small tree.
    pub fn tree(&self, name: &str) -> PathBuf {
        let tree = self.join(name);
        fs::create_dir(&tree).expect("the tree");
        crate::busybox_tree(&tree);
        tree
    }

    /// Creates a file with this text.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, text).expect("the file");
        path
    }

    /// A plugin that runs, with all its containers, in a network namespace other than the machine's.
    pub async fn plugin_in(&self, namespace: &Namespace) -> Plugin {
        self.plugin_in_with(namespace, &json!({})).await
    }

    /// The same with these options.
    pub async fn plugin_in_with(&self, namespace: &Namespace, options: &Value) -> Plugin {
        self.plugin_seeing("rw", namespace, options).await
    }

    /// The same for containers that use interfaces of the host. systemd-nspawn refuses one that udev has not seen, unless `/sys` is
    /// read-only; the machine may have no udev.
    pub async fn plugin_for_interfaces(&self, namespace: &Namespace) -> Plugin {
        self.plugin_seeing("ro", namespace, &json!({})).await
    }

    async fn plugin_seeing(&self, sys: &str, namespace: &Namespace, options: &Value) -> Plugin {
        // Interfaces are also looked up in /sys, so /sys must show the namespace; the cgroup mounts are kept.
        const SCRIPT: &str = "set -e; mkdir \"$1\"; mount --rbind /sys/fs/cgroup \"$1\"; \
            mount -t sysfs -o \"$3\" sysfs /sys; mount --rbind \"$1\" /sys/fs/cgroup; umount -l \"$1\"; rmdir \"$1\"; exec \"$2\"";
        let mut launch = self.fixture.launch();
        launch.binary = "nsenter".into();
        let mut file = OsString::from("--net=");
        file.push(namespace.path());
        launch.args = vec![file];
        launch
            .args
            .extend(["unshare", "--mount", "sh", "-c", SCRIPT, "sh"].map(Into::into));
        launch.args.extend([
            self.join("cgroup").into(),
            self.join("plugins/nomad-driver-nspawn").into(),
            sys.into(),
        ]);
        self.launched(launch, options).await
    }

    /// A task in the small tree that runs this command as PID 1.
    pub fn words(&self, words: &[&str]) -> Task {
        self.task(words)
    }

    /// A new allocation for this task.
    pub fn allocation(&self, task: &Task) -> Arc<Allocation> {
        Arc::new(self.fixture.allocation(task.clone()))
    }

    /// Starts a task that must be refused; returns the error.
    pub async fn refused(&self, plugin: &Plugin, task: Task) -> String {
        let allocation = self.allocation(&task);
        match self.start_in(plugin, &task, allocation).await {
            Ok(running) => panic!("{} has started", running.id),
            Err(refused) => refused.error.to_string(),
        }
    }

    /// Starts the task of this allocation.
    pub async fn start_in(
        &self,
        plugin: &Plugin,
        task: &Task,
        allocation: Arc<Allocation>,
    ) -> Result<Running, Refused> {
        let edit = |config: &mut TaskConfig| config.network_isolation_spec = task.isolation();
        self.start_edited(plugin, allocation, edit).await
    }

    /// Runs a task that exits by itself, on a plugin of its own.
    pub async fn run(&self, task: Task) -> Ended {
        let plugin = self.plugin().await;
        let ended = self.run_on(&plugin, task).await;
        end(plugin).await;
        ended
    }

    /// The same on an existing plugin.
    pub async fn run_on(&self, plugin: &Plugin, task: Task) -> Ended {
        let running = self.start(plugin, task).await;
        running.finish(plugin).await
    }

    /// Everything that the plugins have logged so far.
    pub fn log(&self) -> String {
        self.fixture.log().text().join("\n")
    }

    /// Ends a test: nothing may be left.
    pub fn leave(mut self) {
        self.left = true;
        self.marks.assert_none_left();
        let state = support::starts_in(&self.join("state"));
        assert!(state.is_empty(), "left in the state directory: {state:?}");
        let plugins = fs::read_dir(self.join("plugins")).expect("the plugin directory");
        assert_eq!(plugins.count(), 1, "something was put beside the plugin");
        let copies: Vec<_> = fs::read_dir(self.path())
            .expect("the stage")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(".#"))
            .collect();
        assert!(copies.is_empty(), "left beside the trees: {copies:?}");
    }
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.marks.kill();
        } else {
            assert!(self.left, "the test has to end with Stage::leave");
        }
    }
}

/// A network namespace of one test, with nothing in it but a loopback device that is up. Its processes and interfaces never touch the
/// machine's network.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates one with this name.
    pub fn new(name: &str) -> Self {
        let namespace = Self {
            name: name.to_owned(),
        };
        ip(&["netns", "add", name]);
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that represents it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` in it and returns its output.
    pub fn ip(&self, words: &[&str]) -> String {
        let mut all = vec!["-netns", &*self.name];
        all.extend(words);
        ip(&all)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]);
    }
}

/// Calls it in the network namespace of this file. What it starts is there too.
pub fn within_network<T: Send>(path: &Path, call: impl FnOnce() -> T + Send) -> T {
    let file = fs::File::open(path).expect("the network namespace");
    let enter = move || {
        setns(file, CloneFlags::CLONE_NEWNET).expect("the network namespace");
        call()
    };
    match thread::scope(|scope| scope.spawn(enter).join()) {
        Ok(returned) => returned,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn ip(words: &[&str]) -> String {
    let output = Command::new("ip")
        .args(words)
        .output()
        .expect("ip is not installed (Debian: iproute2)");
    assert!(output.status.success(), "ip {words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
