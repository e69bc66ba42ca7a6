//! What this plugin holds of each start: the client of its supervisor, and the lock that tells other plugins that it is in use. Both are
//! gone with the process and are rebuilt from the task directory.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::state::{TaskDir, TaskLock};
use crate::supervisor::SupervisorClient;

#[derive(Debug, Default)]
struct Entry {
    client: Option<SupervisorClient>,
    lock: Option<TaskLock>,
    /// How many reloads of the host's firewall there were when its network was last checked; `None` if it was not.
    checked_reloads: Option<u64>,
}

/// The starts of this backend, from their start or recovery until their removal.
#[derive(Debug, Default)]
pub(super) struct Registry {
    starts: Mutex<HashMap<PathBuf, Entry>>,
}

impl Registry {
    /// The client of a start's supervisor, if there is one.
    pub(super) fn client(&self, task_dir: &TaskDir) -> Option<SupervisorClient> {
        self.entries().get(task_dir.path())?.client.clone()
    }

    /// Keeps the client of a start's supervisor.
    pub(super) fn set_client(&self, task_dir: &TaskDir, client: SupervisorClient) {
        self.entry(task_dir, |entry| entry.client = Some(client));
    }

    /// Keeps the lock of a start.
    pub(super) fn set_lock(&self, task_dir: &TaskDir, lock: TaskLock) {
        self.entry(task_dir, |entry| entry.lock = Some(lock));
    }

    /// How many reloads of the host's firewall there were when the network of a start was last checked, if it was. `None` if the start is not
    /// held here any more.
    pub(super) fn checked_reloads(&self, task_dir: &TaskDir) -> Option<Option<u64>> {
        let entries = self.entries();
        Some(entries.get(task_dir.path())?.checked_reloads)
    }

    /// Keeps that number, if the start is still held here.
    pub(super) fn set_checked_reloads(&self, task_dir: &TaskDir, count: u64) {
        if let Some(entry) = self.entries().get_mut(task_dir.path()) {
            entry.checked_reloads = Some(count);
        }
    }

    /// Whether this backend holds the lock of a start.
    pub(super) fn is_locked(&self, task_dir: &TaskDir) -> bool {
        let entries = self.entries();
        entries
            .get(task_dir.path())
            .is_some_and(|entry| entry.lock.is_some())
    }

    /// Drops everything of a start.
    pub(super) fn forget(&self, task_dir: &TaskDir) {
        self.entries().remove(task_dir.path());
    }

    fn entry(&self, task_dir: &TaskDir, change: impl FnOnce(&mut Entry)) {
        change(
            self.entries()
                .entry(task_dir.path().to_owned())
                .or_default(),
        );
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<PathBuf, Entry>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
