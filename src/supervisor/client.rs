//! The plugin's client of one supervisor: launches it, reconnects to it, sends requests and waits for the exit. Runs in the plugin. Does
//! not decide what a launch spec contains; `backend` does.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

use super::connection::ControlConnection;
use super::protocol::{Action, Event, IncomingEvent, Request, StartFailure, StartStep};
use crate::blocking;
use crate::cleanup;
use crate::container::{Cause, Exit, Process, StartNotes, Started, UNKNOWN_END};
use crate::signal::Signal;
use crate::state::TaskDir;
use crate::sys::process::ProcessHandle;

/// State of a supervised container, as far as the plugin knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It is not up yet.
    Starting,
    /// It is up.
    Up(Arc<Started>),
    /// It did not come up.
    Failed(Arc<StartFailure>),
    /// It has exited.
    Ended(Arc<Exit>),
}

impl Status {
    /// Whether no other can follow.
    fn is_final(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Ended(_))
    }
}

/// How much of the supervisor there still is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Connection {
    /// The connection is open: after the container's end, the supervisor is releasing resources.
    Open,
    /// The connection is closed, and what follows from that has been done.
    Closed,
    /// The supervisor has exited too.
    SupervisorExited,
}

/// The plugin's client of one supervisor. Clones share the same connection.
#[derive(Debug, Clone)]
pub struct SupervisorClient {
    observed: watch::Receiver<Observed>,
    requests: mpsc::Sender<PendingRequest>,
}

/// What the plugin knows about a supervisor and its container. In one channel, because each takes half a kilobyte.
#[derive(Debug)]
struct Observed {
    status: Status,
    /// OOM kills that the container has survived.
    oom_kills: u64,
    connection: Connection,
}

type PendingRequest = (Action, oneshot::Sender<Result<(), String>>);

/// Launches a supervisor (this same program, `binary`) for the launch spec in `task_dir`, and follows it. `program` becomes PID 1
/// of the container if the driver's init is used, see [`super::init_channel::init_binary`]. Blocks, but must be called within a tokio
/// runtime.
#[expect(clippy::disallowed_methods, reason = "a supervisor is a process")]
pub fn launch(
    binary: &Path,
    task_dir: &TaskDir,
    program: OwnedFd,
    notes: StartNotes,
    tracker: &TaskTracker,
) -> io::Result<SupervisorClient> {
    let (connection, theirs) = ControlConnection::pair()?;
    let log = task_dir.open_log()?;
    // The supervisor inherits the lock with the descriptor: see `TaskDir::has_supervisor`.
    lock_with_retry(&log)?;
    let mut command = Command::new(binary);
    command
        .arg0("nomad-driver-nspawn")
        .arg("supervise")
        .arg(task_dir.path())
        .env_clear();
    // Never the plugin's own stdout and stderr: the agent considers a plugin alive as long as any process holds them open.
    command.stdin(theirs).stdout(program).stderr(log);
    let mut child = command.spawn()?;
    // `command` still holds the supervisor's end of the connection. Only the supervisor may hold it: the connection closes when the
    // supervisor exits.
    drop(command);
    let reaped = async move { drop(child.wait().await) };
    let follower = (task_dir.clone(), false, notes);
    Ok(follow(connection, follower, reaped, tracker))
}

/// How long a start waits for processes that are checking whether the task already has a supervisor.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// Only a check whether the lock is held can hold this lock itself, and only for a moment.
fn lock_with_retry(log: &File) -> io::Result<()> {
    let end = Instant::now() + LOCK_TIMEOUT;
    loop {
        match log.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return Ok(other?),
        }
    }
}

/// Reconnects to the supervisor of `started`, or returns the exit it has recorded. `None` if there is neither.
pub async fn attach(
    task_dir: &TaskDir,
    started: &Started,
    notes: StartNotes,
    tracker: &TaskTracker,
) -> io::Result<Option<SupervisorClient>> {
    match ControlConnection::open(task_dir).await {
        Ok(connection) => {
            let reaped = wait_for_exit(started.supervisor);
            let follower = (task_dir.clone(), true, notes);
            Ok(Some(follow(connection, follower, reaped, tracker)))
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::ConnectionReset
            ) =>
        {
            let owned = task_dir.clone();
            let exit = blocking::run(move || owned.exit()).await.map_err(|error| {
                let text = format!(
                    "the supervisor does not listen any more, and its exit record can't be read: {error}"
                );
                io::Error::new(error.kind(), text)
            })?;
            Ok(exit.map(SupervisorClient::ended))
        }
        Err(error) => Err(error),
    }
}

/// Connects to the supervisor of a start without a running record, which would name that process. So [`SupervisorClient::wait_until_gone`]
/// waits only until the connection is closed.
pub async fn attach_unrecorded(
    task_dir: &TaskDir,
    tracker: &TaskTracker,
) -> io::Result<SupervisorClient> {
    let connection = ControlConnection::open(task_dir).await?;
    let exited = std::future::ready(());
    let follower = (task_dir.clone(), false, StartNotes::default());
    Ok(follow(connection, follower, exited, tracker))
}

impl SupervisorClient {
    /// A client of a container that has exited, without a supervisor to send requests to.
    fn ended(exit: Exit) -> Self {
        let (requests, _) = mpsc::channel(1);
        let (_, observed) = watch::channel(Observed {
            status: Status::Ended(Arc::new(exit)),
            oom_kills: 0,
            connection: Connection::SupervisorExited,
        });
        Self { observed, requests }
    }

    /// The current state.
    pub fn status(&self) -> Status {
        self.observed.borrow().status.clone()
    }

    /// Waits until the start has succeeded or failed.
    pub async fn start_outcome(&self) -> Status {
        self.wait_for(|observed| observed.status != Status::Starting)
            .await;
        self.status()
    }

    /// Waits for the exit; `None` if the container never came up.
    pub async fn end(&self) -> Option<Exit> {
        self.wait_for(|observed| observed.status.is_final()).await;
        match self.status() {
            Status::Ended(exit) => Some((*exit).clone()),
            _ => None,
        }
    }

    /// Waits until more than `seen` processes of the container have been killed because its memory was used up, and returns how many.
    /// `None` if no more can follow.
    pub async fn oom_kills(&self, seen: u64) -> Option<u64> {
        self.wait_for(|observed| observed.oom_kills > seen || observed.status.is_final())
            .await;
        Some(self.observed.borrow().oom_kills).filter(|kills| *kills > seen)
    }

    /// Whether the connection to the supervisor is open. If the container has ended, the supervisor is then releasing what it held.
    pub fn is_connected(&self) -> bool {
        self.observed.borrow().connection == Connection::Open
    }

    /// Waits until the connection is closed: after the container's end, until the supervisor has released everything.
    pub async fn wait_until_disconnected(&self) {
        self.wait_for(|observed| observed.connection >= Connection::Closed)
            .await;
    }

    /// Waits until the supervisor has released everything and has exited.
    pub async fn wait_until_gone(&self) {
        self.wait_for(|observed| observed.connection >= Connection::SupervisorExited)
            .await;
    }

    /// Waits until this holds, or no change can follow.
    async fn wait_for(&self, holds: impl FnMut(&Observed) -> bool) {
        let _ = self.observed.clone().wait_for(holds).await;
    }

    /// Sends a request to the supervisor and waits for the answer. If the supervisor is gone, nothing is left to do.
    pub async fn request(&self, verb: Action) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        if self.requests.send((verb, answer)).await.is_err() {
            return Ok(());
        }
        answered.await.unwrap_or(Ok(()))
    }
}

/// Reads events from the control socket until the connection closes, and then waits until the supervisor process has exited
/// (`wait_for_exit`).
fn follow(
    connection: ControlConnection,
    (task_dir, known, notes): (TaskDir, bool, StartNotes),
    wait_for_exit: impl Future<Output = ()> + Send + 'static,
    tracker: &TaskTracker,
) -> SupervisorClient {
    let (requests_sender, requests) = mpsc::channel(8);
    let (sender, observed) = watch::channel(Observed {
        status: Status::Starting,
        oom_kills: 0,
        connection: Connection::Open,
    });
    let follower = Follower {
        connection,
        task_dir,
        known,
        notes,
        observed: sender,
    };
    tracker.spawn(async move {
        let sender = follower.follow(requests).await;
        let set = |now| sender.send_modify(|observed| observed.connection = now);
        set(Connection::Closed);
        wait_for_exit.await;
        set(Connection::SupervisorExited);
    });
    SupervisorClient {
        observed,
        requests: requests_sender,
    }
}

/// How the connection to the supervisor was lost.
#[derive(Debug, Clone, Copy)]
enum Disconnect {
    Closed,
    InvalidMessage,
}

impl Disconnect {
    fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "its supervisor was killed",
            Self::InvalidMessage => "its supervisor sent an invalid message",
        }
    }
}

/// What the plugin knows about one supervisor, and the connection from which it learns more.
#[derive(Debug)]
struct Follower {
    connection: ControlConnection,
    task_dir: TaskDir,
    /// Whether Nomad already holds a handle of the container, because this plugin did not start it but recovered it.
    known: bool,
    /// Receives what the user should know.
    notes: StartNotes,
    observed: watch::Sender<Observed>,
}

impl Follower {
    /// Runs until the connection is closed.
    async fn follow(
        mut self,
        mut requests: mpsc::Receiver<PendingRequest>,
    ) -> watch::Sender<Observed> {
        let mut pending: Vec<(u64, oneshot::Sender<Result<(), String>>)> = Vec::new();
        let mut number = 0;
        let why = loop {
            tokio::select! {
                received = self.connection.receive() => match received {
                    Ok(IncomingEvent::Known(event)) => self.handle_event(*event, &mut pending),
                    Ok(IncomingEvent::Unknown(_)) => {}
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        break Disconnect::InvalidMessage;
                    }
                    Err(_) => break Disconnect::Closed,
                },
                Some((verb, answer)) = requests.recv() => {
                    number += 1;
                    pending.push((number, answer));
                    let request = Request { request: number, verb };
                    if self.connection.send(&request).await.is_err() {
                        break Disconnect::Closed;
                    }
                }
            }
        };
        self.on_disconnect(why).await;
        self.observed
    }

    fn handle_event(
        &mut self,
        event: Event,
        pending: &mut Vec<(u64, oneshot::Sender<Result<(), String>>)>,
    ) {
        match event {
            Event::Started(started) => self.set(Status::Up(Arc::new(started))),
            Event::Failed(failure) => self.set(Status::Failed(Arc::new(failure))),
            Event::Exited(exit) => self.set(Status::Ended(Arc::new(exit))),
            Event::OomKills(kills) => self
                .observed
                .send_modify(|observed| observed.oom_kills = kills),
            Event::Note(note) => self.notes.add(note),
            Event::Done { request, error } => {
                if let Some(index) = pending.iter().position(|(number, _)| *number == request) {
                    let _ = pending.swap_remove(index).1.send(error.map_or(Ok(()), Err));
                }
            }
        }
    }

    /// The first final state is kept.
    fn set(&self, new: Status) {
        self.observed.send_if_modified(|observed| {
            let open = !observed.status.is_final();
            if open {
                observed.status = new;
            }
            open
        });
    }

    /// The supervisor is gone or its connection is unusable. If it recorded no exit, the exit can't be learned any more: the
    /// container is killed, so that it does not run unsupervised beside its replacement.
    async fn on_disconnect(&self, why: Disconnect) {
        let status = self.observed.borrow().status.clone();
        let was_up = match status {
            Status::Ended(_) | Status::Failed(_) => return,
            Status::Up(_) => true,
            Status::Starting => self.known,
        };
        let task_dir = self.task_dir.clone();
        if let Ok(Some(exit)) = blocking::run(move || task_dir.exit()).await {
            return self.set(Status::Ended(Arc::new(exit)));
        }
        let task_dir = self.task_dir.clone();
        let ended = tokio::task::spawn_blocking(move || cleanup::kill_and_release(&task_dir)).await;
        let why = why.as_str();
        let reason = match ended {
            Ok(Ok(())) if !was_up => format!("{why} before the container was up"),
            Ok(Ok(())) => {
                format!("{UNKNOWN_END}: {why}, so the container was ended")
            }
            Ok(Err(error)) => {
                format!("{UNKNOWN_END}: {why} and the container could not be ended: {error}")
            }
            Err(error) => {
                format!("{UNKNOWN_END}: {why} and ending the container failed: {error}")
            }
        };
        if !was_up {
            let failure = StartFailure::new(StartStep::Watch, Cause::Unknown, reason);
            return self.set(Status::Failed(Arc::new(failure)));
        }
        let code = 128 + Signal::KILL.number();
        let error = Some(reason);
        let exit = Exit {
            code,
            signal: Signal::KILL.number(),
            oom_killed: false,
            error,
            ended_at: SystemTime::now(),
        };
        let (task_dir, kept) = (self.task_dir.clone(), exit.clone());
        let _ = blocking::run(move || task_dir.write_exit(&kept)).await;
        self.set(Status::Ended(Arc::new(exit)));
    }
}

/// Waits until a supervisor that is not a child of this process has exited. Uses no thread: a thousand may exit at once.
async fn wait_for_exit(supervisor: Process) {
    let Ok(handle) = ProcessHandle::open_checked(supervisor) else {
        return;
    };
    // The pidfd is not a pipe, and nothing is read from it: this is tokio's only safe way to await a descriptor that tokio did not
    // open.
    let Ok(handle) = pipe::Receiver::from_owned_fd_unchecked(handle.into()) else {
        return;
    };
    let _ = tokio::time::timeout(REQUEST_TIMEOUT, handle.readable()).await;
}

/// Sends SIGCONT in case the supervisor was stopped, because no other process carries out its requests. Harmless if it is running.
pub fn sigcont(supervisor: Process) {
    if let Ok(handle) = ProcessHandle::open_checked(supervisor) {
        let _ = handle.signal(Signal::CONT);
    }
}

/// Kills a supervisor that does not answer. Its container is killed as a consequence, see [`SupervisorClient`].
pub async fn kill_supervisor(supervisor: Process) {
    let _ = tokio::task::spawn_blocking(move || cleanup::kill(supervisor)).await;
}

/// How long a supervisor may take to carry out a kill.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
