//! One actor per task owns its state from StartTask or RecoverTask until it has been destroyed. Every request goes through the
//! actor, which asks `state` whether it is allowed now, and makes one call on the backend. Knows nothing of Nomad's
//! wire; judges no configuration.
//!
//! Nothing here is detached: the actors are tracked and end with the root token; what an actor has in flight ends with it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{BackendError, ContainerBackend};
use crate::container::{ContainerSpec, Exit, Started, Usage};
use crate::signal::Signal;

mod actor;
pub mod events;
pub mod handle;
mod state;
mod store;

use actor::{Command, Origin, TaskActor};
use store::TaskStore;

/// How many containers are found again together. Nomad asks for all of them in the same moment after this process was killed;
/// more together takes no less time, but memory and threads that a process does not give back.
const MAX_CONCURRENT_RECOVERIES: usize = 16;

/// Who a task is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskInfo {
    /// Nomad's id of this start.
    pub id: String,
    /// The task's name in the job.
    pub name: String,
    /// The allocation id.
    pub alloc_id: String,
}

/// What went wrong with a request about a task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A start of this id is there already.
    #[error("task {0:?} is already known")]
    AlreadyKnown(String),
    /// There is no such task, or no more. The words are the ones Nomad's own drivers use.
    #[error("task not found for given id")]
    Unknown,
    /// It has ended.
    #[error("the task is not running")]
    NotRunning,
    /// It has not ended.
    #[error("cannot destroy running task without force")]
    StillRunning,
    /// The container was not found again in time.
    #[error("the container could not be found again within {} s", .0.as_secs())]
    AttachTimeout(Duration),
    /// A defect of this program; the log has the details.
    #[error("internal error, see the client's log")]
    Panicked,
    /// The host could not do it.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// What is known of a task's life. Once it has an exit, it keeps it.
#[derive(Debug, Clone, Default)]
pub struct TaskStatus {
    /// The container, once it is up.
    pub started: Option<Arc<Started>>,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
    /// Whether it is being cleared away, so that nobody shall find it any more.
    removing: bool,
    /// Whether nothing more will become known.
    closed: bool,
}

/// A task, for those who want something of it. Clones are the same task.
#[derive(Debug, Clone)]
pub struct Task {
    info: Arc<TaskInfo>,
    backend: Arc<dyn ContainerBackend>,
    status: watch::Receiver<TaskStatus>,
    /// Boxed: a channel has room for dozens from the start.
    mailbox: mpsc::Sender<Box<Command>>,
}

impl Task {
    /// Nomad's id of this start.
    pub fn id(&self) -> &str {
        &self.info.id
    }

    /// Who it is.
    pub fn info(&self) -> &TaskInfo {
        &self.info
    }

    /// What is known of its life now.
    pub fn status(&self) -> TaskStatus {
        self.status.borrow().clone()
    }

    /// Waits for the end. Any number of callers, early or late, get the same answer. Fails when the task was destroyed without
    /// its end having become known; `None` means that this process is ending and nobody may draw a conclusion about the task.
    pub async fn wait(&self) -> Option<Result<Exit, TaskError>> {
        let mut status = self.status.clone();
        let ended = status
            .wait_for(|status| status.exit.is_some() || status.closed)
            .await;
        match ended {
            Ok(status) => Some(status.exit.clone().ok_or(TaskError::Unknown)),
            Err(_) => None,
        }
    }

    /// Delivers a signal to the payload.
    pub async fn signal(&self, signal: Signal) -> Result<(), TaskError> {
        self.ask(|reply| Command::Signal { signal, reply }).await
    }

    /// Asks the payload to end, ends it by force after `grace`, and returns when it has ended. An ended task is success.
    pub async fn stop(&self, signal: Option<Signal>, grace: Duration) -> Result<(), TaskError> {
        self.ask(|reply| Command::Stop {
            signal,
            grace,
            reply,
        })
        .await
    }

    /// Clears the task away; a running one only by `force`. After an error of the backend it is tried again in the background.
    pub async fn destroy(&self, force: bool) -> Result<(), TaskError> {
        self.ask(|reply| Command::Destroy { force, reply }).await
    }

    /// What the container uses now. Needs no desk: it changes nothing.
    pub async fn usage(&self) -> Result<Usage, TaskError> {
        let started = self.status().started.ok_or(TaskError::NotRunning)?;
        Ok(self.backend.usage(&started).await?)
    }

    async fn ask(&self, command: impl FnOnce(actor::Reply) -> Command) -> Result<(), TaskError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(Box::new(command(reply))).await;
        sent.map_err(|_| TaskError::Unknown)?;
        answer.await.unwrap_or(Err(TaskError::Unknown))
    }
}

/// All tasks of this plugin process, and the desks that keep them.
#[derive(Debug, Clone)]
pub struct Tasks {
    store: TaskStore,
    actors: TaskTracker,
    recovering: Arc<Semaphore>,
    token: CancellationToken,
}

impl Tasks {
    /// No tasks yet; all desks will end with `token`. That ends no container.
    pub fn new(token: CancellationToken) -> Self {
        Self {
            store: TaskStore::default(),
            actors: TaskTracker::new(),
            recovering: Arc::new(Semaphore::new(MAX_CONCURRENT_RECOVERIES)),
            token,
        }
    }

    /// The task of this id, unless it is being cleared away.
    pub fn get(&self, id: &str) -> Result<Task, TaskError> {
        let known = self
            .store
            .get_any(id)
            .filter(|task| !task.status.borrow().removing);
        known.ok_or(TaskError::Unknown)
    }

    /// The ids of all tasks, of those that are being cleared away too.
    pub fn ids(&self) -> Vec<String> {
        self.store.ids()
    }

    /// Starts a container and returns when it is up. After an error nothing of it is left, here or on the host.
    pub async fn start(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        spec: ContainerSpec,
    ) -> Result<Arc<Started>, TaskError> {
        self.start_actor(backend, info, |reply| Origin::Start(Box::new(spec), reply))
            .await
    }

    /// Finds a container again that an earlier process started. One that is known already is success and left alone.
    pub async fn recover(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        started: Started,
    ) -> Result<Arc<Started>, TaskError> {
        let id = info.id.clone();
        match self
            .start_actor(backend, info, |reply| {
                Origin::Recover(Box::new(started), Arc::clone(&self.recovering), reply)
            })
            .await
        {
            Err(TaskError::AlreadyKnown(_)) => {
                let mut status = self.get(&id)?.status;
                let known = status.wait_for(|status| status.started.is_some()).await;
                known
                    .ok()
                    .and_then(|status| status.started.clone())
                    .ok_or(TaskError::Unknown)
            }
            answer => answer,
        }
    }

    /// Clears a task away, or what is left on the host of an id that nobody here knows.
    pub async fn destroy(
        &self,
        backend: Arc<dyn ContainerBackend>,
        id: &str,
        force: bool,
    ) -> Result<(), TaskError> {
        if let Some(task) = self.store.get_any(id) {
            return match task.destroy(force).await {
                Err(TaskError::Unknown) => Ok(()),
                answer => answer,
            };
        }
        let info = TaskInfo {
            id: id.to_owned(),
            ..TaskInfo::default()
        };
        let (reply, answer) = oneshot::channel();
        match self.spawn_actor(backend, info, Origin::Cleanup(reply)) {
            // Somebody else was faster with the same wish.
            Err(TaskError::AlreadyKnown(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => answer.await.unwrap_or(Ok(())),
        }
    }

    /// Ends the desks, which end no container, and waits for them at most for `limit`.
    pub async fn close(&self, limit: Duration) {
        self.token.cancel();
        self.actors.close();
        // What is not done by then ends with the process.
        let _ = tokio::time::timeout(limit, self.actors.wait()).await;
    }

    async fn start_actor(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        origin: impl FnOnce(oneshot::Sender<Result<Arc<Started>, TaskError>>) -> Origin,
    ) -> Result<Arc<Started>, TaskError> {
        let (reply, answer) = oneshot::channel();
        self.spawn_actor(backend, info, origin(reply))?;
        answer.await.unwrap_or(Err(TaskError::Unknown))
    }

    fn spawn_actor(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        origin: Origin,
    ) -> Result<Task, TaskError> {
        let removing = matches!(origin, Origin::Cleanup(_));
        let (publish, status) = watch::channel(TaskStatus {
            removing,
            ..TaskStatus::default()
        });
        let (mailbox, commands) = mpsc::channel(16);
        let task = Task {
            info: Arc::new(info),
            backend: Arc::clone(&backend),
            status,
            mailbox,
        };
        self.store.insert(task.clone())?;
        let actor = TaskActor::new(
            Arc::clone(&task.info),
            backend,
            publish,
            commands,
            self.store.clone(),
        );
        self.actors.spawn(
            self.token
                .child_token()
                .run_until_cancelled_owned(actor.run(origin)),
        );
        Ok(task)
    }
}

#[cfg(test)]
pub(crate) mod tests;
