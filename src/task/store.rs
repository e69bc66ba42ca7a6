//! The map of tasks by start id. Rejects a second task with the same id. Does not hide tasks that are being removed;
//! [`super::Tasks::get`] does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Task, TaskError, TaskInfo};

/// The tasks of this plugin process. Clones share the same map.
#[derive(Debug, Clone, Default)]
pub(super) struct TaskStore {
    tasks: Arc<Mutex<HashMap<String, Task>>>,
}

impl TaskStore {
    /// Adds a task.
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

    /// The task with this id, even if it is being removed.
    pub(super) fn get_any(&self, id: &str) -> Option<Task> {
        self.tasks().get(id).cloned()
    }

    /// A task for which this holds.
    pub(super) fn find(&self, holds: impl Fn(&Task) -> bool) -> Option<Task> {
        self.tasks().values().find(|task| holds(task)).cloned()
    }

    /// The ids of all tasks.
    pub(super) fn ids(&self) -> Vec<String> {
        self.tasks().keys().cloned().collect()
    }

    /// Removes exactly this task. Another task with the same id, added in the meantime, stays.
    pub(super) fn remove(&self, info: &Arc<TaskInfo>) {
        let mut tasks = self.tasks();
        let same = tasks
            .get(&info.id)
            .is_some_and(|task| Arc::ptr_eq(&task.info, info));
        if same {
            tasks.remove(&info.id);
        }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Task>> {
        // Every change is a single call on the map, so a panic while the lock was held leaves it consistent.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MockContainerBackend;
    use crate::task::TaskStatus;
    use tokio::sync::{mpsc, watch};

    fn task() -> Task {
        Task {
            info: Arc::new(TaskInfo {
                id: "a/t/1".to_owned(),
                alloc_id: "a".to_owned(),
                name: "t".to_owned(),
                description: None,
            }),
            backend: Arc::new(MockContainerBackend::new()),
            status: watch::channel(TaskStatus::default()).1,
            mailbox: mpsc::channel(1).0,
            reader: Arc::default(),
        }
    }

    #[test]
    fn a_late_exit_does_not_remove_the_next_task_of_the_id() {
        let store = TaskStore::default();
        let (first, second) = (task(), task());
        store.insert(first.clone()).unwrap();
        assert!(store.insert(second.clone()).is_err());
        store.remove(&first.info);
        store.insert(second.clone()).unwrap();
        store.remove(&first.info);
        assert!(store.get_any("a/t/1").is_some());
        store.remove(&second.info);
        assert!(store.get_any("a/t/1").is_none());
    }
}
