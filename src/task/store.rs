//! Which tasks there are: start id → task. Refuses a second of the same id; keeps those that are being cleared away out of
//! sight.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Task, TaskError};

/// The tasks of this plugin process. Clones are the same store.
#[derive(Debug, Clone, Default)]
pub(super) struct TaskStore {
    tasks: Arc<Mutex<HashMap<String, Task>>>,
}

impl TaskStore {
    /// Takes a task in.
    pub(super) fn insert(&self, task: Task) -> Result<(), TaskError> {
        use std::collections::hash_map::Entry;
        match self.tasks().entry(task.id().to_owned()) {
            Entry::Occupied(taken) => Err(TaskError::AlreadyKnown(taken.key().clone())),
            Entry::Vacant(free) => {
                free.insert(task);
                Ok(())
            }
        }
    }

    /// The task of this id, even when it is being cleared away.
    pub(super) fn seat(&self, id: &str) -> Option<Task> {
        self.tasks().get(id).cloned()
    }

    /// Strikes the task off.
    pub(super) fn remove(&self, id: &str) {
        self.tasks().remove(id);
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Task>> {
        // Every change of the map is a single call; a panic of another holder left it whole.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
