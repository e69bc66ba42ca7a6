//! The calls Nomad's agent makes, in its order: methods for each, and [`run_task`], which drives one task from configuration
//! to clean-up. Retries nothing, except that a plugin that dies under a running task is started again to find the task.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Streaming;

use super::allocation::{Allocation, TaskSpec};
use super::configure;
use super::error::HostError;
use super::plugin::{Launch, Plugin};
use super::variables::Variables;
use crate::proto::base::{
    ConfigSchemaRequest, PluginInfoRequest, PluginInfoResponse, PluginType, SetConfigRequest,
};
use crate::proto::driver::fingerprint_response::HealthState;
use crate::proto::driver::{
    DestroyTaskRequest, DriverTaskEvent, ExitResult, FingerprintRequest, FingerprintResponse,
    NetworkOverride, RecoverTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig,
    TaskConfigSchemaRequest, TaskEventsRequest, TaskHandle, WaitTaskRequest,
};
use crate::proto::{base, hclspec};

/// The plugin API version that every Nomad speaks.
pub const API_VERSION: &str = "v0.1.0";
/// How long Nomad's client waits for a driver's first fingerprint.
const FINGERPRINT: Duration = Duration::from_secs(50);
/// How long what a task printed may take to arrive once the task has ended.
const DRAIN: Duration = Duration::from_secs(2);

/// What a start gave.
#[derive(Debug, Clone, PartialEq)]
pub struct StartedTask {
    /// What Nomad would store.
    pub handle: TaskHandle,
    /// Where the task is reached, when it has a network of its own.
    pub network: Option<NetworkOverride>,
}

impl Plugin {
    /// `PluginInfo`, checked as Nomad's loader checks it: a driver that speaks [`API_VERSION`].
    pub async fn identify(&self) -> Result<PluginInfoResponse, HostError> {
        let answer = self.base().plugin_info(PluginInfoRequest {}).await;
        let info = answer.map_err(HostError::call("PluginInfo"))?.into_inner();
        let refuse = |what| HostError::Answer {
            method: "PluginInfo",
            what,
        };
        if info.r#type() != PluginType::Driver {
            return Err(refuse("type DRIVER"));
        }
        let spoken = |version: &String| {
            version.trim_start_matches('v') == API_VERSION.trim_start_matches('v')
        };
        if !info.plugin_api_versions.iter().any(spoken) {
            return Err(refuse("API version v0.1.0"));
        }
        if info.plugin_version.is_empty() {
            return Err(refuse("version"));
        }
        Ok(info)
    }

    /// Encodes `config` by the plugin's own schema and sends it, as in Nomad's third launch.
    pub async fn configure(&self, config: &Value) -> Result<(), HostError> {
        let answer = self.base().config_schema(ConfigSchemaRequest {}).await;
        let schema = answer
            .map_err(HostError::call("ConfigSchema"))?
            .into_inner();
        let bytes = configure::encode(
            schema.spec.as_ref(),
            config,
            &Variables::default(),
            "plugin",
        )?;
        self.set_config(bytes).await
    }

    /// `SetConfig` with these bytes.
    pub async fn set_config(&self, msgpack: Vec<u8>) -> Result<(), HostError> {
        let request = SetConfigRequest {
            msgpack_config: msgpack,
            nomad_config: Some(base::NomadConfig {
                driver: Some(base::NomadDriverConfig {
                    client_min_port: 14000,
                    client_max_port: 14512,
                    topology: None,
                }),
            }),
            plugin_api_version: API_VERSION.to_owned(),
        };
        let answer = self.base().set_config(request).await;
        answer.map(drop).map_err(HostError::call("SetConfig"))
    }

    /// The stream of fingerprints and its first one, which must come in Nomad's time.
    pub async fn fingerprint(
        &self,
    ) -> Result<(FingerprintResponse, Streaming<FingerprintResponse>), HostError> {
        let method = "Fingerprint";
        let mut client = self.driver();
        let first = async {
            let answer = client.fingerprint(FingerprintRequest {}).await;
            let mut stream = answer.map_err(HostError::call(method))?.into_inner();
            let first = stream.message().await.map_err(HostError::call(method))?;
            let what = "first message";
            let first = first.ok_or(HostError::Answer { method, what })?;
            Ok((first, stream))
        };
        match timeout(FINGERPRINT, first).await {
            Ok(answer) => answer,
            Err(_) => Err(HostError::Deadline {
                what: "the first fingerprint",
                deadline: FINGERPRINT,
            }),
        }
    }

    /// Whether the driver takes tasks: an error says why not, in its own words.
    pub async fn healthy(&self) -> Result<FingerprintResponse, HostError> {
        let (first, _) = self.fingerprint().await?;
        let health = match first.health() {
            HealthState::Healthy if first.err.is_empty() => return Ok(first),
            HealthState::Undetected => "undetected",
            HealthState::Unhealthy | HealthState::Healthy => "unhealthy",
        };
        let reason = if first.err.is_empty() {
            first.health_description
        } else {
            first.err
        };
        Err(HostError::Unhealthy { health, reason })
    }

    /// The schema of a task's `config` block.
    pub async fn task_schema(&self) -> Result<hclspec::Spec, HostError> {
        let method = "TaskConfigSchema";
        let answer = self
            .driver()
            .task_config_schema(TaskConfigSchemaRequest {})
            .await;
        let spec = answer.map_err(HostError::call(method))?.into_inner().spec;
        spec.ok_or(HostError::Answer {
            method,
            what: "spec",
        })
    }

    /// The wire form of one start of the allocation's task, its `config` encoded by the driver's schema.
    pub async fn task_config(&self, allocation: &Allocation) -> Result<TaskConfig, HostError> {
        let schema = self.task_schema().await?;
        let spec = allocation.spec();
        let bytes = configure::encode(
            Some(&schema),
            &spec.config,
            allocation.variables(),
            "config",
        )?;
        allocation.task_config(bytes)
    }

    /// `StartTask`. Gives the handle, which must be there.
    pub async fn start(&self, task: TaskConfig) -> Result<StartedTask, HostError> {
        let method = "StartTask";
        let answer = self
            .driver()
            .start_task(StartTaskRequest { task: Some(task) })
            .await;
        let answer = answer.map_err(HostError::call(method))?.into_inner();
        let what = "handle with a config";
        let handle = answer.handle.filter(|handle| handle.config.is_some());
        Ok(StartedTask {
            handle: handle.ok_or(HostError::Answer { method, what })?,
            network: answer.network_override,
        })
    }

    /// `WaitTask`: the end of a task. An exit with an error text is given as [`TaskExit::error`].
    pub async fn wait(&self, id: &str) -> Result<TaskExit, HostError> {
        let method = "WaitTask";
        let task_id = id.to_owned();
        let answer = self.driver().wait_task(WaitTaskRequest { task_id }).await;
        let answer = answer.map_err(HostError::call(method))?.into_inner();
        let result = answer.result.ok_or(HostError::Answer {
            method,
            what: "result",
        })?;
        Ok(TaskExit::new(&result, answer.err))
    }

    /// `StopTask`.
    pub async fn stop(&self, id: &str, grace: Duration, signal: &str) -> Result<(), HostError> {
        let request = StopTaskRequest {
            task_id: id.to_owned(),
            // Out of range only for times that no job file can ask for.
            timeout: grace.try_into().ok(),
            signal: signal.to_owned(),
        };
        let answer = self.driver().stop_task(request).await;
        answer.map(drop).map_err(HostError::call("StopTask"))
    }

    /// `DestroyTask`.
    pub async fn destroy(&self, id: &str, force: bool) -> Result<(), HostError> {
        let task_id = id.to_owned();
        let answer = self
            .driver()
            .destroy_task(DestroyTaskRequest { task_id, force })
            .await;
        answer.map(drop).map_err(HostError::call("DestroyTask"))
    }

    /// `RecoverTask`, with the handle that a start gave.
    pub async fn recover(&self, handle: TaskHandle) -> Result<(), HostError> {
        let request = RecoverTaskRequest {
            task_id: String::new(),
            handle: Some(handle),
        };
        let answer = self.driver().recover_task(request).await;
        answer.map(drop).map_err(HostError::call("RecoverTask"))
    }

    /// The stream of task events.
    pub async fn events(&self) -> Result<Streaming<DriverTaskEvent>, HostError> {
        let answer = self.driver().task_events(TaskEventsRequest {}).await;
        let answer = answer.map_err(HostError::call("TaskEvents"))?;
        Ok(answer.into_inner())
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExit {
    /// As a shell gives it: the status, or 128 + signal.
    pub code: i32,
    /// The signal that ended it, or 0.
    pub signal: i32,
    /// Whether it ended for want of memory.
    pub oom_killed: bool,
    /// Why the driver does not know how it ended, if it doesn't.
    pub error: Option<String>,
}

impl TaskExit {
    fn new(result: &ExitResult, error: String) -> Self {
        Self {
            code: result.exit_code,
            signal: result.signal,
            oom_killed: result.oom_killed,
            error: Some(error).filter(|error| !error.is_empty()),
        }
    }
}

/// One run of one task.
#[derive(Debug)]
pub struct Run {
    /// How to start the plugin.
    pub launch: Launch,
    /// The plugin's own configuration.
    pub plugin_config: Value,
    /// The task.
    pub task: TaskSpec,
    /// An existing directory in which the allocation is made.
    pub allocations: PathBuf,
}

/// Something that happened during a run, for a person to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// The host goes on to this.
    Step(String),
    /// The driver tells this about the task.
    Event(String),
    /// Something did not go as it should; the run goes on.
    Trouble(String),
}

/// Runs a task from start to end. What it prints goes to `stdout` and `stderr` unchanged, what happens goes to `tell`. Each
/// message on `stops` asks the task to end: the first with its own kill timeout and signal, the next ones at once.
/// Leaves nothing behind, after an error neither.
pub async fn run_task<O, E>(
    run: Run,
    stdout: O,
    stderr: E,
    mut stops: mpsc::Receiver<()>,
    tell: &(dyn Fn(Happening) + Sync),
) -> Result<TaskExit, HostError>
where
    O: Write + Send + 'static,
    E: Write + Send + 'static,
{
    let mut plugin = prepare(&run, tell).await?;
    let allocation = match Allocation::create(&run.allocations, run.task.clone()) {
        Ok(allocation) => allocation,
        Err(error) => {
            plugin.shutdown().await;
            return Err(error);
        }
    };
    tell(Happening::Step(format!("allocation {}", allocation.id())));
    let end = drive(
        &run,
        &mut plugin,
        &allocation,
        (stdout, stderr),
        &mut stops,
        tell,
    )
    .await;
    let stopped = plugin.shutdown().await;
    if stopped.killed {
        tell(Happening::Trouble(
            "the plugin did not end in 2 s and was killed".to_owned(),
        ));
    }
    if let Err(error) = allocation.remove() {
        tell(Happening::Trouble(chain(&error)));
    }
    end
}

/// Starts the plugin and brings it to the point where it takes tasks.
async fn prepare(run: &Run, tell: &(dyn Fn(Happening) + Sync)) -> Result<Plugin, HostError> {
    let plugin = Plugin::launch(run.launch.clone()).await?;
    let ready = async {
        let info = plugin.identify().await?;
        plugin.configure(&run.plugin_config).await?;
        let fingerprint = plugin.healthy().await?;
        let (name, version, health) = (
            &info.name,
            &info.plugin_version,
            &fingerprint.health_description,
        );
        tell(Happening::Step(format!(
            "plugin {name} {version}: {health}"
        )));
        Ok(())
    };
    match ready.await {
        Ok(()) => Ok(plugin),
        Err(error) => {
            plugin.shutdown().await;
            Err(error)
        }
    }
}

async fn drive<O, E>(
    run: &Run,
    plugin: &mut Plugin,
    allocation: &Allocation,
    (stdout, stderr): (O, E),
    stops: &mut mpsc::Receiver<()>,
    tell: &(dyn Fn(Happening) + Sync),
) -> Result<TaskExit, HostError>
where
    O: Write + Send + 'static,
    E: Write + Send + 'static,
{
    let task = plugin.task_config(allocation).await?;
    let id = task.id.clone();
    let mut events = plugin.events().await?;
    let logs = allocation.open_logs()?;
    let copies = [
        tokio::spawn(copy(logs.stdout, stdout)),
        tokio::spawn(copy(logs.stderr, stderr)),
    ];
    let started = {
        let start = plugin.start(task);
        tokio::pin!(start);
        loop {
            tokio::select! {
                started = &mut start => break started,
                Ok(Some(event)) = events.message() => tell_event(&event, allocation, tell),
            }
        }
    };
    let started = match started {
        Ok(started) => started,
        Err(error) => {
            copies.iter().for_each(tokio::task::JoinHandle::abort);
            return Err(error);
        }
    };
    tell(Happening::Step(format!("task {} runs", run.task.task)));
    let mut end = follow(run, plugin, allocation, &id, &mut events, stops, tell).await;
    if end.is_err() && timeout(DRAIN, plugin.gone()).await.is_ok() {
        tell(Happening::Trouble(
            "the plugin died; another one is started to find the task again".to_owned(),
        ));
        *plugin = prepare(run, tell).await?;
        end = match plugin.recover(started.handle).await {
            Ok(()) => {
                events = plugin.events().await?;
                follow(run, plugin, allocation, &id, &mut events, stops, tell).await
            }
            Err(error) => Err(error),
        };
    }
    for copy in copies {
        let abort = copy.abort_handle();
        match timeout(DRAIN, copy).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tell(Happening::Trouble(format!(
                "copying the task's output: {error}"
            ))),
            Ok(Err(panicked)) => tell(Happening::Trouble(panicked.to_string())),
            Err(_) => {
                abort.abort();
                let text =
                    "the task has ended, but its output is still held open; the rest is cut off";
                tell(Happening::Trouble(text.to_owned()));
            }
        }
    }
    if let Err(error) = plugin.destroy(&id, true).await {
        tell(Happening::Trouble(chain(&error)));
    }
    end
}

/// Waits for the end of the task, passes on what the driver tells, and stops the task when asked.
async fn follow(
    run: &Run,
    plugin: &Plugin,
    allocation: &Allocation,
    id: &str,
    events: &mut Streaming<DriverTaskEvent>,
    stops: &mut mpsc::Receiver<()>,
    tell: &(dyn Fn(Happening) + Sync),
) -> Result<TaskExit, HostError> {
    let spec = &run.task;
    let wait = plugin.wait(id);
    tokio::pin!(wait);
    let mut asked = 0;
    // The stops run beside each other: the second one must not wait for the first.
    let mut stopping = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            end = &mut wait => return end,
            Ok(Some(event)) = events.message() => tell_event(&event, allocation, tell),
            Some(()) = stops.recv() => {
                asked += 1;
                let grace = if asked == 1 { spec.kill_timeout } else { Duration::ZERO };
                tell(Happening::Step(format!("stopping, kill timeout {} s", grace.as_secs_f64())));
                let mut client = plugin.driver();
                let request = StopTaskRequest {
                    task_id: id.to_owned(),
                    timeout: grace.try_into().ok(),
                    signal: spec.kill_signal.clone(),
                };
                stopping.spawn(async move { client.stop_task(request).await });
            }
            Some(stopped) = stopping.join_next() => if let Ok(Err(status)) = stopped {
                tell(Happening::Trouble(chain(&HostError::call("StopTask")(status))));
            },
        }
    }
}

fn tell_event(event: &DriverTaskEvent, allocation: &Allocation, tell: &(dyn Fn(Happening) + Sync)) {
    if event.alloc_id == allocation.id() && event.task_name == allocation.spec().task {
        tell(Happening::Event(event.message.clone()));
    }
}

/// Copies until the last writer is gone, each piece as it comes.
async fn copy(
    mut from: pipe::Receiver,
    mut to: impl Write + Send + 'static,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        // Whoever reads our stdout may be slow, and must not hold up everything else.
        let written = tokio::task::spawn_blocking(move || {
            to.write_all(&buffer[..n])?;
            to.flush()?;
            Ok::<_, std::io::Error>((to, buffer))
        });
        (to, buffer) = written.await.map_err(std::io::Error::other)??;
    }
}

/// An error with its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
