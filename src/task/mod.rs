//! One desk per task: it keeps the life of one container, from the start or the recovery to the last trace. Every request goes
//! through its desk, which asks `state` whether it may happen now, and makes one call on the backend. Knows nothing of Nomad's
//! wire; judges no configuration.
//!
//! Nothing here is detached: the desks are tracked and end with the root token; what a desk has under way ends with the desk.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{BackendError, ContainerBackend};
use crate::container::{ContainerSpec, Exit, Started, Usage};
use crate::signal::Signal;

mod desk;
pub mod events;
pub mod handle;
mod state;
mod store;

use desk::{Birth, Desk, Message};
use store::TaskStore;

/// How many containers are found again together. Nomad asks for all of them in the same moment after this process was killed;
/// more together takes no less time, but memory and threads that a process does not give back.
const ATTACHING: usize = 16;

/// Who a task is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
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
pub struct Life {
    /// The container, once it is up.
    pub started: Option<Arc<Started>>,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
    /// Whether it is being cleared away, so that nobody shall find it any more.
    forgotten: bool,
    /// Whether nothing more will become known.
    over: bool,
}

/// A task, for those who want something of it. Clones are the same task.
#[derive(Debug, Clone)]
pub struct Task {
    identity: Arc<Identity>,
    backend: Arc<dyn ContainerBackend>,
    life: watch::Receiver<Life>,
    /// Boxed: a channel has room for dozens from the start.
    mailbox: mpsc::Sender<Box<Message>>,
}

impl Task {
    /// Nomad's id of this start.
    pub fn id(&self) -> &str {
        &self.identity.id
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What is known of its life now.
    pub fn life(&self) -> Life {
        self.life.borrow().clone()
    }

    /// Waits for the end. Any number of callers, early or late, get the same answer. Fails when the task was destroyed without
    /// its end having become known; `None` means that this process is ending and nobody may draw a conclusion about the task.
    pub async fn wait(&self) -> Option<Result<Exit, TaskError>> {
        let mut life = self.life.clone();
        let ended = life.wait_for(|life| life.exit.is_some() || life.over).await;
        match ended {
            Ok(life) => Some(life.exit.clone().ok_or(TaskError::Unknown)),
            Err(_) => None,
        }
    }

    /// Delivers a signal to the payload.
    pub async fn signal(&self, signal: Signal) -> Result<(), TaskError> {
        self.ask(|reply| Message::Signal { signal, reply }).await
    }

    /// Asks the payload to end, ends it by force after `grace`, and returns when it has ended. An ended task is success.
    pub async fn stop(&self, signal: Option<Signal>, grace: Duration) -> Result<(), TaskError> {
        self.ask(|reply| Message::Stop {
            signal,
            grace,
            reply,
        })
        .await
    }

    /// Clears the task away; a running one only by `force`. After an error of the backend it is tried again in the background.
    pub async fn destroy(&self, force: bool) -> Result<(), TaskError> {
        self.ask(|reply| Message::Destroy { force, reply }).await
    }

    /// What the container uses now. Needs no desk: it changes nothing.
    pub async fn usage(&self) -> Result<Usage, TaskError> {
        let started = self.life().started.ok_or(TaskError::NotRunning)?;
        Ok(self.backend.usage(&started).await?)
    }

    async fn ask(&self, message: impl FnOnce(desk::Reply) -> Message) -> Result<(), TaskError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(Box::new(message(reply))).await;
        sent.map_err(|_| TaskError::Unknown)?;
        answer.await.unwrap_or(Err(TaskError::Unknown))
    }
}

/// All tasks of this plugin process, and the desks that keep them.
#[derive(Debug, Clone)]
pub struct Tasks {
    store: TaskStore,
    desks: TaskTracker,
    attaching: Arc<Semaphore>,
    token: CancellationToken,
}

impl Tasks {
    /// No tasks yet; all desks will end with `token`. That ends no container.
    pub fn new(token: CancellationToken) -> Self {
        Self {
            store: TaskStore::default(),
            desks: TaskTracker::new(),
            attaching: Arc::new(Semaphore::new(ATTACHING)),
            token,
        }
    }

    /// The task of this id, unless it is being cleared away.
    pub fn get(&self, id: &str) -> Result<Task, TaskError> {
        let known = self
            .store
            .seat(id)
            .filter(|task| !task.life.borrow().forgotten);
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
        identity: Identity,
        spec: ContainerSpec,
    ) -> Result<Arc<Started>, TaskError> {
        self.bear(backend, identity, |reply| {
            Birth::Start(Box::new(spec), reply)
        })
        .await
    }

    /// Finds a container again that an earlier process started. One that is known already is success and left alone.
    pub async fn recover(
        &self,
        backend: Arc<dyn ContainerBackend>,
        identity: Identity,
        started: Started,
    ) -> Result<Arc<Started>, TaskError> {
        let id = identity.id.clone();
        match self
            .bear(backend, identity, |reply| {
                Birth::Attach(Box::new(started), Arc::clone(&self.attaching), reply)
            })
            .await
        {
            Err(TaskError::AlreadyKnown(_)) => {
                let mut life = self.get(&id)?.life;
                let known = life.wait_for(|life| life.started.is_some()).await;
                known
                    .ok()
                    .and_then(|life| life.started.clone())
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
        if let Some(task) = self.store.seat(id) {
            return match task.destroy(force).await {
                Err(TaskError::Unknown) => Ok(()),
                answer => answer,
            };
        }
        let identity = Identity {
            id: id.to_owned(),
            ..Identity::default()
        };
        let (reply, answer) = oneshot::channel();
        match self.open_desk(backend, identity, Birth::Leftover(reply)) {
            // Somebody else was faster with the same wish.
            Err(TaskError::AlreadyKnown(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => answer.await.unwrap_or(Ok(())),
        }
    }

    /// Ends the desks, which end no container, and waits for them at most for `limit`.
    pub async fn close(&self, limit: Duration) {
        self.token.cancel();
        self.desks.close();
        // What is not done by then ends with the process.
        let _ = tokio::time::timeout(limit, self.desks.wait()).await;
    }

    async fn bear(
        &self,
        backend: Arc<dyn ContainerBackend>,
        identity: Identity,
        birth: impl FnOnce(oneshot::Sender<Result<Arc<Started>, TaskError>>) -> Birth,
    ) -> Result<Arc<Started>, TaskError> {
        let (reply, answer) = oneshot::channel();
        self.open_desk(backend, identity, birth(reply))?;
        answer.await.unwrap_or(Err(TaskError::Unknown))
    }

    fn open_desk(
        &self,
        backend: Arc<dyn ContainerBackend>,
        identity: Identity,
        birth: Birth,
    ) -> Result<Task, TaskError> {
        let forgotten = matches!(birth, Birth::Leftover(_));
        let (publish, life) = watch::channel(Life {
            forgotten,
            ..Life::default()
        });
        let (mailbox, messages) = mpsc::channel(16);
        let task = Task {
            identity: Arc::new(identity),
            backend: Arc::clone(&backend),
            life,
            mailbox,
        };
        self.store.insert(task.clone())?;
        let desk = Desk::new(
            Arc::clone(&task.identity),
            backend,
            publish,
            messages,
            self.store.clone(),
        );
        self.desks.spawn(
            self.token
                .child_token()
                .run_until_cancelled_owned(desk.keep(birth)),
        );
        Ok(task)
    }
}

#[cfg(test)]
pub(crate) mod tests;
