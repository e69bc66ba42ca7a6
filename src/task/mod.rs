//! One actor per task owns its state from StartTask or RecoverTask until it has been destroyed. Runs in the plugin process. Every
//! request goes through the actor, which checks with `state` whether it is allowed now and makes one call on the backend. Does
//! not handle Nomad's protobuf messages and does not validate configuration.
//!
//! One task of the runtime per actor: it is tracked and ends with the root token, and the actor's calls in flight end with it.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{BackendError, ContainerBackend, UsageReader};
use crate::container::{ContainerSpec, Description, Exit, Notes, Started};
use crate::exec::{ExecError, ExecRequest, Session};
use crate::signal::Signal;

mod actor;
pub mod events;
pub mod handle;
mod neighbour;
mod state;
mod store;

use actor::{Command, Origin, TaskActor};
use events::EventBus;
use store::TaskStore;

/// How many recoveries run at once. After this process was killed, Nomad recovers all tasks at the same moment; running more of
/// them concurrently is not faster, but uses memory and threads that the process does not give back.
const MAX_CONCURRENT_RECOVERIES: usize = 16;

/// Identifies a task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskInfo {
    /// Nomad's id of this start.
    pub id: String,
    /// The task's name in the job.
    pub name: String,
    /// The allocation id.
    pub alloc_id: String,
    /// What a person recognizes it by; `None` in handles of earlier drivers.
    pub description: Option<Arc<Description>>,
}

/// Why a request about a task failed.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A task with this id exists already.
    #[error("task {0:?} already exists")]
    AlreadyKnown(String),
    /// There is no task with this id, or no longer. The message is the one Nomad's own drivers use.
    #[error("task not found for given id")]
    Unknown,
    /// It has exited.
    #[error("the task is not running")]
    NotRunning,
    /// It has not exited.
    #[error("cannot destroy running task without force")]
    StillRunning,
    /// The container was not found in time on recovery.
    #[error("the container could not be recovered within {} s", .0.as_secs())]
    AttachTimeout(Duration),
    /// A session was not started in time.
    #[error("the command could not be started within {} s", .0.as_secs())]
    ExecTimeout(Duration),
    /// This process is shutting down, and ends its actors but no container. Says nothing about the task.
    #[error("the plugin is shutting down")]
    ShuttingDown,
    /// A bug in this program; the log has the details.
    #[error("internal error, see the agent's log")]
    Panicked,
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// The status of a task. Once `exit` is set, it does not change.
#[derive(Debug, Clone, Default)]
pub struct TaskStatus {
    /// The container, once it is up.
    pub started: Option<Arc<Started>>,
    /// The exit, once it is known.
    pub exit: Option<Exit>,
    /// Whether a stop has been asked for, and has not failed.
    stopping: bool,
    /// Whether the task is being removed, so that lookups no longer return it.
    removing: bool,
    /// Whether no further change will follow.
    closed: bool,
}

impl TaskStatus {
    /// Whether it is being stopped, does not run any more, or never will.
    fn is_ending(&self) -> bool {
        self.exit.is_some() || self.stopping || self.removing || self.closed
    }
}

/// A handle to a task. Clones refer to the same task.
#[derive(Debug, Clone)]
pub struct Task {
    info: Arc<TaskInfo>,
    backend: Arc<dyn ContainerBackend>,
    status: watch::Receiver<TaskStatus>,
    /// Boxed: a channel allocates space for dozens of entries up front.
    mailbox: mpsc::Sender<Box<Command>>,
    /// The reader of those that read statistics now.
    reader: Arc<Mutex<Weak<Reader>>>,
}

/// Access to a reader that several streams of statistics share.
pub type SharedReader = Arc<Reader>;
type Reader = Mutex<Box<dyn UsageReader>>;

impl Task {
    /// Nomad's id of this start.
    pub fn id(&self) -> &str {
        &self.info.id
    }

    /// Identifies the task.
    pub fn info(&self) -> &TaskInfo {
        &self.info
    }

    /// The current status.
    pub fn status(&self) -> TaskStatus {
        self.status.borrow().clone()
    }

    /// Waits for the exit. Any number of callers, early or late, get the same result. Fails when the task was destroyed before
    /// its exit became known. `None` means that this process is shutting down and says nothing about the task.
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

    /// Starts a further command in the container, whose session the caller owns: dropping it ends the command. Only while the task runs: not
    /// before it is up, and not once it has ended or has been asked to.
    pub async fn exec(&self, request: ExecRequest) -> Result<Session, TaskError> {
        if request.command.is_empty() {
            return Err(BackendError::Exec(ExecError::EmptyCommand).into());
        }
        let (reply, answer) = oneshot::channel();
        let command = Box::new(Command::Exec { request, reply });
        let sent = self.mailbox.send(command).await;
        sent.map_err(|_| self.unanswered())?;
        self.answered(answer).await
    }

    /// Asks the payload to stop, kills it after `grace`, and returns when it has exited. Succeeds if the task has already exited.
    pub async fn stop(&self, signal: Option<Signal>, grace: Duration) -> Result<(), TaskError> {
        self.ask(|reply| Command::Stop {
            signal,
            grace,
            reply,
        })
        .await
    }

    /// Removes the task; a running one only with `force`. After a backend error the removal is retried in the background.
    pub async fn destroy(&self, force: bool) -> Result<(), TaskError> {
        self.ask(|reply| Command::Destroy { force, reply }).await
    }

    /// The addresses of the container, if it has a network of its own; none once it has exited.
    pub async fn addresses(&self) -> Vec<IpAddr> {
        let status = self.status();
        match status.started.filter(|_| status.exit.is_none()) {
            Some(started) => self.backend.addresses(&started).await,
            None => Vec::new(),
        }
    }

    /// Where to read what the container uses; `None` until it is up. All callers share one reader, and thereby the files that it
    /// keeps open, which are closed when the last of them drops it. Does not go through the actor, because it changes nothing.
    pub fn usage_reader(&self) -> Option<SharedReader> {
        let started = self.status.borrow().started.clone()?;
        let mut shared = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let reader = shared.upgrade().unwrap_or_else(|| {
            let reader = self.backend.usage_reader(&started);
            Arc::new(Mutex::new(reader))
        });
        *shared = Arc::downgrade(&reader);
        Some(reader)
    }

    async fn ask(&self, command: impl FnOnce(actor::Reply) -> Command) -> Result<(), TaskError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(Box::new(command(reply))).await;
        sent.map_err(|_| self.unanswered())?;
        self.answered(answer).await
    }

    /// Waits for the actor's answer.
    async fn answered<T>(
        &self,
        answer: oneshot::Receiver<Result<T, TaskError>>,
    ) -> Result<T, TaskError> {
        answer.await.unwrap_or_else(|_| Err(self.unanswered()))
    }

    /// Why the actor gave no answer. It marks the status as closed before it ends by itself, so otherwise it was dropped in the
    /// shutdown of this process.
    fn unanswered(&self) -> TaskError {
        match self.status.borrow().closed {
            true => TaskError::Unknown,
            false => TaskError::ShuttingDown,
        }
    }
}

/// All tasks of this plugin process and their actors.
#[derive(Debug, Clone)]
pub struct Tasks {
    store: TaskStore,
    events: EventBus,
    actors: TaskTracker,
    recovering: Arc<Semaphore>,
    token: CancellationToken,
}

impl Tasks {
    /// Creates an empty set, whose messages for users are published on `events`. Cancelling `token` ends all actors, but no container.
    pub fn new(events: EventBus, token: CancellationToken) -> Self {
        Self {
            store: TaskStore::default(),
            events,
            actors: TaskTracker::new(),
            recovering: Arc::new(Semaphore::new(MAX_CONCURRENT_RECOVERIES)),
            token,
        }
    }

    /// Publishes notes as events of their tasks. Those about a task that is not known, or no longer, are discarded.
    pub fn notes(&self) -> Notes {
        let (store, events) = (self.store.clone(), self.events.clone());
        Notes::new(move |id, note| {
            if let Some(task) = store.get_any(id) {
                events.publish(task.info(), note);
            }
        })
    }

    /// The task with this id, unless it is being removed.
    pub fn get(&self, id: &str) -> Result<Task, TaskError> {
        let known = self
            .store
            .get_any(id)
            .filter(|task| !task.status.borrow().removing);
        known.ok_or(TaskError::Unknown)
    }

    /// The task with this id, even if it is being removed: until it is gone, its exit can be waited for.
    pub fn get_any(&self, id: &str) -> Result<Task, TaskError> {
        self.store.get_any(id).ok_or(TaskError::Unknown)
    }

    /// The ids of all tasks, including those being removed.
    pub fn ids(&self) -> Vec<String> {
        self.store.ids()
    }

    /// Starts a container and returns when it is up. After an error nothing of it is left, here or on the host.
    pub async fn start(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        mut spec: ContainerSpec,
    ) -> Result<Arc<Started>, TaskError> {
        self.find_network(&info, &mut spec).await?;
        let (reply, answer) = oneshot::channel();
        let task = self.spawn_actor(backend, info, Origin::Start(Box::new(spec), reply))?;
        task.answered(answer).await
    }

    /// Finds a container that an earlier plugin process started. Succeeds without doing anything if the task is already known.
    pub async fn recover(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        started: Started,
    ) -> Result<Arc<Started>, TaskError> {
        let id = info.id.clone();
        let (reply, answer) = oneshot::channel();
        let turns = Arc::clone(&self.recovering);
        let origin = Origin::Recover(Box::new(started), turns, reply);
        match self.spawn_actor(backend, info, origin) {
            Ok(task) => task.answered(answer).await,
            Err(TaskError::AlreadyKnown(_)) => {
                let task = self.get(&id)?;
                let mut status = task.status.clone();
                let known = status.wait_for(|status| status.started.is_some()).await;
                known
                    .ok()
                    .and_then(|status| status.started.clone())
                    .ok_or_else(|| task.unanswered())
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a task, or the leftovers on the host of an id that is unknown here.
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
            // A concurrent call is already removing the same id.
            Err(TaskError::AlreadyKnown(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(task) => match task.answered(answer).await {
                Err(TaskError::Unknown) => Ok(()),
                answer => answer,
            },
        }
    }

    /// Ends the actors, but no container, and waits for them for at most `limit`.
    pub async fn close(&self, limit: Duration) {
        self.token.cancel();
        self.actors.close();
        // Actors still running after `limit` end with the process.
        let _ = tokio::time::timeout(limit, self.actors.wait()).await;
    }

    fn spawn_actor(
        &self,
        backend: Arc<dyn ContainerBackend>,
        info: TaskInfo,
        origin: Origin,
    ) -> Result<Task, TaskError> {
        let (actor, task) = TaskActor::new(
            info,
            backend,
            (self.store.clone(), self.events.clone()),
            origin,
        );
        self.store.insert(task.clone())?;
        let token = self.token.child_token();
        self.actors
            .spawn(token.run_until_cancelled_owned(actor.run()));
        Ok(task)
    }
}

#[cfg(test)]
pub(crate) mod tests;
