//! Starts a container. First removes the earlier starts of the same task, then only goes forward: prepares the new start
//! (`prepare`), launches its supervisor, and waits until the container is up.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::filters::StartFilters;
use super::prepare::{Host, prepare};
use super::remove::refuse_later_form;
use super::{NspawnBackend, io_error};
use crate::backend::{BackendError, chain};
use crate::blocking;
use crate::cgroup::prepare_moves;
use crate::container::{Cause, ContainerSpec, Link, NetworkNamespace, Started};
use crate::failpoint::{self, Failpoint};
use crate::lease::SharedLocks;
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::state_dir::{self, StateDirError};
use crate::state::{TaskDir, TaskLock};
use crate::supervisor::{self, StartFailure, StartStep, Status, SupervisorClient, client};

/// A container that is not up within this time is given up. Copying a large ephemeral root takes minutes; nothing takes longer.
const START_TIMEOUT: Duration = Duration::from_secs(600);

impl NspawnBackend {
    /// Starts a container. After an error nothing of it is left.
    pub(super) async fn start_container(
        &self,
        spec: ContainerSpec,
    ) -> Result<Arc<Started>, BackendError> {
        // Nothing waits for it but the supervisor's first cgroup, some milliseconds later.
        drop(tokio::task::spawn_blocking(prepare_moves));
        let (machine, task_dir) = (
            spec.identity.machine.clone(),
            self.task_dir(&spec.identity.id),
        );
        let (settings, id, name) = (
            Arc::clone(&self.settings),
            spec.identity.id.clone(),
            machine.clone(),
        );
        let earlier =
            blocking::run_start(move || earlier_starts(&settings.state_dir, &id, &name)).await?;
        for start in earlier {
            self.remove_start(&start).await?;
        }
        let started = self.start_new(spec).await;
        if started.is_err()
            && let Err(error) = self.remove_start(&task_dir).await
        {
            let error = chain(&error);
            tracing::error!(machine, error, "a failed start could not be removed");
        }
        started
    }

    /// Starts a container that has no earlier starts: once more if captured seccomp filters can't be installed. After an error the caller
    /// removes what is there of it.
    async fn start_new(&self, spec: ContainerSpec) -> Result<Arc<Started>, BackendError> {
        let (machine, task_dir) = (
            spec.identity.machine.clone(),
            self.task_dir(&spec.identity.id),
        );
        let limit = START_TIMEOUT + spec.payload.readiness.limit();
        let (client, filters, lock) = self.launch(spec.clone()).await?;
        let up = wait_until_up(&client, &task_dir, limit).await;
        // The supervisor holds it by now.
        drop(lock);
        let Some(captured) = filters.captured() else {
            return up.map_err(|failure| failed(machine, failure));
        };
        match up {
            Ok(started) => {
                let installed = (started.leader, started.filters);
                self.filters.keep(installed, &captured.filters);
                Ok(started)
            }
            Err(failure) if failure.step == StartStep::Filters => {
                self.captured
                    .give_up(captured.kind(), &self.settings, &failure.reason);
                self.remove_start(&task_dir).await?;
                let (client, _, lock) = self.launch(spec).await?;
                let up = wait_until_up(&client, &task_dir, limit).await;
                drop(lock);
                up.map_err(|failure| failed(machine, failure))
            }
            Err(failure) => Err(failed(machine, failure)),
        }
    }

    /// Prepares a start in a new, locked task directory and launches its supervisor: one call that may block. The third part of the result is the lock
    /// of the range of ids that was picked.
    async fn launch(
        &self,
        spec: ContainerSpec,
    ) -> Result<(SupervisorClient, StartFilters, Option<SharedLocks>), BackendError> {
        let installed = self.installed.get(&self.settings).await;
        let (program, version) =
            installed.map_err(|error| error.of_start(&spec.identity.machine))?;
        let host = Host {
            program,
            version,
            kernel: self.kernel,
        };
        let (settings, tracker) = (Arc::clone(&self.settings), self.tracker.clone());
        let (init, task_dir) = (Arc::clone(&self.init), self.task_dir(&spec.identity.id));
        let captured = Arc::clone(&self.captured);
        // Before its network is made, so that no later reload is missed.
        let reloads = has_own_network(&spec).then(|| *self.reloads.watch().borrow());
        let notes = self.notes.about(&spec.identity.id);
        let place = task_dir.clone();
        let launched = blocking::run_start(move || {
            let lock = TaskLock::create(&place)
                .map_err(|source| io_error("creating the directory", place.path(), source))?;
            let no_supervisor = |error| {
                let failure = watch_failure("its supervisor can't be started", &error);
                failed(spec.identity.machine.clone(), failure)
            };
            let init = init_binary(&init, &settings.state_dir).map_err(no_supervisor)?;
            let filters = captured.of_start(&spec, &host.program, &settings, || init.try_clone());
            let range = prepare(&spec, &place, host, &filters, &settings)?;
            failpoint::hit(&place, Failpoint::OrderWritten);
            let client = client::launch(&settings.binary, &place, init, notes, &tracker)
                .map_err(no_supervisor)?;
            Ok((lock, client, filters, range))
        });
        let (lock, client, filters, range) = launched.await?;
        self.registry.set_lock(&task_dir, lock);
        self.registry.set_client(&task_dir, client.clone());
        if let Some(reloads) = reloads {
            self.registry.set_checked_reloads(&task_dir, reloads);
        }
        Ok((client, filters, range))
    }
}

/// Whether the driver makes a network for it.
fn has_own_network(spec: &ContainerSpec) -> bool {
    match &spec.network.namespace {
        NetworkNamespace::Private { link, .. } => *link != Link::None,
        _ => false,
    }
}

/// The starts of this task that have a task directory, an interrupted one of the same id among them. Usually there are none. The
/// state directory is checked first, because its content is trusted. If a later driver made one of the starts, none may be ended.
fn earlier_starts(state_dir: &Path, id: &str, machine: &str) -> Result<Vec<TaskDir>, BackendError> {
    state_dir::secure(state_dir).map_err(|error| match error {
        StateDirError::Io { path, source } => io_error("creating the directory", &path, source),
        refused => BackendError::Unsupported {
            machine: machine.to_owned(),
            reason: refused.to_string(),
        },
    })?;
    let mut starts = TaskDir::previous_starts(state_dir, id)
        .map_err(|source| io_error("listing the starts in", state_dir, source))?;
    let own = TaskDir::for_task(state_dir, id);
    if own.path().symlink_metadata().is_ok() {
        starts.push(own);
    }
    let refused = starts
        .iter()
        .try_for_each(|start| refuse_later_form(start, machine));
    refused.map(|()| starts)
}

/// Waits until the container is up, or has failed to come up.
async fn wait_until_up(
    client: &SupervisorClient,
    task_dir: &TaskDir,
    limit: Duration,
) -> Result<Arc<Started>, StartFailure> {
    match tokio::time::timeout(limit, client.start_outcome()).await {
        Ok(Status::Up(started)) => Ok(started),
        Ok(Status::Failed(failure)) => Err((*failure).clone()),
        // The command exited before the event of its start was read.
        Ok(Status::Ended(_)) => recorded(task_dir).await,
        Ok(Status::Starting) => {
            let reason = "its supervisor exited without a report: look for killed processes in the kernel log";
            Err(StartFailure::new(StartStep::Watch, Cause::Unknown, reason))
        }
        Err(_) => {
            let limit = limit.as_secs();
            let reason = format!("the container did not come up within {limit} s");
            let (step, cause) = (StartStep::Nspawn, Cause::Resources);
            Err(StartFailure::new(step, cause, reason))
        }
    }
}

/// The container according to its running record.
async fn recorded(task_dir: &TaskDir) -> Result<Arc<Started>, StartFailure> {
    let place = task_dir.clone();
    let running = blocking::run(move || place.running()).await;
    running
        .map(|running| Arc::new(running.started))
        .map_err(|error| watch_failure("its running record can't be read", &error))
}

fn failed(machine: String, failure: StartFailure) -> BackendError {
    BackendError::Start {
        machine,
        step: failure.step.as_str(),
        cause: failure.cause(),
        reason: failure.reason,
    }
}

fn watch_failure(what: &str, error: &io::Error) -> StartFailure {
    let cause = cause_of_host_error(error);
    StartFailure::new(StartStep::Watch, cause, format!("{what}: {error}"))
}

/// The binary of the container init, made on first use. Two concurrent callers may both make it; one of the two is kept.
pub(super) fn init_binary(made: &OnceLock<OwnedFd>, state_dir: &Path) -> io::Result<OwnedFd> {
    if let Some(program) = made.get() {
        return program.try_clone();
    }
    let program = supervisor::init_channel::init_binary(state_dir)?;
    made.get_or_init(|| program).try_clone()
}
