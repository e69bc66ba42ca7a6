//! Finds another task of an allocation, whose network a container joins. The tasks of a group start at the same time and in no order, so a
//! task that does not run yet is waited for.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{TaskError, TaskInfo, Tasks};
use crate::backend::BackendError;
use crate::container::{Cause, ContainerSpec, NetworkNamespace, Started};

/// How long a task may be unknown to this plugin, or have ended, before it is not waited for any longer. Nomad asks for its start only when
/// its artifacts and templates are there.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a task is waited for if its start is tried again and again.
const LONGEST: Duration = Duration::from_secs(600);

/// How often it is looked for.
const INTERVAL: Duration = Duration::from_millis(50);

impl Tasks {
    /// Finds the container whose network this one joins, if it is that of another task of the allocation.
    pub(super) async fn find_network(
        &self,
        info: &TaskInfo,
        spec: &mut ContainerSpec,
    ) -> Result<(), TaskError> {
        let NetworkNamespace::OfTask { task, leader } = &mut spec.network.namespace else {
            return Ok(());
        };
        let other = self.neighbour(info, task).await;
        *leader = other.map(|other| other.leader);
        if leader.is_some() {
            return Ok(());
        }
        if self.token.is_cancelled() {
            return Err(TaskError::ShuttingDown);
        }
        let missing = BackendError::Start {
            machine: spec.identity.machine.clone(),
            step: "joining the network of another task",
            reason: format!(
                "the task {task:?} of this allocation does not run in a container of this driver, and was not started within {} s",
                LIMIT.as_secs()
            ),
            cause: Cause::Resources,
        };
        Err(missing.into())
    }

    /// The container of the task `name` in the allocation of `info`. Waits for a task that this plugin does not know yet or that is ending, and
    /// for one that is being started until it has been. `None` if it does not come, or if this process is shutting down.
    async fn neighbour(&self, info: &TaskInfo, name: &str) -> Option<Arc<Started>> {
        let mut is_reported = false;
        let begin = Instant::now();
        let mut end = begin + LIMIT;
        loop {
            let found = self.store.find(|other| {
                other.info.alloc_id == info.alloc_id
                    && other.info.name == name
                    && !other.status.borrow().is_ending()
            });
            let started = found.as_ref().and_then(|task| task.status().started);
            if started.is_some() {
                return started;
            }
            if !is_reported {
                is_reported = true;
                let message =
                    format!("waiting for the task {name:?}, whose network this task joins");
                self.events.publish(info, message);
            }
            if found.is_some() {
                end = (Instant::now() + LIMIT).min(begin + LONGEST);
            }
            if Instant::now() >= end || self.token.is_cancelled() {
                return None;
            }
            sleep(INTERVAL).await;
        }
    }
}
