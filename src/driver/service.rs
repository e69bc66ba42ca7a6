//! The driver service: decode, one call, encode; one short method per RPC. Calls that change a task run in a task separate from
//! the handler, so that an agent that dies in the middle leaves nothing half done.

use std::sync::Arc;

use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};

use super::exec::ExecStream;
use super::status::CallError;
use super::stream::{EventStream, ProducerStream, StatsStream};
use super::{Config, Driver, convert};
use crate::blocking;
use crate::config::{self, Validated};
use crate::container::{Description, Started};
use crate::proto::driver as proto;
use crate::proto::driver::driver_capabilities::FsIsolation;
use crate::proto::driver::driver_server::Driver as DriverService;
use crate::proto::driver::network_isolation_spec::NetworkIsolationMode;
use crate::signal::Signal;
use crate::task::{TaskError, TaskInfo, handle};

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(result: Result<T, CallError>) -> Answer<T> {
    Ok(Response::new(result?))
}

fn capabilities() -> proto::DriverCapabilities {
    proto::DriverCapabilities {
        send_signals: true,
        exec: true,
        fs_isolation: FsIsolation::Image.into(),
        network_isolation_modes: vec![
            NetworkIsolationMode::Host.into(),
            NetworkIsolationMode::Group.into(),
        ],
        ..Default::default()
    }
}

#[tonic::async_trait]
impl DriverService for Driver {
    async fn init(&self, _: Request<proto::InitRequest>) -> Answer<proto::InitResponse> {
        // A host that reattaches after Shutdown is served again.
        self.set_closing(false);
        Ok(Response::new(proto::InitResponse {}))
    }

    async fn shutdown(
        &self,
        _: Request<proto::ShutdownRequest>,
    ) -> Answer<proto::ShutdownResponse> {
        self.set_closing(true);
        Ok(Response::new(proto::ShutdownResponse {}))
    }

    async fn task_config_schema(
        &self,
        _: Request<proto::TaskConfigSchemaRequest>,
    ) -> Answer<proto::TaskConfigSchemaResponse> {
        let spec = Some(config::task_schema());
        Ok(Response::new(proto::TaskConfigSchemaResponse { spec }))
    }

    async fn capabilities(
        &self,
        _: Request<proto::CapabilitiesRequest>,
    ) -> Answer<proto::CapabilitiesResponse> {
        let capabilities = Some(capabilities());
        Ok(Response::new(proto::CapabilitiesResponse { capabilities }))
    }

    type FingerprintStream = ProducerStream<proto::FingerprintResponse>;

    async fn fingerprint(
        &self,
        _: Request<proto::FingerprintRequest>,
    ) -> Answer<Self::FingerprintStream> {
        Ok(Response::new(self.fingerprint_stream()))
    }

    async fn start_task(
        &self,
        request: Request<proto::StartTaskRequest>,
    ) -> Answer<proto::StartTaskResponse> {
        let task = request
            .into_inner()
            .task
            .ok_or(CallError::Missing("task"))?;
        self.note_alloc_dir(&task.alloc_dir);
        let driver = self.clone();
        let (caller, outcome) = oneshot::channel();
        self.calls.spawn(async move {
            let id = task.id.clone();
            let started = driver.start(task).await;
            if let Err(Ok(_)) = caller.send(started) {
                // The agent died before it received the handle, so it could never ask for this task again.
                driver.destroy_unclaimed(&id).await;
            }
        });
        answer(or_pending(outcome.await.unwrap_or(Err(CallError::Panicked))).await)
    }

    async fn recover_task(
        &self,
        request: Request<proto::RecoverTaskRequest>,
    ) -> Answer<proto::RecoverTaskResponse> {
        let handle = request
            .into_inner()
            .handle
            .ok_or(CallError::Missing("handle"))?;
        if let Some(task) = &handle.config {
            self.note_alloc_dir(&task.alloc_dir);
        }
        let (info, started) = decode_handle(handle)?;
        let driver = self.clone();
        let recovered = self.run_to_completion(async move { driver.recover(info, started).await });
        answer(recovered.await.map(|()| proto::RecoverTaskResponse {}))
    }

    async fn wait_task(
        &self,
        request: Request<proto::WaitTaskRequest>,
    ) -> Answer<proto::WaitTaskResponse> {
        // A DestroyTask may overtake it, and the container that it kills still has an exit.
        let task = self
            .tasks
            .get_any(&request.into_inner().task_id)
            .map_err(CallError::from)?;
        match task.wait().await {
            Some(Ok(exit)) => Ok(Response::new(convert::wait_response(&exit))),
            Some(Err(error)) => Err(CallError::from(error).into()),
            // This process is shutting down. Nomad would take any response for the exit of the task, but not a closed connection.
            None => std::future::pending().await,
        }
    }

    async fn stop_task(
        &self,
        request: Request<proto::StopTaskRequest>,
    ) -> Answer<proto::StopTaskResponse> {
        let request = request.into_inner();
        let Ok(task) = self.tasks.get(&request.task_id) else {
            // Nomad would retry an error for minutes, for a task that does not exist.
            return Ok(Response::new(proto::StopTaskResponse {}));
        };
        let signal = parse_signal(&request.signal)?;
        let grace = convert::duration(request.timeout);
        let stopped = self.run_to_completion(async move {
            match task.stop(signal, grace).await {
                Ok(()) | Err(TaskError::Unknown) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        answer(stopped.await.map(|()| proto::StopTaskResponse {}))
    }

    async fn destroy_task(
        &self,
        request: Request<proto::DestroyTaskRequest>,
    ) -> Answer<proto::DestroyTaskResponse> {
        let request = request.into_inner();
        let driver = self.clone();
        let destroyed = self.run_to_completion(async move {
            let backend = driver.config()?.backend;
            Ok(driver
                .tasks
                .destroy(backend, &request.task_id, request.force)
                .await?)
        });
        answer(destroyed.await.map(|()| proto::DestroyTaskResponse {}))
    }

    async fn inspect_task(
        &self,
        request: Request<proto::InspectTaskRequest>,
    ) -> Answer<proto::InspectTaskResponse> {
        let task = self
            .tasks
            .get(&request.into_inner().task_id)
            .map_err(CallError::from)?;
        let addresses = task.addresses().await;
        Ok(Response::new(convert::inspect_response(&task, &addresses)))
    }

    async fn signal_task(
        &self,
        request: Request<proto::SignalTaskRequest>,
    ) -> Answer<proto::SignalTaskResponse> {
        let request = request.into_inner();
        let task = self.tasks.get(&request.task_id).map_err(CallError::from)?;
        let signal: Signal = request.signal.parse().map_err(CallError::from)?;
        let sent = self.run_to_completion(async move { Ok(task.signal(signal).await?) });
        answer(sent.await.map(|()| proto::SignalTaskResponse {}))
    }

    type TaskStatsStream = StatsStream;

    async fn task_stats(
        &self,
        request: Request<proto::TaskStatsRequest>,
    ) -> Answer<Self::TaskStatsStream> {
        let request = request.into_inner();
        let task = self.tasks.get(&request.task_id).ok();
        let every = convert::duration(request.collection_interval);
        Ok(Response::new(self.stats_stream(task, every)))
    }

    type TaskEventsStream = EventStream;

    async fn task_events(
        &self,
        _: Request<proto::TaskEventsRequest>,
    ) -> Answer<Self::TaskEventsStream> {
        Ok(Response::new(self.event_stream()))
    }

    async fn exec_task(
        &self,
        request: Request<proto::ExecTaskRequest>,
    ) -> Answer<proto::ExecTaskResponse> {
        let answer = self.exec_to_end(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    type ExecTaskStreamingStream = ExecStream;

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<proto::ExecTaskStreamingRequest>>,
    ) -> Answer<Self::ExecTaskStreamingStream> {
        Ok(Response::new(self.exec_stream(request.into_inner()).await?))
    }

    async fn create_network(
        &self,
        _: Request<proto::CreateNetworkRequest>,
    ) -> Answer<proto::CreateNetworkResponse> {
        Err(CallError::Unsupported("making the network of an allocation").into())
    }

    async fn destroy_network(
        &self,
        _: Request<proto::DestroyNetworkRequest>,
    ) -> Answer<proto::DestroyNetworkResponse> {
        Err(CallError::Unsupported("removing the network of an allocation").into())
    }
}

/// The job's signal; an empty name leaves the choice to the backend.
fn parse_signal(name: &str) -> Result<Option<Signal>, CallError> {
    let given = Some(name).filter(|name| !name.is_empty());
    Ok(given.map(str::parse).transpose()?)
}

impl Driver {
    async fn start(&self, task: proto::TaskConfig) -> Result<proto::StartTaskResponse, CallError> {
        self.refuse_when_closing()?;
        let config = self.config()?;
        let mut info = convert::task_info(&task);
        let Validated { spec, notes } = self.check(&task, &config).await?;
        let description = Arc::new(spec.description.clone());
        info.description = Some(Arc::clone(&description));
        self.emit_events(&info, &notes);
        let started = self.tasks.start(config.backend, info.clone(), spec).await?;
        self.emit_events(&info, &started.notes);
        let driver_state = self.encode_driver_state(&started, &description).await?;
        Ok(proto::StartTaskResponse {
            handle: Some(proto::TaskHandle {
                version: handle::VERSION,
                // Unchanged: Nomad finds the task by it after a restart.
                config: Some(task),
                state: proto::TaskState::Running.into(),
                driver_state,
            }),
            network_override: convert::network_override(&started),
            ..Default::default()
        })
    }

    /// Validates the configuration. Resolving paths may take long on a network file system, so this runs on a blocking thread.
    async fn check(
        &self,
        task: &proto::TaskConfig,
        config: &Config,
    ) -> Result<Validated, CallError> {
        let context = convert::task_context(task)?;
        let bytes = task.msgpack_driver_config.clone();
        let (plugin_config, search_path) =
            (config.plugin_config.clone(), Arc::clone(&self.search_path));
        let validated = blocking::run_start(move || {
            config::container(&bytes, &context, &plugin_config, &search_path)
        });
        Ok(validated.await?)
    }

    /// The driver state for Nomad to store. Without it the task could never be recovered, so on failure the task is killed.
    async fn encode_driver_state(
        &self,
        started: &Started,
        description: &Description,
    ) -> Result<Vec<u8>, CallError> {
        match handle::encode(started, Some(description)) {
            Ok(state) => Ok(state),
            Err(error) => {
                self.destroy_unclaimed(&started.id).await;
                Err(error.into())
            }
        }
    }

    /// Kills and removes a task that the agent can't ask for, because it never received its handle.
    async fn destroy_unclaimed(&self, id: &str) {
        tracing::warn!(
            task = id,
            "the agent has no handle of the task: it is killed and removed"
        );
        self.destroy_by_force(id).await;
    }

    /// Kills and removes a task. Logs an error if that fails.
    pub(super) async fn destroy_by_force(&self, id: &str) {
        let destroyed = match self.config() {
            Ok(config) => self
                .tasks
                .destroy(config.backend, id, true)
                .await
                .map_err(CallError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = destroyed {
            tracing::error!(
                task = id,
                error = crate::backend::chain(&error),
                "the task could not be removed"
            );
        }
    }

    async fn recover(&self, info: TaskInfo, started: Started) -> Result<(), CallError> {
        let backend = self.config()?.backend;
        let id = info.id.clone();
        self.recovered.send_replace(());
        let recovered = self.tasks.recover(backend, info, started).await;
        self.recovered.send_replace(());
        recovered?;
        tracing::info!(task = id, "recovered");
        Ok(())
    }

    fn emit_events(&self, info: &TaskInfo, notes: &[String]) {
        for note in notes {
            self.events.publish(info, note);
        }
    }

    /// Runs a call to completion even if the caller goes away, and turns its panic into an error of this call alone.
    async fn run_to_completion<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, CallError>> + Send + 'static,
    ) -> Result<T, CallError> {
        let result = self.calls.spawn(call).await;
        or_pending(result.unwrap_or(Err(CallError::Panicked))).await
    }
}

/// The result of a call, unless the shutdown of this process interrupted it: then no response is sent. Nomad would take any
/// error for the failure of the task; when the connection closes and this process has exited, it starts a new plugin, recovers
/// its tasks and repeats an interrupted StartTask with the same id.
async fn or_pending<T>(result: Result<T, CallError>) -> Result<T, CallError> {
    match result {
        Err(CallError::Task(TaskError::ShuttingDown)) => std::future::pending().await,
        result => result,
    }
}

/// Decodes the task info and the driver state from a handle. The rest, mostly the job's configuration, is dropped here, because
/// recovery does not need it.
fn decode_handle(handle: proto::TaskHandle) -> Result<(TaskInfo, Started), CallError> {
    let config = handle.config.ok_or(CallError::Missing("handle.config"))?;
    let mut info = convert::task_info(&config);
    let started = handle::decode(handle.version, &handle.driver_state, &info.id)?;
    info.description = handle::decode_description(&handle.driver_state).map(Arc::new);
    Ok((info, started))
}
