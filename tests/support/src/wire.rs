//! The fixture of every test that talks to the plugin over its real socket, whatever systemd-nspawn it uses: a directory with the plugin's
//! state, its allocations and the root trees, the plugin's start, and its tasks. [`World`] adds what differs between the fake and the real
//! systemd-nspawn; the suite in `tests/suite/` is generic over it.

use std::fmt;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_agent::calls::StartedTask;
use dev_agent::{Allocation, HostError, Launch, Plugin, TaskExit, TaskSpec};
use nomad_driver_nspawn::proto::driver::network_isolation_spec::NetworkIsolationMode;
use nomad_driver_nspawn::proto::driver::{
    InspectTaskRequest, InspectTaskResponse, NetworkIsolationSpec, SignalTaskRequest, TaskConfig,
    TaskHandle, TaskStatsRequest, TaskStatsResponse,
};
use nomad_driver_nspawn::state::TaskDir;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Lines, Output, not_applicable, within};

/// What a test needs and not every world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Root's view of other processes.
    Root,
    /// A container with mounts of its own: its own root, `/dev` and users.
    MountNamespace,
}

/// A machine with a fake or a real systemd-nspawn, for one test of the suite.
pub trait World: Deref<Target = Fixture> {
    /// Why this world lacks what a test needs, or `None` if it has it.
    fn lacks(&self, need: Need) -> Option<&'static str>;

    /// Creates another root tree of this name.
    fn tree(&self, name: &str) -> PathBuf;

    /// Makes systemd-nspawn behave as this version of `all`; returns the version that it has, or why that isn't possible. An installed one
    /// counts as the latest of `all` that is not later.
    fn use_version(&self, version: u32, all: &[u32]) -> Result<u32, String>;

    /// Gives the first root tree an init that runs until it is ended, or ends as `ends` says: `{"exit": 3}` or `{"signal": 11}`. Returns
    /// whether it can; reports the reason if not.
    fn use_init(&self, version: u32, ends: &Value) -> bool;

    /// A file that does not exist and that tasks can see: its path on the host, and its path in the container.
    fn gate(&self) -> (PathBuf, String);

    /// Whether systemd-nspawn opens this target of a descriptor itself while a container runs: its event loop, the channels to its children,
    /// the locks of the first root tree.
    fn nspawn_opens(&self, target: &str) -> bool;

    /// Waits until nothing of the tasks is left while this plugin still runs: no process, no cgroup and no record.
    fn is_clean(&self, plugin: &Plugin) -> impl Future<Output = ()>;

    /// Ends the test: shuts the plugin down as Nomad does; nothing may be left.
    fn leave(self, plugin: Plugin) -> impl Future<Output = ()>;

    /// Ends a test that has reported that it can't run here and has started nothing.
    fn unused(self);

    /// Whether this world has everything that the test needs; reports the reason if not.
    fn has(&self, needs: &[Need]) -> bool {
        let reason = needs.iter().find_map(|need| self.lacks(*need));
        reason.map(not_applicable).is_none()
    }
}

/// What the tests of both worlds have in common.
#[derive(Debug)]
pub struct Fixture {
    dir: TempDir,
    launch: Launch,
    config: Value,
    task: TaskSpec,
    log: Lines,
    must_be_healthy: bool,
}

impl Fixture {
    /// A fixture in this directory, whose plugins are started by `launch`. Every task has this name and uses the tree `image` in the
    /// directory.
    pub fn new(dir: TempDir, mut launch: Launch, task: &str, image: &str) -> Self {
        let log = Lines::default();
        launch.log = Some(log.sender());
        let config = json!({
            "image": dir.path().join(image),
            "boot": false,
            "user_namespacing": false,
        });
        Self {
            launch: launch.set("TMPDIR", dir.path()),
            config: json!({ "state_dir": dir.path().join("state") }),
            task: TaskSpec::new(task, config),
            dir,
            log,
            must_be_healthy: false,
        }
    }

    /// A temporary directory with these directories in it, and those that every fixture needs: for the plugin's state and program, and for
    /// allocations.
    pub fn directory(prefix: &str, others: &[&str]) -> TempDir {
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        for name in ["state", "plugins", "alloc"].iter().chain(others) {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            // The mode of an operator's mkdir, whatever the umask of the test is.
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        dir
    }

    /// The same with this option in the configuration of every plugin.
    #[must_use]
    pub fn configured(mut self, option: &str, value: impl Into<Value>) -> Self {
        self.config[option] = value.into();
        self
    }

    /// The same with this option in the `config` block of every task.
    #[must_use]
    pub fn for_every_task(mut self, option: &str, value: impl Into<Value>) -> Self {
        self.task.config[option] = value.into();
        self
    }

    /// The same, where every plugin must report a healthy driver before it is used.
    #[must_use]
    pub fn healthy(self) -> Self {
        Self {
            must_be_healthy: true,
            ..self
        }
    }

    /// The directory that contains everything.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path().join(path)
    }

    /// The plugin's state directory.
    pub fn state(&self) -> PathBuf {
        self.join("state")
    }

    /// The plugin configuration: this test's directories and tools.
    pub fn config(&self) -> Value {
        self.config.clone()
    }

    /// How the plugin is started.
    pub fn launch(&self) -> Launch {
        self.launch.clone()
    }

    /// The log lines of all plugins, as they arrive.
    pub fn log(&self) -> &Lines {
        &self.log
    }

    /// A plugin, launched and configured with [`config`](Self::config).
    pub async fn plugin(&self) -> Plugin {
        self.plugin_with(&json!({})).await
    }

    /// A plugin configured with [`config`](Self::config) and these options.
    pub async fn plugin_with(&self, options: &Value) -> Plugin {
        self.launched(self.launch(), options).await
    }

    /// A plugin that is started by this shell script, which ends in `exec "$0"`.
    pub async fn plugin_by(&self, script: &str) -> Plugin {
        let mut launch = self.launch();
        let binary = std::mem::replace(&mut launch.binary, "/bin/sh".into());
        launch.args = ["-c", script].map(Into::into).into();
        launch.args.push(binary.into());
        self.launched(launch, &json!({})).await
    }

    /// A plugin that is started in this way and configured with these options besides.
    pub async fn launched(&self, launch: Launch, options: &Value) -> Plugin {
        let mut config = self.config();
        for (key, value) in options.as_object().unwrap() {
            config[key] = value.clone();
        }
        within("the plugin's start", async {
            let plugin = Plugin::launch(launch).await.unwrap();
            plugin.configure(&config).await.unwrap();
            if self.must_be_healthy {
                plugin.healthy().await.expect("a healthy driver");
            }
            plugin
        })
        .await
    }

    /// A task in the first root tree that runs this command as PID 1.
    pub fn task(&self, command: &[&str]) -> Task {
        let mut spec = self.task.clone();
        spec.config["command"] = json!(command);
        Task {
            spec,
            network: None,
        }
    }

    /// A task that runs this shell script.
    pub fn shell(&self, text: &str) -> Task {
        self.task(&["/bin/sh", "-c", text])
    }

    /// A new allocation for this task.
    pub fn allocation(&self, task: Task) -> Allocation {
        Allocation::create(&self.join("alloc"), task.spec).unwrap()
    }

    /// Starts a task in an allocation of its own; the start must succeed.
    pub async fn start(&self, plugin: &Plugin, task: Task) -> Running {
        match self.try_start(plugin, task).await {
            Ok(running) => running,
            Err(refused) => {
                panic!("{refused}\nplugin's log:\n{}", self.log.text().join("\n"))
            }
        }
    }

    /// The same for a task that prints `up` when it is ready.
    pub async fn up(&self, plugin: &Plugin, task: Task) -> Running {
        let running = self.start(plugin, task).await;
        running.stdout.contains("up").await;
        running
    }

    /// Starts a task in an allocation of its own.
    pub async fn try_start(&self, plugin: &Plugin, task: Task) -> Result<Running, Refused> {
        let isolation = task.isolation();
        let allocation = Arc::new(self.allocation(task));
        let edit = |task: &mut TaskConfig| task.network_isolation_spec = isolation;
        self.start_edited(plugin, allocation, edit).await
    }

    /// Starts the task of an allocation, for the first time or again, with a new id.
    pub async fn start_in(
        &self,
        plugin: &Plugin,
        allocation: Arc<Allocation>,
    ) -> Result<Running, Refused> {
        self.start_edited(plugin, allocation, |_| {}).await
    }

    /// The same with a change to the request.
    pub async fn start_edited(
        &self,
        plugin: &Plugin,
        allocation: Arc<Allocation>,
        edit: impl FnOnce(&mut TaskConfig),
    ) -> Result<Running, Refused> {
        let logs = allocation.open_logs().unwrap();
        let (stdout, stderr) = (Output::collect(logs.stdout), Output::collect(logs.stderr));
        let mut task = match plugin.task_config(&allocation).await {
            Ok(task) => task,
            Err(error) => return Err(Refused { error, stderr }),
        };
        edit(&mut task);
        let id = task.id.clone();
        match within("StartTask", plugin.start(task)).await {
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

    /// A started task that has printed `up` and whose plugin is dead.
    pub async fn orphan(&self, script: &str) -> Running {
        let mut plugin = self.plugin().await;
        let task = self.up(&plugin, self.shell(script)).await;
        plugin.kill().await;
        task
    }

    /// A new plugin that refuses to recover this handle, with these words.
    pub async fn not_recovered(&self, handle: TaskHandle, words: &str) -> Plugin {
        let plugin = self.plugin().await;
        let status = refusal(within("RecoverTask", plugin.recover(handle)).await);
        assert!(status.message().contains(words), "{}", status.message());
        plugin
    }

    /// A new plugin after the last one has exited, with the task recovered from what Nomad would have stored: the handle without the driver
    /// configuration and without an id next to it.
    pub async fn recovered(&self, running: &Running) -> Plugin {
        let plugin = self.plugin().await;
        within("RecoverTask", plugin.recover(running.stored()))
            .await
            .unwrap();
        plugin
    }
}

/// Shuts a plugin down as Nomad does; it must exit without being killed.
pub async fn end(plugin: Plugin) {
    let stopped = within("Shutdown", plugin.shutdown()).await;
    assert!(!stopped.killed, "the plugin had to be killed: {stopped:?}");
}

/// The status of a call that failed.
pub fn refusal<T: fmt::Debug>(result: Result<T, impl Into<HostError>>) -> tonic::Status {
    match result.map_err(Into::into).unwrap_err() {
        HostError::Call { status, .. } => *status,
        other => panic!("not refused by the plugin: {other}"),
    }
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

    /// With this `resources.memory`, in MiB.
    #[must_use]
    pub fn with_memory(mut self, mebibytes: i64) -> Self {
        self.spec.memory_mb = mebibytes;
        self
    }

    /// With this variable in the job's `env` block.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.spec.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// With this task name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.spec.task = name.to_owned();
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
    pub fn isolation(&self) -> Option<NetworkIsolationSpec> {
        let path = self.network.as_ref()?;
        Some(NetworkIsolationSpec {
            mode: NetworkIsolationMode::Group.into(),
            path: path.to_string_lossy().into_owned(),
            ..NetworkIsolationSpec::default()
        })
    }
}

/// A task whose start failed.
#[derive(Debug)]
pub struct Refused {
    /// The error.
    pub error: HostError,
    /// What was written to the task's stderr.
    pub stderr: Output,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl From<Refused> for HostError {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

/// The samples of a task's statistics.
pub type Samples = tonic::Streaming<TaskStatsResponse>;

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
    /// Waits for its exit.
    pub async fn wait(&self, plugin: &Plugin) -> TaskExit {
        within("WaitTask", plugin.wait(&self.id)).await.unwrap()
    }

    /// What Nomad would have stored about it.
    pub fn stored(&self) -> TaskHandle {
        let mut handle = self.started.handle.clone();
        let config = handle.config.as_mut().unwrap();
        config.msgpack_driver_config.clear();
        handle
    }

    /// The same with a modified driver state.
    pub fn changed(&self, change: impl FnOnce(&mut Value)) -> TaskHandle {
        let mut handle = self.stored();
        let mut state: Value = serde_json::from_slice(&handle.driver_state).unwrap();
        change(&mut state["started"]);
        handle.driver_state = serde_json::to_vec(&state).unwrap();
        handle
    }

    /// A value of the driver state in its handle: `["leader", "pid"]` and the like.
    pub fn state(&self, path: &[&str]) -> Value {
        let state: Value = serde_json::from_slice(&self.started.handle.driver_state).unwrap();
        path.iter()
            .fold(state["started"].clone(), |value, key| value[*key].clone())
    }

    /// The pid of the container's PID 1.
    pub fn leader(&self) -> i32 {
        self.pid("leader")
    }

    /// The pid of its supervisor.
    pub fn supervisor(&self) -> i32 {
        self.pid("supervisor")
    }

    fn pid(&self, name: &str) -> i32 {
        i32::try_from(self.state(&[name, "pid"]).as_i64().unwrap()).unwrap()
    }

    /// The pid of its systemd-nspawn, from the record of the running task.
    pub fn nspawn(&self) -> i32 {
        let state = self.state(&["state"]);
        let running = TaskDir::new(state.as_str().unwrap()).running().unwrap();
        running.nspawn.pid
    }

    /// The response to InspectTask.
    pub async fn inspect(&self, plugin: &Plugin) -> Result<InspectTaskResponse, tonic::Status> {
        let request = InspectTaskRequest {
            task_id: self.id.clone(),
        };
        let mut driver = plugin.driver();
        let answer = within("InspectTask", driver.inspect_task(request)).await;
        answer.map(tonic::Response::into_inner)
    }

    /// Its statistics, one sample in each interval.
    pub async fn stats(&self, plugin: &Plugin, every: Duration) -> Samples {
        let request = TaskStatsRequest {
            task_id: self.id.clone(),
            collection_interval: Some(every.try_into().unwrap()),
        };
        let mut driver = plugin.driver();
        let answer = within("TaskStats", driver.task_stats(request)).await;
        answer.unwrap().into_inner()
    }

    /// Sends it a signal by name.
    pub async fn signal(&self, plugin: &Plugin, signal: &str) -> Result<(), tonic::Status> {
        let request = SignalTaskRequest {
            task_id: self.id.clone(),
            signal: signal.to_owned(),
        };
        let mut driver = plugin.driver();
        let answer = within("SignalTask", driver.signal_task(request)).await;
        answer.map(drop)
    }

    /// Stops it and waits for its exit.
    pub async fn stop(&self, plugin: &Plugin, grace: Duration, signal: &str) -> TaskExit {
        within("StopTask", plugin.stop(&self.id, grace, signal))
            .await
            .unwrap();
        self.wait(plugin).await
    }

    /// Destroys it by force.
    pub async fn destroy(&self, plugin: &Plugin) {
        within("DestroyTask", plugin.destroy(&self.id, true))
            .await
            .unwrap();
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
