//! The desk of one task: the one place where its state changes. It hears messages and the results of what it has under way, one
//! at a time, and never waits for the backend itself, so that a forced end can overtake a long grace period.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::state::{Fact, Refusal, Request, State, Verdict};
use super::store::TaskStore;
use super::{Identity, Life, TaskError};
use crate::backend::ContainerBackend;
use crate::container::{ContainerSpec, Exit, Started, UNKNOWN_END};
use crate::signal::Signal;

/// How long finding a container again may take: the agent recovers one task after the other before its node is up.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);
/// How long an end that was brought about may take to become known before the desk goes on without.
const END_LIMIT: Duration = Duration::from_secs(10);
/// When clearing away is tried again; after the last one it is given up, with an error in the log.
const RETRIES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_secs(80),
    Duration::from_secs(320),
];

pub(super) type Reply = oneshot::Sender<Result<(), TaskError>>;
type StartReply = oneshot::Sender<Result<Arc<Started>, TaskError>>;

/// How a desk comes to its task.
#[derive(Debug)]
pub(super) enum Birth {
    Start(Box<ContainerSpec>, StartReply),
    /// When it is its turn.
    Attach(Box<Started>, Arc<Semaphore>, StartReply),
    /// Nothing is known but the id.
    Leftover(Reply),
}

/// A request to the desk.
#[derive(Debug)]
pub(super) enum Message {
    Signal {
        signal: Signal,
        reply: Reply,
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

/// The result of what was under way.
enum Outcome {
    Up(Result<Started, TaskError>, StartReply),
    Ended(Exit),
    Signalled(Result<(), TaskError>, Reply),
    Stopped(Result<(), TaskError>, Reply),
    Removed(Result<(), TaskError>, Option<Reply>),
    RetryDue,
}

#[derive(Debug)]
pub(super) struct Desk {
    identity: Arc<Identity>,
    backend: Arc<dyn ContainerBackend>,
    state: State,
    life: watch::Sender<Life>,
    messages: mpsc::Receiver<Box<Message>>,
    /// What has to wait for the next fact.
    later: Vec<Message>,
    under_way: JoinSet<Outcome>,
    failed_removals: usize,
    store: TaskStore,
}

impl Desk {
    pub(super) fn new(
        identity: Arc<Identity>,
        backend: Arc<dyn ContainerBackend>,
        life: watch::Sender<Life>,
        messages: mpsc::Receiver<Box<Message>>,
        store: TaskStore,
    ) -> Self {
        Self {
            identity,
            backend,
            state: State::Starting,
            life,
            messages,
            later: Vec::new(),
            under_way: JoinSet::new(),
            failed_removals: 0,
            store,
        }
    }

    /// Keeps the desk until nothing of the task is left.
    pub(super) async fn keep(mut self, birth: Birth) {
        self.begin(birth);
        while self.state != State::Gone {
            tokio::select! {
                Some(outcome) = self.under_way.join_next() => {
                    // Every piece of work catches its own panic; see `whole`.
                    if let Ok(outcome) = outcome {
                        self.learn(outcome);
                    }
                    for message in std::mem::take(&mut self.later) {
                        self.hear(message);
                    }
                }
                Some(message) = self.messages.recv() => self.hear(*message),
                else => break,
            }
        }
        self.store.remove(&self.identity);
        self.life.send_modify(|life| {
            life.forgotten = true;
            life.over = true;
        });
    }

    fn begin(&mut self, birth: Birth) {
        let backend = Arc::clone(&self.backend);
        match birth {
            Birth::Start(spec, reply) => {
                self.under_way.spawn(async move {
                    let up = whole(async move { Ok(backend.start(*spec).await?) }).await;
                    Outcome::Up(up, reply)
                });
            }
            Birth::Attach(started, turns, reply) => {
                self.under_way.spawn(async move {
                    // Nobody closes it.
                    let _turn = turns.acquire_owned().await;
                    let attach = whole(async move { Ok(backend.attach(&started).await?) });
                    let up = tokio::time::timeout(ATTACH_LIMIT, attach).await;
                    Outcome::Up(
                        up.unwrap_or(Err(TaskError::AttachTimeout(ATTACH_LIMIT))),
                        reply,
                    )
                });
            }
            Birth::Leftover(reply) => {
                self.state = State::Removing;
                self.remove(false, Some(reply));
            }
        }
    }

    fn hear(&mut self, message: Message) {
        let request = match &message {
            Message::Signal { .. } => Request::Signal,
            Message::Stop { .. } => Request::Stop,
            Message::Destroy { force, .. } => Request::Destroy { force: *force },
        };
        let running = matches!(self.state, State::Running | State::Stopping(_));
        match self.state.request(request) {
            Verdict::Do => self.carry_out(message, running),
            Verdict::Later => self.later.push(message),
            Verdict::Done => answer(message.into_reply(), Ok(())),
            Verdict::Refuse(refusal) => answer(message.into_reply(), Err(refusal.into())),
        }
    }

    fn carry_out(&mut self, message: Message, running: bool) {
        let backend = Arc::clone(&self.backend);
        let started = self.life.borrow().started.clone();
        match (message, started) {
            (Message::Destroy { reply, .. }, _) => self.remove(running, Some(reply)),
            (Message::Signal { signal, reply }, Some(started)) => {
                self.under_way.spawn(async move {
                    let sent = whole(async move { Ok(backend.signal(&started, signal).await?) });
                    Outcome::Signalled(sent.await, reply)
                });
            }
            (
                Message::Stop {
                    signal,
                    grace,
                    reply,
                },
                Some(started),
            ) => {
                let life = self.life.subscribe();
                self.under_way.spawn(async move {
                    let stopped =
                        whole(async move { Ok(backend.stop(&started, signal, grace).await?) })
                            .await;
                    if stopped.is_ok() {
                        until_end(life).await;
                    }
                    Outcome::Stopped(stopped, reply)
                });
            }
            (message, None) => answer(message.into_reply(), Err(TaskError::NotRunning)),
        }
    }

    /// Clears everything away; what still runs is ended first, so that its true end becomes known to those who wait for it.
    fn remove(&mut self, running: bool, reply: Option<Reply>) {
        self.life.send_modify(|life| life.forgotten = true);
        let backend = Arc::clone(&self.backend);
        let id = self.identity.id.clone();
        let started = self.life.borrow().started.clone().filter(|_| running);
        let life = self.life.subscribe();
        self.under_way.spawn(async move {
            let removed = whole(async move {
                if let Some(started) = started {
                    match backend
                        .stop(&started, Some(Signal::KILL), Duration::ZERO)
                        .await
                    {
                        Ok(()) => until_end(life).await,
                        Err(error) => log(&id, "could not be ended before it is removed", &error),
                    }
                }
                Ok(backend.remove(&id).await?)
            });
            Outcome::Removed(removed.await, reply)
        });
    }

    fn learn(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Up(up, reply) => self.learn_start(up, reply),
            Outcome::Ended(exit) => {
                self.state.learn(Fact::End);
                self.life.send_modify(|life| life.exit = Some(exit));
            }
            Outcome::Signalled(result, reply) => answer(reply, result),
            Outcome::Stopped(result, reply) => {
                if result.is_err() {
                    self.state.learn(Fact::StopFailed);
                }
                answer(reply, result);
            }
            Outcome::Removed(result, reply) => self.learn_removal(result, reply),
            Outcome::RetryDue => {
                if self.state == State::Leftover {
                    self.state.learn(Fact::RetryDue);
                    self.remove(false, None);
                }
            }
        }
    }

    fn learn_start(&mut self, up: Result<Started, TaskError>, reply: StartReply) {
        let started = match up {
            Ok(started) => Arc::new(started),
            Err(error) => {
                self.state.learn(Fact::StartFailed);
                // Out of the store before anybody hears of it: a second attempt may have the same id.
                self.store.remove(&self.identity);
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.state.learn(Fact::Up);
        self.life
            .send_modify(|life| life.started = Some(Arc::clone(&started)));
        let backend = Arc::clone(&self.backend);
        let id = self.identity.id.clone();
        let container = Arc::clone(&started);
        self.under_way.spawn(async move {
            let end = whole(async move { Ok(backend.wait(&container).await?) });
            Outcome::Ended(end.await.unwrap_or_else(|error| lost(&id, &error)))
        });
        let _ = reply.send(Ok(started));
    }

    fn learn_removal(&mut self, result: Result<(), TaskError>, reply: Option<Reply>) {
        let Err(error) = &result else {
            self.state.learn(Fact::Removed);
            // Out of the store before anybody hears of it: who asks again shall find nothing.
            self.store.remove(&self.identity);
            answer_some(reply, Ok(()));
            return;
        };
        self.state.learn(Fact::RemoveFailed);
        self.life.send_modify(|life| life.over = true);
        log(&self.identity.id, "could not be removed", error);
        if let Some(pause) = RETRIES.get(self.failed_removals) {
            let pause = *pause;
            self.under_way.spawn(async move {
                tokio::time::sleep(pause).await;
                Outcome::RetryDue
            });
        } else {
            self.state.learn(Fact::GivenUp);
        }
        self.failed_removals += 1;
        answer_some(reply, result);
    }
}

impl Message {
    fn into_reply(self) -> Reply {
        match self {
            Self::Signal { reply, .. } | Self::Stop { reply, .. } | Self::Destroy { reply, .. } => {
                reply
            }
        }
    }
}

impl From<Refusal> for TaskError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unknown => Self::Unknown,
            Refusal::NotRunning => Self::NotRunning,
            Refusal::StillRunning => Self::StillRunning,
        }
    }
}

/// Runs work whose panic becomes an error of this work alone. It ends with the caller.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> Result<T, TaskError> {
    let handle = AbortOnDropHandle::new(tokio::spawn(work));
    handle.await.unwrap_or(Err(TaskError::Panicked))
}

async fn until_end(mut life: watch::Receiver<Life>) {
    // Without an answer the caller goes on: the end was brought about, only its record is missing.
    let _ = tokio::time::timeout(END_LIMIT, life.wait_for(|life| life.exit.is_some())).await;
}

/// The exit of a container that nobody can watch any more.
fn lost(id: &str, error: &TaskError) -> Exit {
    log(id, "can't be watched any more", error);
    Exit {
        code: 1,
        signal: 0,
        oom_killed: false,
        error: Some(format!(
            "{UNKNOWN_END}: lost track of the container: {}",
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

/// A caller that went away needs no answer.
fn answer(reply: Reply, result: Result<(), TaskError>) {
    let _ = reply.send(result);
}

fn answer_some(reply: Option<Reply>, result: Result<(), TaskError>) {
    if let Some(reply) = reply {
        answer(reply, result);
    }
}
