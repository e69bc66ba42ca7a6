//! Kills and cleans up what dead plugins left in the state directory and in the cgroups, if no living plugin has locked it, no other
//! agent can ask for it, and no later driver made it. Logs each thing it does in a line of its own; a failure is logged and left for
//! the next plugin. Touches nothing unless `cleanup::orphans` is certain that the driver made it, and nothing that according to
//! `state::owner` belongs to another agent.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use super::NspawnBackend;
use crate::backend::chain;
use crate::blocking;
use crate::cleanup::orphans::{self, Scan, SupervisorProcess};
use crate::network;
use crate::state::lock::TryLock;
use crate::state::owner::{self, Owner};
use crate::state::{TaskDir, TaskLock};
use crate::sys::kernel;
use crate::sys::process::is_alive;

/// When a locked start is tried again before it is skipped, in milliseconds. A process that is just being forked keeps its
/// parent's descriptors, and so the lock, until it executes its own program, which takes a while on a busy host.
const RETRY_DELAYS: [u64; 6] = [0, 2, 10, 50, 200, 800];

/// How an operator has a start ended that reconciliation leaves alone.
const REMOVE: &str = "remove this directory: a plugin ends what is left, `reconcile_after` after it was configured (never if that is 0)";

impl NspawnBackend {
    /// Cleans up everything below this state directory that no plugin has locked, and what belongs to it elsewhere.
    pub(super) async fn reconcile_state_dir(
        &self,
        state_dir: &Path,
        alloc_roots: &BTreeSet<PathBuf>,
    ) {
        let Scan {
            starts,
            not_ours: foreign,
        } = match run_in_state_dir(state_dir, orphans::scan).await {
            Ok(scan) => scan,
            Err(error) => {
                tracing::error!(path = %state_dir.display(), error, "the state directory can't be reconciled");
                return;
            }
        };
        for (path, reason) in foreign {
            if self.is_new(&path) {
                tracing::warn!(path = %path.display(), reason, "not removed: this driver did not make it");
            }
        }
        let mut locked = starts;
        for pause in RETRY_DELAYS {
            if !locked.is_empty() {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            let mut still = Vec::new();
            for task_dir in locked {
                if !self.reconcile_start(&task_dir, alloc_roots).await {
                    still.push(task_dir);
                }
            }
            locked = still;
        }
        // The supervisors of recorded starts are gone by now, or their starts are locked.
        let lost = |supervisor: &SupervisorProcess| supervisor.is_unrecorded();
        for supervisor in supervisors(state_dir, lost).await {
            let directory = supervisor.directory.clone();
            let pid = supervisor.handle.process().pid;
            let _ = tokio::task::spawn_blocking(move || supervisor.end()).await;
            tracing::info!(path = %directory.display(), pid, "ended a supervisor without records");
        }
        self.reconcile_cgroups(state_dir).await;
        reconcile_networks(state_dir).await;
    }

    /// Cleans up one start, unless it is locked, may belong to another agent or was made by a later driver; `false` if it is locked.
    async fn reconcile_start(&self, task_dir: &TaskDir, alloc_roots: &BTreeSet<PathBuf>) -> bool {
        let place = task_dir.clone();
        let attempt = tokio::task::spawn_blocking(move || try_lock_start(&place)).await;
        match attempt.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(LockAttempt::Busy) => return false,
            Ok(LockAttempt::Missing) => {}
            Ok(LockAttempt::OfLaterForm(error)) => self.log_later_form(task_dir, &error),
            Ok(LockAttempt::Start(lock, owner)) if is_own(&owner, alloc_roots) => {
                self.remove_and_log(task_dir).await;
                // Held until everything is done. A plugin that asks for this start meanwhile waits, and finds it gone.
                drop(lock);
            }
            Ok(LockAttempt::Start(_, owner)) => self.log_owner(task_dir, &owner, alloc_roots),
            Err(error) => {
                let path = task_dir.path().display();
                tracing::error!(%path, %error, "not removed: its task directory can't be locked");
            }
        }
        true
    }

    /// Removes a start that is locked here, and logs what it was.
    async fn remove_and_log(&self, task_dir: &TaskDir) {
        let place = task_dir.clone();
        let (what, task) = blocking::run(move || {
            let launch_spec = place.launch_spec();
            let task = launch_spec.map(|launch_spec| launch_spec.id);
            (describe(&place), task.unwrap_or_default())
        })
        .await;
        let path = task_dir.path().display();
        match self.remove_locked(task_dir).await {
            Ok(()) => tracing::info!(%path, task, "removed {what}"),
            Err(error) => {
                let error = chain(&error);
                tracing::error!(%path, error, "a start could not be removed");
            }
        }
    }

    /// Logs, once, that a later driver made a start, and what the operator can do.
    fn log_later_form(&self, task_dir: &TaskDir, error: &io::Error) {
        if self.is_new(task_dir.path()) {
            tracing::warn!(
                path = %task_dir.path().display(),
                %error,
                remedy = format!("install that version; if the task is not needed any more, {REMOVE}"),
                "not removed: a later version of this driver started it"
            );
        }
    }

    /// Logs, once, whose a start is that is not removed, and what the operator can do.
    fn log_owner(&self, task_dir: &TaskDir, owner: &Owner, alloc_roots: &BTreeSet<PathBuf>) {
        let remedy = format!("if that agent is gone for good, {REMOVE}");
        let path = task_dir.path().display();
        match owner {
            // It may still turn out to be this agent's.
            Owner::Agent(root) if alloc_roots.is_empty() => tracing::info!(
                %path,
                alloc_root = %root.display(),
                "not removed yet: the first task of this agent shows whether these allocations are its own"
            ),
            _ if !self.is_new(task_dir.path()) => {}
            Owner::Agent(root) => tracing::warn!(
                %path,
                alloc_root = %root.display(),
                remedy,
                "not removed: it belongs to another Nomad agent"
            ),
            Owner::Unknown | Owner::Nobody => tracing::warn!(
                %path,
                remedy,
                "not removed: its record does not say which Nomad agent it belongs to"
            ),
        }
    }

    /// Whether this path has not been logged before.
    fn is_new(&self, path: &Path) -> bool {
        let mut named = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        named.insert(path.to_owned())
    }

    async fn reconcile_cgroups(&self, state_dir: &Path) {
        let groups = run_in_state_dir(state_dir, |dir| Ok(orphans::groups(dir))).await;
        let groups = groups.unwrap_or_else(|error| {
            tracing::error!(
                error,
                "the search for control groups without records failed"
            );
            Vec::new()
        });
        for group in groups {
            let path = group.display().to_string();
            match run_in_state_dir(state_dir, move |dir| orphans::remove_group(&group, dir)).await {
                Ok(()) => tracing::info!(path, "removed a control group without records"),
                Err(error) => tracing::error!(path, error, "a control group could not be removed"),
            }
        }
    }
}

/// The result of locking a task directory for reconciliation.
enum LockAttempt {
    /// Another plugin has locked it.
    Busy,
    Missing,
    /// A later driver made it, so it must not be ended.
    OfLaterForm(io::Error),
    /// It is locked here now.
    Start(TaskLock, Owner),
}

/// Tries to lock a start exclusively, and determines its owner.
fn try_lock_start(task_dir: &TaskDir) -> io::Result<LockAttempt> {
    let lock = match TaskLock::try_lock_exclusive(task_dir)? {
        TryLock::Acquired(lock) => lock,
        TryLock::Busy => return Ok(LockAttempt::Busy),
        TryLock::Missing => return Ok(LockAttempt::Missing),
    };
    Ok(match task_dir.refuse_later_form() {
        Err(error) => LockAttempt::OfLaterForm(error),
        Ok(()) => LockAttempt::Start(lock, owner::of(task_dir, &kernel::boot_id()?)),
    })
}

/// Whether no agent but this one can ask for a start.
fn is_own(owner: &Owner, alloc_roots: &BTreeSet<PathBuf>) -> bool {
    match owner {
        Owner::Nobody => true,
        Owner::Agent(root) => alloc_roots.contains(root),
        Owner::Unknown => false,
    }
}

/// Describes a start that no plugin has locked, for the log.
fn describe(task_dir: &TaskDir) -> &'static str {
    let launch_spec = match task_dir.launch_spec() {
        Ok(launch_spec) => launch_spec,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return "a start without a launch spec";
        }
        Err(_) => return "a start whose launch spec can't be read",
    };
    if kernel::boot_id().is_ok_and(|boot| boot != launch_spec.boot) {
        return "a start of another boot";
    }
    match (task_dir.exit(), task_dir.running()) {
        (Ok(Some(_)), _) => "a task that has ended",
        (_, Ok(running)) if is_alive(running.started.leader) => {
            "a running container that no agent recovered"
        }
        (_, Ok(_)) => "a container that died without a supervisor",
        (_, Err(_)) => "an incomplete start",
    }
}

/// Removes what starts that are gone have left of their networks, if it is nobody's.
async fn reconcile_networks(state_dir: &Path) {
    let remove = |dir: &Path| network::orphans::remove(dir, orphans::state_dirs_in_use);
    match run_in_state_dir(state_dir, remove).await {
        Ok(owners) => {
            for task in owners {
                tracing::info!(task, "removed rules of a network without records");
            }
        }
        Err(error) => tracing::error!(error, "the search for networks without records failed"),
    }
}

async fn supervisors(
    state_dir: &Path,
    wanted: impl Fn(&SupervisorProcess) -> bool,
) -> Vec<SupervisorProcess> {
    let found = run_in_state_dir(state_dir, |dir| Ok(orphans::supervisors(dir))).await;
    let mut found = found.unwrap_or_else(|error| {
        tracing::error!(error, "the search for supervisors without records failed");
        Vec::new()
    });
    found.retain(wanted);
    found
}

/// Runs `work` on this state directory, which may take long, on a thread for blocking work. A panic in it is an error.
async fn run_in_state_dir<T: Send + 'static>(
    state_dir: &Path,
    work: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    let owned = state_dir.to_owned();
    match tokio::task::spawn_blocking(move || work(&owned)).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}
