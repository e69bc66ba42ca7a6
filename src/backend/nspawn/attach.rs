//! Recovers a container: checks the records that its handle names, and connects to its supervisor.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::remove::refuse_later_form;
use super::{NspawnBackend, boot_id, io_error};
use crate::backend::BackendError;
use crate::blocking;
use crate::cleanup::orphans;
use crate::container::{Exit, Started};
use crate::failpoint::{self, Failpoint};
use crate::state::{TaskDir, TaskLock};
use crate::supervisor::{Status, SupervisorClient, client};

/// How long a recovery waits for the first status of a supervisor that was found. It comes within a millisecond.
const FIRST_STATUS_TIMEOUT: Duration = Duration::from_secs(1);

impl NspawnBackend {
    pub(super) async fn find(&self, started: &Started) -> Result<Arc<Started>, BackendError> {
        let client = self.resolve(started).await?;
        let task_dir = TaskDir::new(&started.state);
        // The running record is trusted, not the handle.
        let handle = started.clone();
        let recorded = blocking::run(move || {
            let running = task_dir.running();
            running.map_or(handle, |running| running.started)
        });
        let Ok(status) = tokio::time::timeout(FIRST_STATUS_TIMEOUT, client.start_outcome()).await
        else {
            // The supervisor was found, but the process at its control socket gets no CPU time now. That is no reason to give it
            // up.
            return Ok(Arc::new(recorded.await));
        };
        match status {
            Status::Up(found) => Ok(found),
            Status::Ended(_) => Ok(Arc::new(recorded.await)),
            Status::Failed(failure) => Err(BackendError::Lost {
                machine: started.machine.clone(),
                reason: failure.reason.clone(),
            }),
            Status::Starting => Err(BackendError::Lost {
                machine: started.machine.clone(),
                reason: "its supervisor is gone".to_owned(),
            }),
        }
    }

    pub(super) async fn wait_for_exit(&self, started: &Started) -> Result<Exit, BackendError> {
        // Boxed, because this future waits as long as the container runs, and the state of `resolve` is needed only at its
        // beginning.
        let client = Box::pin(self.resolve(started)).await?;
        let exit = client.end().await;
        self.filters.remove(started.leader);
        exit.ok_or_else(|| BackendError::Lost {
            machine: started.machine.clone(),
            reason: "it never came up".to_owned(),
        })
    }

    /// The client for the container of a handle; connects again if necessary.
    pub(super) async fn resolve(
        &self,
        started: &Started,
    ) -> Result<SupervisorClient, BackendError> {
        let lost = |reason: &str| lost(started, reason);
        if boot_id()? != started.boot {
            return Err(lost("the host has been rebooted since"));
        }
        // The handle names the task directory, because an operator may have configured another state directory since. So the
        // directory is verified.
        let task_dir = TaskDir::new(&started.state);
        let state_dir = started.state.parent().unwrap_or_else(|| Path::new("/"));
        if TaskDir::for_task(state_dir, &started.id) != task_dir {
            return Err(lost(
                "the task directory in its handle has the name of another start",
            ));
        }
        if let Some(known) = self.registry.client(&task_dir) {
            return Ok(known);
        }
        let (place, handle) = (task_dir.clone(), started.clone());
        let (lock, recorded) = blocking::run(move || lock_and_sigcont(&place, &handle)).await?;
        let notes = self.notes.about(&started.id);
        let attached = client::attach(&task_dir, &recorded, notes, &self.tracker).await;
        let attached = attached
            .map_err(|source| io_error("connecting to", &task_dir.control_socket(), source))?;
        let client =
            attached.ok_or_else(|| lost("its supervisor is gone and has left no exit record"))?;
        self.registry.set_client(&task_dir, client.clone());
        self.registry.set_lock(&task_dir, lock);
        Ok(client)
    }
}

/// Locks the start of a handle, and sends SIGCONT to its supervisor, in case that was stopped. Returns the started container from its
/// running record. Fails if the record does not match the handle.
fn lock_and_sigcont(
    task_dir: &TaskDir,
    started: &Started,
) -> Result<(TaskLock, Started), BackendError> {
    let lost = |reason: &str| lost(started, reason);
    let no_record = || lost("its task directory is gone or has no running record");
    let lock = TaskLock::lock_shared(task_dir)
        .map_err(|source| io_error("locking", task_dir.path(), source))?
        .ok_or_else(no_record)?;
    let foreign = orphans::reason_not_ours(task_dir)
        .map_err(|source| io_error("checking", task_dir.path(), source))?;
    if let Some(reason) = foreign {
        return Err(lost(&format!(
            "its task directory can't be trusted: {reason}"
        )));
    }
    refuse_later_form(task_dir, &started.machine)?;
    let recorded = match task_dir.running() {
        Ok(running) => running.started,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(no_record());
        }
        Err(source) => {
            return Err(io_error(
                "reading the running record in",
                task_dir.path(),
                source,
            ));
        }
    };
    if (&recorded.id, recorded.leader) != (&started.id, started.leader) {
        return Err(lost(
            "the running record in its task directory is of another start",
        ));
    }
    failpoint::hit(task_dir, Failpoint::Recovering);
    client::sigcont(recorded.supervisor);
    Ok((lock, recorded))
}

fn lost(started: &Started, reason: &str) -> BackendError {
    BackendError::Lost {
        machine: started.machine.clone(),
        reason: reason.to_owned(),
    }
}
