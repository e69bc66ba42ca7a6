//! Removes a start: ends its supervisor and its processes, releases its resources and removes its task directory.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::{NspawnBackend, io_error};
use crate::backend::BackendError;
use crate::blocking;
use crate::cleanup;
use crate::cleanup::orphans::{self, SupervisorProcess};
use crate::failpoint::{self, Failpoint};
use crate::state::task_dir::{self, Running};
use crate::state::{TaskDir, TaskLock};
use crate::supervisor::{Action, REQUEST_TIMEOUT, Status, SupervisorClient, client};
use crate::sys::kernel;

/// How often to check whether a supervisor that can't be asked is gone.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

impl NspawnBackend {
    /// Kills and releases everything of the start in this task directory, and removes the directory. If another process is about
    /// to do the same, waits for it, so that a new start at the same path is not taken for the one that is being removed.
    pub(super) async fn remove_start(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let claimed = self.registry.is_locked(task_dir);
        let _claim = match claimed {
            true => None,
            false => lock_task_dir(task_dir).await?,
        };
        self.remove_locked(task_dir).await
    }

    pub(super) async fn remove_locked(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let place = task_dir.clone();
        let Some(machine) = blocking::run(move || roused(&place)).await else {
            self.registry.forget(task_dir);
            return Ok(());
        };
        self.kill_via_supervisor(task_dir).await;
        let place = task_dir.clone();
        blocking::run(move || kill_supervisor(&place)).await;
        if let Some(known) = self.registry.client(task_dir) {
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, known.wait_until_gone()).await;
        }
        if !wait_until_supervisor_exits(task_dir).await {
            return Err(BackendError::Stuck {
                machine,
                reason: format!(
                    "its supervisor still runs {} s after it was killed: look for the process in state D",
                    REQUEST_TIMEOUT.as_secs()
                ),
            });
        }
        let place = task_dir.clone();
        let ended = tokio::task::spawn_blocking(move || {
            failpoint::hit(&place, Failpoint::Removing);
            cleanup::kill_and_release(&place).and_then(|()| place.remove())
        })
        .await;
        self.registry.forget(task_dir);
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if task_dir::is_of_later_form(&error) => {
                Err(later_form(task_dir, machine, &error))
            }
            Ok(Err(error)) => Err(BackendError::Stuck {
                machine,
                reason: error.to_string(),
            }),
            Err(error) => Err(BackendError::Stuck {
                machine,
                reason: error.to_string(),
            }),
        }
    }

    /// Kills the supervisor of this task directory with its container. A supervisor that is just starting can't be asked yet, so
    /// the request is repeated until it is gone.
    async fn kill_via_supervisor(&self, task_dir: &TaskDir) {
        let end = Instant::now() + REQUEST_TIMEOUT;
        loop {
            if let Some(client) = self.connect(task_dir).await {
                let _ = tokio::time::timeout(REQUEST_TIMEOUT, client.request(Action::Kill)).await;
                let _ = tokio::time::timeout(REQUEST_TIMEOUT, client.wait_until_gone()).await;
            } else {
                client::request_kill(task_dir).await;
            }
            if !has_supervisor(task_dir).await || Instant::now() >= end {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The supervisor of this task directory, whichever process launched it, if it is alive.
    async fn connect(&self, task_dir: &TaskDir) -> Option<SupervisorClient> {
        // A client whose supervisor has exited may hide a new supervisor that another process has started.
        let known = self
            .registry
            .client(task_dir)
            .filter(|known| matches!(known.status(), Status::Starting | Status::Up(_)));
        if known.is_some() {
            return known;
        }
        let place = task_dir.clone();
        let running = blocking::run(move || running_in_this_boot(&place)).await?;
        client::attach(task_dir, &running.started, &self.tracker)
            .await
            .ok()
            .flatten()
    }
}

/// The living supervisors of a start without a running record, which would name its supervisor.
fn find_supervisors_by_cmdline(task_dir: &TaskDir) -> Vec<SupervisorProcess> {
    if !task_dir.has_supervisor() {
        return Vec::new();
    }
    orphans::supervisors_of(task_dir)
}

/// Sends SIGCONT to the supervisors of a start, in case they were SIGSTOPped, and returns its machine name; `None` if there is no
/// start.
fn roused(task_dir: &TaskDir) -> Option<String> {
    if !task_dir.path().exists() {
        return None;
    }
    match running_in_this_boot(task_dir) {
        Some(running) => client::sigcont(running.started.supervisor),
        None => find_supervisors_by_cmdline(task_dir)
            .iter()
            .for_each(SupervisorProcess::sigcont),
    }
    let launch_spec = task_dir.launch_spec();
    Some(launch_spec.map_or_else(
        |_| task_dir.path().display().to_string(),
        |launch_spec| launch_spec.machine,
    ))
}

/// Kills the supervisors of a start that have not exited.
fn kill_supervisor(task_dir: &TaskDir) {
    match running_in_this_boot(task_dir) {
        Some(running) => cleanup::kill(running.started.supervisor),
        None => find_supervisors_by_cmdline(task_dir)
            .iter()
            .for_each(SupervisorProcess::end),
    }
}

/// Fails if a later driver has written the launch spec of one of these starts: this driver can't release what it has acquired, so
/// none of them may be ended.
pub(super) async fn refuse_later_form(
    starts: &[TaskDir],
    machine: &str,
) -> Result<(), BackendError> {
    for task_dir in starts {
        let place = task_dir.clone();
        // A launch spec that is missing or broken prevents no removal, and a start that has been released only needs its directory
        // removed.
        let refused = blocking::run_start(move || {
            let error = place.launch_spec().err()?;
            (task_dir::is_of_later_form(&error) && !place.is_freed()).then_some(error)
        });
        if let Some(error) = refused.await {
            return Err(later_form(task_dir, machine.to_owned(), &error));
        }
    }
    Ok(())
}

fn later_form(task_dir: &TaskDir, machine: String, error: &io::Error) -> BackendError {
    BackendError::Unsupported {
        machine,
        reason: format!(
            "{}: {error}; install the driver that wrote it, or remove the directory",
            task_dir.path().display()
        ),
    }
}

async fn has_supervisor(task_dir: &TaskDir) -> bool {
    let place = task_dir.clone();
    blocking::run(move || place.has_supervisor()).await
}

/// Waits until no supervisor of this start is alive; `false` if one still is after [`REQUEST_TIMEOUT`].
async fn wait_until_supervisor_exits(task_dir: &TaskDir) -> bool {
    let end = Instant::now() + REQUEST_TIMEOUT;
    while has_supervisor(task_dir).await {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    true
}

/// The running record of a start, if it is of this boot: after a reboot its pids mean other processes.
fn running_in_this_boot(task_dir: &TaskDir) -> Option<Running> {
    let running = task_dir.running().ok()?;
    (kernel::boot_id().ok()? == running.started.boot).then_some(running)
}

/// Takes a shared lock on a start, if it exists.
async fn lock_task_dir(task_dir: &TaskDir) -> Result<Option<TaskLock>, BackendError> {
    let place = task_dir.clone();
    let taken = blocking::run(move || TaskLock::lock_shared(&place)).await;
    taken.map_err(|source| io_error("locking", task_dir.path(), source))
}
