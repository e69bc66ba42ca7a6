//! The actor of one task: the only place where its state changes. It handles commands and the results of its backend calls one at
//! a time. The calls in flight are futures that it polls beside its mailbox, so that a forced kill can overtake a long grace period;
//! they need no tasks of their own, and end with the actor.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::events::EventBus;
use super::state::{Decision, Event, Rejection, Request, State};
use super::store::TaskStore;
use super::{Task, TaskError, TaskInfo, TaskStatus};
use crate::backend::ContainerBackend;
use crate::container::{ContainerSpec, Exit, Started, UNKNOWN_END};
use crate::exec::{ExecRequest, Session};
use crate::signal::Signal;

/// How long recovering a container may take: the agent recovers its tasks one after the other before its node is up.
const RECOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the exit status of a stopped container before continuing without it.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take until a session has been started. Its command need not run yet.
pub(super) const EXEC_TIMEOUT: Duration = Duration::from_secs(30);
/// Delays between removal attempts. After the last one fails, the removal is given up with an error in the log.
const REMOVE_RETRY_DELAYS: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_secs(80),
    Duration::from_secs(320),
];

pub(super) type Reply = oneshot::Sender<Result<(), TaskError>>;
type StartReply = oneshot::Sender<Result<Arc<Started>, TaskError>>;
type ExecReply = oneshot::Sender<Result<Session, TaskError>>;

/// What the actor begins with.
#[derive(Debug)]
pub(super) enum Origin {
    Start(Box<ContainerSpec>, StartReply),
    /// Waits for a permit of the semaphore first.
    Recover(Box<Started>, Arc<Semaphore>, StartReply),
    /// Only the id is known.
    Cleanup(Reply),
}

/// A command to the actor.
#[derive(Debug)]
pub(super) enum Command {
    Signal {
        signal: Signal,
        reply: Reply,
    },
    Exec {
        request: ExecRequest,
        reply: ExecReply,
    },
    Stop {
        signal: Option<Signal>,
        grace: Duration,
        reply: Reply,
    },
    Destroy {
        force: bool,
        reply: Reply,
    },
}

/// The result of a call in flight.
enum Outcome {
    Up(Result<Arc<Started>, TaskError>, StartReply),
    Ended(Exit),
    OomKills(Option<u64>),
    NetworkRestored(Option<String>),
    Signalled(Result<(), TaskError>, Reply),
    /// Boxed, because the other outcomes are small.
    SessionStarted(Box<Result<Session, TaskError>>, ExecReply),
    Stopped(Result<(), TaskError>, Reply),
    Removed(Result<(), TaskError>, Option<Reply>),
    RetryDue,
}

#[derive(Debug)]
pub(super) struct TaskActor {
    info: Arc<TaskInfo>,
    backend: Arc<dyn ContainerBackend>,
    state: State,
    status: watch::Sender<TaskStatus>,
    commands: mpsc::Receiver<Box<Command>>,
    /// Commands that are retried after the next event.
    deferred: Vec<Command>,
    /// The backend calls that have not finished. Each catches its own panic, see [`catch_panic`].
    in_flight: FuturesUnordered<BoxFuture<'static, Outcome>>,
    failed_removals: usize,
    /// OOM kills that have been published.
    oom_kills: u64,
    store: TaskStore,
    events: EventBus,
}

impl TaskActor {
    /// An actor that begins with `origin`, and the handle of its task. Nothing happens until it runs.
    pub(super) fn new(
        info: TaskInfo,
        backend: Arc<dyn ContainerBackend>,
        (store, events): (TaskStore, EventBus),
        origin: Origin,
    ) -> (Self, Task) {
        let (publish, status) = watch::channel(TaskStatus::default());
        let (mailbox, commands) = mpsc::channel(16);
        let info = Arc::new(info);
        let mut actor = Self {
            info: Arc::clone(&info),
            backend: Arc::clone(&backend),
            state: State::Starting,
            status: publish,
            commands,
            deferred: Vec::new(),
            in_flight: FuturesUnordered::new(),
            failed_removals: 0,
            oom_kills: 0,
            store,
            events,
        };
        actor.begin(origin);
        let task = Task {
            info,
            backend,
            status,
            mailbox,
            reader: Arc::default(),
        };
        (actor, task)
    }

    /// Runs until the task is removed.
    pub(super) async fn run(mut self) {
        while self.state != State::Removed {
            tokio::select! {
                Some(outcome) = self.in_flight.next() => {
                    self.apply(outcome);
                    for command in std::mem::take(&mut self.deferred) {
                        self.handle_command(command);
                    }
                }
                Some(command) = self.commands.recv() => self.handle_command(*command),
                else => break,
            }
        }
        self.store.remove(&self.info);
        self.status.send_modify(|status| {
            status.removing = true;
            status.closed = true;
        });
    }

    fn begin(&mut self, origin: Origin) {
        let backend = Arc::clone(&self.backend);
        match origin {
            Origin::Start(spec, reply) => self.call(async move {
                let up = catch_panic(async move { Ok(backend.start(*spec).await?) });
                Outcome::Up(up.await, reply)
            }),
            Origin::Recover(started, turns, reply) => self.call(async move {
                // The semaphore is never closed, so this can't fail.
                let _turn = turns.acquire_owned().await;
                let attach = catch_panic(async move { Ok(backend.attach(&started).await?) });
                let up = tokio::time::timeout(RECOVER_TIMEOUT, attach).await;
                let up = up.unwrap_or(Err(TaskError::AttachTimeout(RECOVER_TIMEOUT)));
                Outcome::Up(up, reply)
            }),
            Origin::Cleanup(reply) => {
                self.state = State::Removing;
                self.remove(false, Some(reply));
            }
        }
    }

    /// Adds a call to those in flight.
    fn call(&self, call: impl Future<Output = Outcome> + Send + 'static) {
        self.in_flight.push(call.boxed());
    }

    fn handle_command(&mut self, command: Command) {
        let request = match &command {
            Command::Signal { .. } => Request::Signal,
            Command::Exec { .. } => Request::Exec,
            Command::Stop { .. } => Request::Stop,
            Command::Destroy { force, .. } => Request::Destroy { force: *force },
        };
        let running = matches!(self.state, State::Running | State::Stopping(_));
        match self.state.request(request) {
            Decision::Do => self.execute(command, running),
            Decision::Later => self.deferred.push(command),
            Decision::Done => command.answer(Ok(())),
            Decision::Reject(rejection) => command.answer(Err(rejection.into())),
        }
    }

    fn execute(&mut self, command: Command, running: bool) {
        let backend = Arc::clone(&self.backend);
        let started = self.status.borrow().started.clone();
        match (command, started) {
            (Command::Destroy { reply, .. }, _) => self.remove(running, Some(reply)),
            (Command::Signal { signal, reply }, Some(started)) => self.call(async move {
                let sent = catch_panic(async move { Ok(backend.signal(&started, signal).await?) });
                Outcome::Signalled(sent.await, reply)
            }),
            (Command::Exec { request, reply }, Some(started)) => self.call(async move {
                let exec = catch_panic(async move { Ok(backend.exec(&started, request).await?) });
                let session = tokio::time::timeout(EXEC_TIMEOUT, exec).await;
                let session = session.unwrap_or(Err(TaskError::ExecTimeout(EXEC_TIMEOUT)));
                Outcome::SessionStarted(Box::new(session), reply)
            }),
            (
                Command::Stop {
                    signal,
                    grace,
                    reply,
                },
                Some(started),
            ) => {
                self.status.send_modify(|status| status.stopping = true);
                let status = self.status.subscribe();
                self.call(async move {
                    let stop =
                        catch_panic(
                            async move { Ok(backend.stop(&started, signal, grace).await?) },
                        );
                    let stopped = stop.await;
                    if stopped.is_ok() {
                        wait_for_exit(status).await;
                    }
                    Outcome::Stopped(stopped, reply)
                });
            }
            (command, None) => command.answer(Err(TaskError::NotRunning)),
        }
    }

    /// Removes everything. A running container is killed first, so that callers waiting for its exit get the real exit status.
    fn remove(&mut self, running: bool, reply: Option<Reply>) {
        self.status.send_modify(|status| status.removing = true);
        let backend = Arc::clone(&self.backend);
        let id = self.info.id.clone();
        let started = self.status.borrow().started.clone().filter(|_| running);
        let status = self.status.subscribe();
        self.call(async move {
            let removed = catch_panic(async move {
                if let Some(started) = started {
                    match backend
                        .stop(&started, Some(Signal::KILL), Duration::ZERO)
                        .await
                    {
                        Ok(()) => wait_for_exit(status).await,
                        Err(error) => log(&id, "could not be killed before its removal", &error),
                    }
                }
                Ok(backend.remove(&id).await?)
            });
            Outcome::Removed(removed.await, reply)
        });
    }

    fn apply(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Up(up, reply) => self.apply_start(up, reply),
            Outcome::Ended(exit) => {
                self.state.apply(Event::End);
                self.status.send_modify(|status| status.exit = Some(exit));
            }
            Outcome::OomKills(kills) => self.apply_oom_kills(kills),
            Outcome::NetworkRestored(note) => self.apply_network_restored(note),
            Outcome::Signalled(result, reply) => answer(reply, result),
            // A session that is not received ends.
            Outcome::SessionStarted(session, reply) => drop(reply.send(*session)),
            Outcome::Stopped(result, reply) => {
                if result.is_err() {
                    self.state.apply(Event::StopFailed);
                    let stopping = matches!(self.state, State::Stopping(_));
                    self.status.send_modify(|status| status.stopping = stopping);
                }
                answer(reply, result);
            }
            Outcome::Removed(result, reply) => self.apply_removal(result, reply),
            Outcome::RetryDue => {
                if self.state == State::RemoveFailed {
                    self.state.apply(Event::RetryDue);
                    self.remove(false, None);
                }
            }
        }
    }

    fn apply_start(&mut self, up: Result<Arc<Started>, TaskError>, reply: StartReply) {
        let started = match up {
            Ok(started) => started,
            Err(error) => {
                self.state.apply(Event::StartFailed);
                // Removed from the store before the caller gets the error: a second attempt may have the same id.
                self.store.remove(&self.info);
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.state.apply(Event::Up);
        self.status
            .send_modify(|status| status.started = Some(Arc::clone(&started)));
        let backend = Arc::clone(&self.backend);
        let id = self.info.id.clone();
        let container = Arc::clone(&started);
        self.call(async move {
            let end = catch_panic(async move { Ok(backend.wait(&container).await?) });
            Outcome::Ended(end.await.unwrap_or_else(|error| lost_exit(&id, &error)))
        });
        self.watch_oom_kills(&started);
        self.watch_network(&started);
        let _ = reply.send(Ok(started));
    }

    fn watch_oom_kills(&self, started: &Arc<Started>) {
        let (backend, started) = (Arc::clone(&self.backend), Arc::clone(started));
        let seen = self.oom_kills;
        self.call(async move {
            let kills = catch_panic(async move { Ok(backend.oom_kills(&started, seen).await) });
            Outcome::OomKills(kills.await.unwrap_or_default())
        });
    }

    /// `None` if no more can follow.
    fn apply_oom_kills(&mut self, kills: Option<u64>) {
        let started = self.status.borrow().started.clone();
        let (Some(kills), Some(started)) = (kills, started) else {
            return;
        };
        self.events.publish(
            &self.info,
            format!(
                "the kernel has killed a process of the task, which runs on, because the task has used all memory that its limit allows (OOM kills so far: {kills})"
            ),
        );
        self.oom_kills = kills;
        self.watch_oom_kills(&started);
    }

    fn watch_network(&self, started: &Arc<Started>) {
        if started.network.is_none() {
            return;
        }
        let (backend, started) = (Arc::clone(&self.backend), Arc::clone(started));
        self.call(async move {
            let note = catch_panic(async move { Ok(backend.network_restored(&started).await) });
            Outcome::NetworkRestored(note.await.unwrap_or_default())
        });
    }

    /// `None` if nothing more can follow.
    fn apply_network_restored(&self, note: Option<String>) {
        let started = self.status.borrow().started.clone();
        if let (Some(note), Some(started)) = (note, started) {
            self.events.publish(&self.info, note);
            self.watch_network(&started);
        }
    }

    fn apply_removal(&mut self, result: Result<(), TaskError>, reply: Option<Reply>) {
        let Err(error) = &result else {
            self.state.apply(Event::Removed);
            // Removed from the store before the caller gets the result: the next lookup must find nothing.
            self.store.remove(&self.info);
            answer_some(reply, Ok(()));
            return;
        };
        self.state.apply(Event::RemoveFailed);
        self.status.send_modify(|status| status.closed = true);
        log(&self.info.id, "could not be removed", error);
        let pause = REMOVE_RETRY_DELAYS.get(self.failed_removals).copied();
        match pause.filter(|_| may_pass(error)) {
            Some(pause) => self.call(async move {
                tokio::time::sleep(pause).await;
                Outcome::RetryDue
            }),
            None => self.state.apply(Event::GivenUp),
        }
        self.failed_removals += 1;
        answer_some(reply, result);
    }
}

impl Command {
    /// Answers it without executing it.
    fn answer(self, result: Result<(), TaskError>) {
        match self {
            Self::Signal { reply, .. } | Self::Stop { reply, .. } | Self::Destroy { reply, .. } => {
                answer(reply, result);
            }
            // Without a session there is no success.
            Self::Exec { reply, .. } => {
                let error = result.err().unwrap_or(TaskError::NotRunning);
                let _ = reply.send(Err(error));
            }
        }
    }
}

impl From<Rejection> for TaskError {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Unknown => Self::Unknown,
            Rejection::NotRunning => Self::NotRunning,
            Rejection::StillRunning => Self::StillRunning,
        }
    }
}

/// Turns a panic of `work` into an error of this call alone. Unwind safe, because `work` is not polled again, and what it shares with
/// others, the backend, keeps its state behind locks that survive a panic.
async fn catch_panic<T>(work: impl Future<Output = Result<T, TaskError>>) -> Result<T, TaskError> {
    let result = AssertUnwindSafe(work).catch_unwind().await;
    result.unwrap_or(Err(TaskError::Panicked))
}

/// Whether another removal may succeed.
fn may_pass(error: &TaskError) -> bool {
    match error {
        TaskError::Backend(error) => error.is_transient(),
        _ => true,
    }
}

async fn wait_for_exit(mut status: watch::Receiver<TaskStatus>) {
    // On timeout the caller continues: the container has been stopped, only its exit status is missing.
    let _ = tokio::time::timeout(
        EXIT_TIMEOUT,
        status.wait_for(|status| status.exit.is_some()),
    )
    .await;
}

/// The exit of a container whose supervisor can't be reached.
fn lost_exit(id: &str, error: &TaskError) -> Exit {
    log(id, "lost its supervisor", error);
    Exit {
        code: 1,
        signal: 0,
        oom_killed: false,
        error: Some(format!(
            "{UNKNOWN_END}: its supervisor can't be reached: {}",
            crate::backend::chain(error)
        )),
        ended_at: SystemTime::now(),
    }
}

fn log(id: &str, what: &str, error: &dyn std::error::Error) {
    tracing::warn!(
        task = id,
        error = crate::backend::chain(error),
        "the task {what}"
    );
}

/// Sends the result; a caller that has gone away is ignored.
fn answer(reply: Reply, result: Result<(), TaskError>) {
    let _ = reply.send(result);
}

fn answer_some(reply: Option<Reply>, result: Result<(), TaskError>) {
    if let Some(reply) = reply {
        answer(reply, result);
    }
}
