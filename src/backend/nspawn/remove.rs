//! Removes a start: ends its supervisor and its processes, releases its resources and removes its task directory.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::{NspawnBackend, Timeouts, io_error};
use crate::backend::BackendError;
use crate::blocking;
use crate::cleanup;
use crate::cleanup::orphans::{self, SupervisorProcess};
use crate::container::StartNotes;
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
        let _lock = match self.registry.is_locked(task_dir) {
            true => None,
            false => lock_task_dir(task_dir).await?,
        };
        self.remove_locked(task_dir).await
    }

    /// The same for a start that the caller has locked.
    pub(super) async fn remove_locked(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let place = task_dir.clone();
        let Some(machine) = blocking::run(move || begin_removal(&place)).await? else {
            self.registry.forget(task_dir);
            return Ok(());
        };
        let stuck = |reason| BackendError::Stuck {
            machine: machine.clone(),
            reason,
        };
        if !self.end_supervisor(task_dir).await {
            let limit = REQUEST_TIMEOUT.as_secs();
            return Err(stuck(format!(
                "its supervisor still runs {limit} s after it was killed: look for the process in state D"
            )));
        }
        self.reloads.settled().await;
        let place = task_dir.clone();
        let removed = tokio::task::spawn_blocking(move || kill_and_remove(&place)).await;
        self.registry.forget(task_dir);
        match removed.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            // It has acquired a resource of a kind that this driver does not know.
            Err(error) if task_dir::is_of_later_form(&error) => {
                Err(later_form(task_dir, &machine, &error))
            }
            removed => removed.map_err(|error| stuck(error.to_string())),
        }
    }

    /// Ends the supervisor of a start and with it the container; `false` if it is still alive [`REQUEST_TIMEOUT`] after it was
    /// killed.
    async fn end_supervisor(&self, task_dir: &TaskDir) -> bool {
        self.end_via_supervisor(task_dir).await;
        let place = task_dir.clone();
        blocking::run(move || kill_supervisor(&place)).await;
        if let Some(known) = self.registry.client(task_dir) {
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, known.wait_until_gone()).await;
        }
        wait_until_supervisor_exits(task_dir).await
    }

    /// Lets the supervisor of this task directory kill its container and release everything. Returns when it has exited, or is to
    /// be killed because it has not reported the container's end, or not released everything, in time. A supervisor that is just
    /// starting does not listen yet, so this is repeated until it is gone.
    async fn end_via_supervisor(&self, task_dir: &TaskDir) {
        let Timeouts { kill, release } = self.settings.timeouts;
        let end = Instant::now() + kill;
        loop {
            if let Some(client) = self.connect(task_dir).await
                && tokio::time::timeout_at(end, kill_container(&client))
                    .await
                    .is_ok()
            {
                let released = wait_for_release(task_dir, &client);
                if tokio::time::timeout(release, released).await.is_err()
                    || wait_until_supervisor_exits(task_dir).await
                {
                    return;
                }
            }
            if !has_supervisor(task_dir).await || Instant::now() >= end {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The supervisor of this task directory, whichever process launched it, if it listens.
    async fn connect(&self, task_dir: &TaskDir) -> Option<SupervisorClient> {
        // A client whose supervisor has exited may hide a new supervisor that another process has started.
        let known = self.registry.client(task_dir);
        let known = known.filter(SupervisorClient::is_connected);
        if known.is_some() {
            return known;
        }
        let place = task_dir.clone();
        let client = match blocking::run(move || running_in_this_boot(&place)).await {
            Some(running) => {
                client::attach(
                    task_dir,
                    &running.started,
                    StartNotes::default(),
                    &self.tracker,
                )
                .await
            }
            None => client::attach_unrecorded(task_dir, &self.tracker)
                .await
                .map(Some),
        };
        client.ok().flatten()
    }
}

/// Requests the end of the container, unless its supervisor has reported it, and waits until it has.
async fn kill_container(client: &SupervisorClient) {
    if matches!(client.status(), Status::Starting | Status::Up(_)) {
        // An answer adds nothing: the end is reported.
        let _ = client.request(Action::Kill).await;
    }
    client.end().await;
}

/// Waits until the supervisor of a container that has ended has released everything.
async fn wait_for_release(task_dir: &TaskDir, client: &SupervisorClient) {
    if client.is_connected() {
        let place = task_dir.clone();
        blocking::run(move || failpoint::hit(place, Failpoint::AwaitingRelease)).await;
    }
    client.wait_until_disconnected().await;
}

/// The living supervisors of a start without a running record, which would name its supervisor.
fn find_supervisors_by_cmdline(task_dir: &TaskDir) -> Vec<SupervisorProcess> {
    if !task_dir.has_supervisor() {
        return Vec::new();
    }
    orphans::supervisors_of(task_dir)
}

/// Checks whether this driver may remove a start, and sends SIGCONT to its supervisors, in case they were SIGSTOPped. Returns its
/// machine name; `None` if there is no start.
fn begin_removal(task_dir: &TaskDir) -> Result<Option<String>, BackendError> {
    if !task_dir.path().exists() {
        return Ok(None);
    }
    let machine = task_dir.launch_spec().map_or_else(
        |_| task_dir.path().display().to_string(),
        |launch_spec| launch_spec.machine,
    );
    refuse_later_form(task_dir, &machine)?;
    match running_in_this_boot(task_dir) {
        Some(running) => client::sigcont(running.started.supervisor),
        None => find_supervisors_by_cmdline(task_dir)
            .iter()
            .for_each(SupervisorProcess::sigcont),
    }
    Ok(Some(machine))
}

fn kill_and_remove(task_dir: &TaskDir) -> io::Result<()> {
    failpoint::hit(task_dir, Failpoint::Removing);
    cleanup::kill_and_release(task_dir)?;
    task_dir.remove()
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

/// Fails if a later driver made this start, see [`TaskDir::refuse_later_form`].
pub(super) fn refuse_later_form(task_dir: &TaskDir, machine: &str) -> Result<(), BackendError> {
    let refused = task_dir.refuse_later_form();
    refused.map_err(|error| later_form(task_dir, machine, &error))
}

fn later_form(task_dir: &TaskDir, machine: &str, error: &io::Error) -> BackendError {
    BackendError::Unsupported {
        machine: machine.to_owned(),
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
