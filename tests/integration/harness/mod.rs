//! The environment of every hermetic test: its own directory with fake tools, a small root tree and allocations, and the real plugin binary
//! started by the development agent that ships with the driver. Tests share nothing and run in parallel. At the end of a test its [`Host`]
//! looks for leftover processes and cgroups and fails the test if there are any.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dev_agent::calls::StartedTask;
use dev_agent::{Allocation, HostError, Launch, Plugin, TaskExit, TaskSpec};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nomad_driver_nspawn::cgroup::Group;
use nomad_driver_nspawn::proto::driver::{
    InspectTaskRequest, InspectTaskResponse, SignalTaskRequest, TaskConfig, TaskHandle,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

mod output;

pub(crate) use output::{Lines, Written};
pub(crate) use support::{DEADLINE, Output, eventually, within};

/// How long processes that are about to exit may take before they count as leftovers.
const OUTGOING: Duration = Duration::from_secs(20);

/// Whether the tests run as root. Without root there are no cgroups, and the driver's fingerprint is "undetected".
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The status of a call that failed.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, HostError>) -> tonic::Status {
    match result.unwrap_err() {
        HostError::Call { status, .. } => *status,
        other => panic!("not refused by the plugin: {other}"),
    }
}

/// The arguments of a call in the call log.
pub(crate) fn argv(start: &Value) -> Vec<String> {
    serde_json::from_value(start["argv"].clone()).unwrap()
}

/// The machine of one test.
#[derive(Debug)]
pub(crate) struct Host {
    dir: TempDir,
    log: Lines,
}

impl Host {
    /// A healthy machine with an image named `root`.
    pub(crate) fn new() -> Self {
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new().prefix("nd-").tempdir().unwrap();
        for name in ["bin", "state", "plugins", "alloc"] {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            // The mode of an operator's mkdir, whatever the umask of the test is.
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(path, mode).unwrap();
        }
        let link = dir.path().join("bin/systemd-nspawn");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fake-nspawn"), link).unwrap();
        let host = Self {
            dir,
            log: Lines::default(),
        };
        host.tree("root");
        host
    }

    /// The directory that contains everything.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    pub(crate) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path().join(path)
    }

    /// The plugin's state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.join("state")
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

    /// The plugin configuration: this test's directories and tools.
    pub(crate) fn config(&self) -> Value {
        json!({
            "state_dir": self.state(),
            "nspawn_path": self.join("bin/systemd-nspawn"),
        })
    }

    /// How the plugin is started here.
    pub(crate) fn launch(&self) -> Launch {
        let mut launch = Launch::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn"))
            .set(
                "PATH",
                format!("{}:/usr/bin:/bin", self.join("bin").display()),
            )
            .set("TMPDIR", self.path());
        launch.start_timeout = DEADLINE;
        launch.log = Some(self.log.sender());
        launch
    }

    /// A plugin, launched and configured with [`config`](Self::config).
    pub(crate) async fn plugin(&self) -> Plugin {
        self.plugin_with(&json!({})).await
    }

    /// A plugin configured with [`config`](Self::config) and these options.
    pub(crate) async fn plugin_with(&self, options: &Value) -> Plugin {
        let mut config = self.config();
        for (key, value) in options.as_object().unwrap() {
            config[key] = value.clone();
        }
        within("the plugin's start", async {
            let plugin = Plugin::launch(self.launch()).await.unwrap();
            plugin.configure(&config).await.unwrap();
            plugin
        })
        .await
    }

    /// The log lines of all plugins, as they arrive.
    pub(crate) fn log(&self) -> &Lines {
        &self.log
    }

    /// A task in the small root tree that runs this command as PID 1.
    pub(crate) fn task(&self, command: &[&str]) -> Task {
        let config = json!({
            "image": self.root(),
            "boot": false,
            "user_namespacing": false,
            "command": command,
        });
        Task {
            spec: TaskSpec::new("web", config),
        }
    }

    /// A task that runs this shell script.
    pub(crate) fn shell(&self, text: &str) -> Task {
        self.task(&["/bin/sh", "-c", text])
    }

    /// A new allocation for this task.
    pub(crate) fn allocation(&self, task: Task) -> Allocation {
        Allocation::create(&self.join("alloc"), task.spec).unwrap()
    }

    /// Starts a task in an allocation of its own; the start must succeed.
    pub(crate) async fn start(&self, plugin: &Plugin, task: Task) -> Running {
        match self.try_start(plugin, task).await {
            Ok(running) => running,
            Err(error) => panic!("{error}\nplugin's log:\n{}", self.log.text().join("\n")),
        }
    }

    /// The same for a task that prints `up` when it is ready.
    pub(crate) async fn up(&self, plugin: &Plugin, task: Task) -> Running {
        let running = self.start(plugin, task).await;
        running.stdout.contains("up").await;
        running
    }

    /// Starts a task in an allocation of its own.
    pub(crate) async fn try_start(
        &self,
        plugin: &Plugin,
        task: Task,
    ) -> Result<Running, HostError> {
        self.start_in(plugin, Arc::new(self.allocation(task))).await
    }

    /// Starts the task of an allocation, for the first time or again, with a new id.
    pub(crate) async fn start_in(
        &self,
        plugin: &Plugin,
        allocation: Arc<Allocation>,
    ) -> Result<Running, HostError> {
        self.start_edited(plugin, allocation, |_| {}).await
    }

    /// The same with a change to the request.
    pub(crate) async fn start_edited(
        &self,
        plugin: &Plugin,
        allocation: Arc<Allocation>,
        edit: impl FnOnce(&mut TaskConfig),
    ) -> Result<Running, HostError> {
        let logs = allocation.open_logs()?;
        let (stdout, stderr) = (Output::collect(logs.stdout), Output::collect(logs.stderr));
        let mut task = plugin.task_config(&allocation).await?;
        edit(&mut task);
        let id = task.id.clone();
        let started = within("StartTask", plugin.start(task)).await?;
        Ok(Running {
            id,
            started,
            stdout,
            stderr,
            allocation,
        })
    }

    /// Starts this task with these bytes as its `config` block.
    pub(crate) async fn start_packed(
        &self,
        plugin: &Plugin,
        task: Task,
        config: Vec<u8>,
    ) -> Result<Running, HostError> {
        let allocation = Arc::new(self.allocation(task));
        let edit = |task: &mut TaskConfig| task.msgpack_driver_config = config;
        self.start_edited(plugin, allocation, edit).await
    }

    /// A new plugin after the last one has exited, with the task recovered from what Nomad would have stored: the handle without the driver
    /// configuration and without an id next to it.
    pub(crate) async fn recovered(&self, running: &Running) -> Plugin {
        let plugin = self.plugin().await;
        within("RecoverTask", plugin.recover(running.stored()))
            .await
            .unwrap();
        plugin
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

    /// The cgroups that were created for the starts of this test.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        let roots = ["", "unified", "systemd"].map(|name| Path::new("/sys/fs/cgroup").join(name));
        let mut found = Vec::new();
        for start in self.starts() {
            let text = start["cgroup"].as_str().unwrap().to_owned();
            let made = text
                .lines()
                .filter_map(|line| line.splitn(3, ':').nth(2))
                .filter(|group| group.contains("nomad-driver-nspawn/"));
            for group in made {
                found.extend(
                    roots
                        .iter()
                        .map(|root| root.join(group.trim_start_matches('/'))),
                );
            }
        }
        found
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
            self.log.text().join("\n")
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
        let wait = PollTimeout::try_from(wait).unwrap();
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, wait), Ok(1..))
    }
}

/// A task to start.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    /// Its specification.
    pub(crate) spec: TaskSpec,
}

impl Task {
    /// With this option in the `config` block.
    pub(crate) fn with(mut self, option: &str, value: Value) -> Self {
        self.spec.config[option] = value;
        self
    }

    /// With this variable in the job's `env` block.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.spec.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// With this task name.
    pub(crate) fn named(mut self, name: &str) -> Self {
        self.spec.task = name.to_owned();
        self
    }
}

/// A started task.
#[derive(Debug)]
pub(crate) struct Running {
    /// The id of this start.
    pub(crate) id: String,
    /// The response to StartTask.
    pub(crate) started: StartedTask,
    /// Its stdout.
    pub(crate) stdout: Output,
    /// Its stderr.
    pub(crate) stderr: Output,
    /// Its directories.
    pub(crate) allocation: Arc<Allocation>,
}

impl Running {
    /// Waits for its exit.
    pub(crate) async fn wait(&self, plugin: &Plugin) -> TaskExit {
        within("WaitTask", plugin.wait(&self.id)).await.unwrap()
    }

    /// What Nomad would have stored about it.
    pub(crate) fn stored(&self) -> TaskHandle {
        let mut handle = self.started.handle.clone();
        handle
            .config
            .as_mut()
            .unwrap()
            .msgpack_driver_config
            .clear();
        handle
    }

    /// A value of the driver state in its handle: `["leader", "pid"]` and the like.
    pub(crate) fn state(&self, path: &[&str]) -> Value {
        let state: Value = serde_json::from_slice(&self.started.handle.driver_state).unwrap();
        path.iter()
            .fold(state["started"].clone(), |value, key| value[*key].clone())
    }

    /// The pid of the container's PID 1.
    pub(crate) fn leader(&self) -> i32 {
        i32::try_from(self.state(&["leader", "pid"]).as_i64().unwrap()).unwrap()
    }

    /// The response to InspectTask.
    pub(crate) async fn inspect(
        &self,
        plugin: &Plugin,
    ) -> Result<InspectTaskResponse, tonic::Status> {
        let request = InspectTaskRequest {
            task_id: self.id.clone(),
        };
        let answer = within("InspectTask", async {
            plugin.driver().inspect_task(request).await
        })
        .await;
        answer.map(tonic::Response::into_inner)
    }

    /// Sends it a signal by name.
    pub(crate) async fn signal(&self, plugin: &Plugin, signal: &str) -> Result<(), tonic::Status> {
        let request = SignalTaskRequest {
            task_id: self.id.clone(),
            signal: signal.to_owned(),
        };
        let answer = within("SignalTask", async {
            plugin.driver().signal_task(request).await
        })
        .await;
        answer.map(drop)
    }

    /// Stops it and waits for its exit.
    pub(crate) async fn stop(&self, plugin: &Plugin, grace: Duration, signal: &str) -> TaskExit {
        within("StopTask", plugin.stop(&self.id, grace, signal))
            .await
            .unwrap();
        self.wait(plugin).await
    }

    /// Destroys it by force.
    pub(crate) async fn destroy(&self, plugin: &Plugin) {
        within("DestroyTask", plugin.destroy(&self.id, true))
            .await
            .unwrap();
    }
}

/// The environment of a call in the call log.
pub(crate) fn environment(start: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(start["environment"].clone()).unwrap()
}
