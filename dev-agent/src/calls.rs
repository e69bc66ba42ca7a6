//! The RPCs that Nomad's agent makes, one method for each. Retries nothing.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;
use tonic::Streaming;

use super::allocation::Allocation;
use super::configure;
use super::error::HostError;
use super::plugin::Plugin;
use super::variables::Variables;
use nomad_proto::base::{
    ConfigSchemaRequest, PluginInfoRequest, PluginInfoResponse, PluginType, SetConfigRequest,
};
use nomad_proto::driver::fingerprint_response::HealthState;
use nomad_proto::driver::{
    DestroyTaskRequest, DriverTaskEvent, ExitResult, FingerprintRequest, FingerprintResponse,
    NetworkOverride, RecoverTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig,
    TaskConfigSchemaRequest, TaskEventsRequest, TaskHandle, WaitTaskRequest,
};
use nomad_proto::{base, hclspec};

/// The plugin API version that every Nomad supports.
pub const API_VERSION: &str = "v0.1.0";
/// How long Nomad's client waits for a driver's first fingerprint.
const FINGERPRINT: Duration = Duration::from_secs(50);

/// The result of a start.
#[derive(Debug, Clone, PartialEq)]
pub struct StartedTask {
    /// The handle that Nomad would store.
    pub handle: TaskHandle,
    /// The address at which the task is reached, when it has a network of its own.
    pub network: Option<NetworkOverride>,
}

impl Plugin {
    /// `PluginInfo`, checked as Nomad's loader checks it: a driver that supports [`API_VERSION`].
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

    /// The stream of fingerprints and its first item, which must arrive within Nomad's time limit.
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

    /// Succeeds if the driver accepts tasks; the error contains the driver's own description of why it does not.
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

    /// The wire form of one start of the allocation's task, with its `config` encoded by the driver's schema.
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

    /// `StartTask`. Returns the handle; a response without one is an error.
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

    /// `WaitTask`: waits for the exit of a task. An exit with an error text is returned with [`TaskExit::error`] set.
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
            // Out of range only for times that no job file can contain.
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

    /// `RecoverTask`, with the handle that a start returned.
    pub async fn recover(&self, handle: TaskHandle) -> Result<(), HostError> {
        let request = RecoverTaskRequest {
            task_id: String::new(),
            handle: Some(handle),
        };
        let answer = self.driver().recover_task(request).await;
        answer.map(drop).map_err(HostError::call("RecoverTask"))
    }

    /// The stream of task events.
    pub async fn events(&self) -> Result<TaskEvents, HostError> {
        let answer = self.driver().task_events(TaskEventsRequest {}).await;
        let answer = answer.map_err(HostError::call("TaskEvents"))?;
        Ok(answer.into_inner())
    }
}

/// The events of all tasks of a plugin, as they happen.
pub type TaskEvents = Streaming<DriverTaskEvent>;

/// How a task exited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExit {
    /// The exit code as in a shell: the status, or 128 + signal.
    pub code: i32,
    /// The signal that killed it, or 0.
    pub signal: i32,
    /// Whether the OOM killer killed it.
    pub oom_killed: bool,
    /// The driver's error text for an exit that was no success: why the command did not run, or why the exit status is
    /// not known.
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

    /// Whether code and signal are the task's own, rather than placeholders for an exit that the driver did not see: the
    /// error of such an exit begins with `unknown_end`.
    pub fn is_known(&self, unknown_end: &str) -> bool {
        let unknown = |error: &String| error.starts_with(unknown_end);
        !self.error.as_ref().is_some_and(unknown)
    }
}
