//! The environment of the tests of tier (a): its own directory, the real plugin binary started by the development agent that ships with the
//! driver, real containers. Everything in it carries the stage's mark, and [`Stage::leave`] fails the test if anything with the mark is
//! left.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dev_agent::calls::StartedTask;
use dev_agent::{Allocation, HostError, Launch, Plugin, TaskExit, TaskSpec};
use nomad_driver_nspawn::proto::driver;
use serde_json::{Value, json};
use support::Output;
pub use support::within;
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::leftovers::Marks;

/// The environment of one test.
#[derive(Debug)]
pub struct Stage {
    dir: TempDir,
    marks: Marks,
    name: String,
    log: Mutex<mpsc::UnboundedReceiver<String>>,
    sender: mpsc::UnboundedSender<String>,
    left: bool,
}

impl Stage {
    /// A stage with the driver, a small tree and no running process.
    pub fn new() -> Self {
        crate::needs_root();
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new()
            .prefix("nde-")
            .tempdir()
            .expect("a directory");
        for name in ["state", "plugins", "alloc"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        fs::copy(
            crate::driver(),
            dir.path().join("plugins/nomad-driver-nspawn"),
        )
        .expect("a copy of the driver");
        let name = format!("t{}", crate::unique());
        let (sender, log) = mpsc::unbounded_channel();
        let stage = Self {
            marks: Marks::new(dir.path()).named(&name),
            dir,
            name,
            log: Mutex::new(log),
            sender,
            left: false,
        };
        stage.tree("tree");
        stage
    }

    /// A path in its directory.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
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

    /// A plugin with this stage's state directory.
    pub async fn plugin(&self) -> Plugin {
        self.plugin_with(json!({})).await
    }

    /// A plugin with these additional options.
    pub async fn plugin_with(&self, options: Value) -> Plugin {
        let launch = Launch::new(self.join("plugins/nomad-driver-nspawn"));
        self.launch(launch, options).await
    }

    /// A plugin that runs, with all its containers, in a network namespace other than the machine's.
    pub async fn plugin_in(&self, namespace: &Namespace) -> Plugin {
        // Interfaces are also looked up in /sys, so /sys must show the namespace; the cgroup mounts are kept.
        const SCRIPT: &str = "set -e; mkdir \"$1\"; mount --rbind /sys/fs/cgroup \"$1\"; \
            mount -t sysfs sysfs /sys; mount --rbind \"$1\" /sys/fs/cgroup; umount -l \"$1\"; rmdir \"$1\"; exec \"$2\"";
        let mut launch = Launch::new("nsenter");
        let mut file = OsString::from("--net=");
        file.push(namespace.path());
        launch.args = vec![file];
        launch
            .args
            .extend(["unshare", "--mount", "sh", "-c", SCRIPT, "sh"].map(Into::into));
        launch.args.extend([
            self.join("cgroup").into(),
            self.join("plugins/nomad-driver-nspawn").into(),
        ]);
        self.launch(launch, json!({})).await
    }

    /// A plugin started by this shell script, which ends in `exec "$0"`.
    pub async fn plugin_by(&self, script: &str) -> Plugin {
        let mut launch = Launch::new("/bin/sh");
        launch.args = ["-c", script].map(Into::into).into();
        launch
            .args
            .push(self.join("plugins/nomad-driver-nspawn").into());
        self.launch(launch, json!({})).await
    }

    pub(crate) async fn launch(&self, launch: Launch, mut options: Value) -> Plugin {
        options["state_dir"] = json!(self.join("state"));
        let mut launch = launch.set("TMPDIR", self.dir.path());
        launch.log = Some(self.sender.clone());
        within("the plugin's start", async {
            let plugin = Plugin::launch(launch).await.expect("the plugin starts");
            plugin.configure(&options).await.expect("its configuration");
            plugin.healthy().await.expect("a healthy driver");
            plugin
        })
        .await
    }

    /// A task in the small tree that runs this command as PID 1.
    pub fn words(&self, words: &[&str]) -> Task {
        let config = json!({
            "image": self.join("tree"),
            "boot": false,
            "user_namespacing": false,
            "resolv_conf": "off",
            "command": words,
        });
        Task {
            spec: TaskSpec::new(&self.name, config),
            network: None,
        }
    }

    /// A task that runs this shell script.
    pub fn shell(&self, text: &str) -> Task {
        self.words(&["/bin/sh", "-c", text])
    }

    /// A new allocation for this task.
    pub fn allocation(&self, task: &Task) -> Arc<Allocation> {
        self.allocation_of(&task.spec)
    }

    /// A new allocation for this specification.
    pub fn allocation_of(&self, spec: &TaskSpec) -> Arc<Allocation> {
        let parent = self.join("alloc");
        Arc::new(Allocation::create(&parent, spec.clone()).expect("an allocation"))
    }

    /// Starts a task in an allocation of its own; the start must succeed.
    pub async fn start(&self, plugin: &Plugin, task: Task) -> Running {
        let allocation = self.allocation(&task);
        match self.start_in(plugin, &task, allocation).await {
            Ok(running) => running,
            Err(refused) => panic!("{refused:?}\nplugin's log:\n{}", self.log()),
        }
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
        let logs = allocation.open_logs().expect("the logs");
        let (stdout, stderr) = (Output::collect(logs.stdout), Output::collect(logs.stderr));
        let mut config = match plugin.task_config(&allocation).await {
            Ok(config) => config,
            Err(error) => return Err(Refused { error, stderr }),
        };
        config.network_isolation_spec = task.isolation();
        let id = config.id.clone();
        match within("StartTask", plugin.start(config)).await {
            Ok(started) => Ok(Running {
                id,
                started,
                stdout,
                stderr,
                allocation,
            }),
            Err(error) => Err(Refused { error, stderr }),
        }
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

    /// Everything that the plugins have logged since the last call.
    pub fn log(&self) -> String {
        let mut text = String::new();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(line) = log.try_recv() {
            text.push_str(&line);
            text.push('\n');
        }
        text
    }

    /// Ends a test: nothing may be left.
    pub fn leave(mut self) {
        self.left = true;
        self.marks.assert_none_left();
        let state: Vec<_> = fs::read_dir(self.join("state"))
            .expect("the state directory")
            .flatten()
            .map(|entry| entry.path())
            .collect();
        assert!(state.is_empty(), "left in the state directory: {state:?}");
        let plugins = fs::read_dir(self.join("plugins")).expect("the plugin directory");
        assert_eq!(plugins.count(), 1, "something was put beside the plugin");
        let copies: Vec<_> = fs::read_dir(self.dir.path())
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

/// Shuts a plugin down as Nomad does; it must exit without being killed.
pub async fn end(plugin: Plugin) {
    let stopped = within("Shutdown", plugin.shutdown()).await;
    assert!(!stopped.killed, "the plugin had to be killed: {stopped:?}");
}

/// A task to start.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its specification.
    pub spec: TaskSpec,
    /// The group's network namespace.
    pub network: Option<PathBuf>,
}

impl Task {
    /// With this option in the `config` block.
    #[must_use]
    pub fn with(mut self, option: &str, value: impl Into<Value>) -> Self {
        self.spec.config[option] = value.into();
        self
    }

    /// With this variable in the job's `env` block.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.spec.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// As this user.
    #[must_use]
    pub fn user(mut self, name: &str) -> Self {
        self.spec.user = name.to_owned();
        self
    }

    /// In this network namespace of the group.
    #[must_use]
    pub fn network(mut self, path: &Path) -> Self {
        self.network = Some(path.to_owned());
        self
    }

    /// Nomad's message for the network namespace.
    pub fn isolation(&self) -> Option<driver::NetworkIsolationSpec> {
        let path = self.network.as_ref()?;
        Some(driver::NetworkIsolationSpec {
            mode: driver::network_isolation_spec::NetworkIsolationMode::Group.into(),
            path: path.to_string_lossy().into_owned(),
            ..driver::NetworkIsolationSpec::default()
        })
    }
}

/// A task whose start failed.
#[derive(Debug)]
pub struct Refused {
    /// The error.
    pub error: HostError,
    /// The stderr of systemd-nspawn.
    pub stderr: Output,
}

/// A started task.
#[derive(Debug)]
pub struct Running {
    /// The id of this start.
    pub id: String,
    /// The response to StartTask.
    pub started: StartedTask,
    /// Its stdout.
    pub stdout: Output,
    /// Its stderr.
    pub stderr: Output,
    /// Its directories.
    pub allocation: Arc<Allocation>,
}

impl Running {
    /// The driver's state in its handle.
    pub fn state(&self) -> Value {
        let state: Value =
            serde_json::from_slice(&self.started.handle.driver_state).expect("the driver's state");
        state["started"].clone()
    }

    /// The pid of the container's PID 1.
    pub fn leader(&self) -> i64 {
        self.state()["leader"]["pid"].as_i64().expect("a pid")
    }

    /// Waits for its exit.
    pub async fn wait(&self, plugin: &Plugin) -> TaskExit {
        within("WaitTask", plugin.wait(&self.id))
            .await
            .expect("an exit")
    }

    /// Sends it a signal.
    pub async fn signal(&self, plugin: &Plugin, signal: &str) {
        let request = driver::SignalTaskRequest {
            task_id: self.id.clone(),
            signal: signal.to_owned(),
        };
        let mut client = plugin.driver();
        within("SignalTask", client.signal_task(request))
            .await
            .expect("the signal is sent");
    }

    /// Stops it and waits for its exit.
    pub async fn stop(&self, plugin: &Plugin, grace: Duration, signal: &str) -> TaskExit {
        within("StopTask", plugin.stop(&self.id, grace, signal))
            .await
            .expect("a stop");
        self.wait(plugin).await
    }

    /// Waits until it has exited by itself and removes it.
    pub async fn finish(self, plugin: &Plugin) -> Ended {
        let exit = self.wait(plugin).await;
        let (stdout, mut stderr) = (self.stdout.all().await, self.stderr.all().await);
        // systemd-nspawn prints this at the end if /run is not a tmpfs.
        if let Some(start) = stderr.find("Attempted to remove disk file system") {
            let length = stderr[start..].find('\n').map_or(0, |end| end + 1);
            stderr.replace_range(start..start + length, "");
        }
        self.destroy(plugin).await;
        Ended {
            stdout,
            stderr,
            exit,
            allocation: self.allocation,
        }
    }

    /// Destroys it.
    pub async fn destroy(&self, plugin: &Plugin) {
        within("DestroyTask", plugin.destroy(&self.id, true))
            .await
            .expect("it is destroyed");
    }
}

/// A task that has exited by itself and was removed.
#[derive(Debug)]
pub struct Ended {
    /// Everything it printed on stdout.
    pub stdout: String,
    /// Everything it printed on stderr.
    pub stderr: String,
    /// Its exit.
    pub exit: TaskExit,
    /// Its directories.
    pub allocation: Arc<Allocation>,
}

impl Ended {
    /// Its stdout; fails unless it exited successfully.
    #[track_caller]
    pub fn said(&self) -> &str {
        assert_eq!(self.exit.code, 0, "{self:?}");
        assert_eq!(self.exit.error, None, "{self:?}");
        &self.stdout
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

fn ip(words: &[&str]) -> String {
    let output = Command::new("ip")
        .args(words)
        .output()
        .expect("ip is not installed (Debian: iproute2)");
    assert!(output.status.success(), "ip {words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
