//! Starts a container. Whatever an interrupted earlier start of the same task has left is removed first; after that the start only
//! goes forward: lock a new task directory, prepare, launch the supervisor, wait until the container is up.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::prepare::{Host, prepare};
use super::remove::refuse_later_form;
use super::{NspawnBackend, io_error};
use crate::backend::BackendError;
use crate::blocking;
use crate::container::{Cause, ContainerSpec, Started};
use crate::failpoint::{self, Failpoint};
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::state_dir::{self, StateDirError};
use crate::state::{TaskDir, TaskLock};
use crate::supervisor::{self, StartFailure, StartStep, Status, SupervisorClient, client};

/// A start that takes longer than this is aborted. Copying a large ephemeral root takes minutes; nothing takes longer.
const START_TIMEOUT: Duration = Duration::from_secs(600);

impl NspawnBackend {
    /// Removes what earlier starts of the same task have left. The state directory is checked first, because its content is trusted.
    pub(super) async fn remove_earlier(&self, spec: &ContainerSpec) -> Result<(), BackendError> {
        let settings = Arc::clone(&self.settings);
        let secured = blocking::run_start(move || state_dir::secure(&settings.state_dir)).await;
        secured.map_err(|error| match error {
            StateDirError::Io { path, source } => io_error("creating the directory", &path, source),
            refused => BackendError::Unsupported {
                machine: spec.identity.machine.clone(),
                reason: refused.to_string(),
            },
        })?;
        let (settings, id) = (Arc::clone(&self.settings), spec.identity.id.clone());
        let earlier =
            blocking::run_start(move || TaskDir::previous_starts(&settings.state_dir, &id)).await;
        let earlier = earlier.map_err(|source| {
            let place = &self.settings.state_dir;
            io_error("listing the starts in", place, source)
        })?;
        let mut occupied = vec![self.task_dir(&spec.identity.id)];
        occupied.extend(earlier);
        let (starts, machine) = (occupied.clone(), spec.identity.machine.clone());
        blocking::run_start(move || {
            starts
                .iter()
                .try_for_each(|start| refuse_later_form(start, &machine))
        })
        .await?;
        for earlier in occupied {
            self.remove_start(&earlier).await?;
        }
        Ok(())
    }

    /// Starts a container that has no leftovers. After an error the caller removes what is there of it.
    pub(super) async fn start_new(&self, spec: ContainerSpec) -> Result<Started, BackendError> {
        let (machine, task_dir) = (
            spec.identity.machine.clone(),
            self.task_dir(&spec.identity.id),
        );
        let installed = self.installed.get(&self.settings).await;
        let (program, version) = installed.map_err(|error| error.of_start(&machine))?;
        let host = Host {
            program,
            version,
            kernel: self.kernel,
        };
        self.create_task_dir(&task_dir).await?;
        let place = task_dir.clone();
        blocking::run_start(move || prepare(&spec, &place, host)).await?;
        let started = self.launch_supervisor(&task_dir).await;
        started.map_err(|failure| BackendError::Start {
            machine,
            step: failure.step.as_str(),
            cause: failure.cause(),
            reason: failure.reason,
        })
    }

    /// Creates and locks the task directory of a new start.
    async fn create_task_dir(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let place = task_dir.clone();
        let lock = blocking::run_start(move || TaskLock::create(&place)).await;
        let lock =
            lock.map_err(|source| io_error("creating the directory", task_dir.path(), source))?;
        self.registry.set_lock(task_dir, lock);
        Ok(())
    }

    async fn launch_supervisor(&self, task_dir: &TaskDir) -> Result<Started, StartFailure> {
        let (settings, tracker) = (Arc::clone(&self.settings), self.tracker.clone());
        let (first, place) = (Arc::clone(&self.first), task_dir.clone());
        let launched = blocking::run_start(move || {
            failpoint::hit(&place, Failpoint::OrderWritten);
            let program = init_binary(&first, &settings.state_dir)?;
            client::launch(&settings.binary, &place, program, &tracker)
        });
        let client = launched.await.map_err(|error| not_watched(&error))?;
        self.registry.set_client(task_dir, client.clone());
        wait_until_up(&client, task_dir).await
    }
}

/// Waits until the container is up, or has failed to come up.
async fn wait_until_up(
    client: &SupervisorClient,
    task_dir: &TaskDir,
) -> Result<Started, StartFailure> {
    match tokio::time::timeout(START_TIMEOUT, client.start_outcome()).await {
        Ok(Status::Up(started)) => Ok((*started).clone()),
        Ok(Status::Failed(failure)) => Err((*failure).clone()),
        // The command exited before the event of its start was read.
        Ok(Status::Ended(_)) => {
            let place = task_dir.clone();
            let running = blocking::run(move || place.running()).await;
            running
                .map(|running| running.started)
                .map_err(|error| not_watched(&error))
        }
        Ok(Status::Starting) => Err(StartFailure::new(
            StartStep::Watch,
            Cause::Unknown,
            "its supervisor exited without a report: look for killed processes in the kernel log",
        )),
        Err(_) => Err(StartFailure::new(
            StartStep::Nspawn,
            Cause::Resources,
            format!(
                "the container did not come up within {} s",
                START_TIMEOUT.as_secs()
            ),
        )),
    }
}

fn not_watched(error: &io::Error) -> StartFailure {
    let reason = format!("its supervisor can't be started: {error}");
    StartFailure::new(StartStep::Watch, cause_of_host_error(error), reason)
}

/// The binary of the container init, made on first use. Two concurrent callers may both make it; one of the two is kept.
fn init_binary(made: &OnceLock<OwnedFd>, state_dir: &Path) -> io::Result<OwnedFd> {
    if let Some(program) = made.get() {
        return program.try_clone();
    }
    let program = supervisor::init_channel::init_binary(state_dir)?;
    made.get_or_init(|| program).try_clone()
}
