//! The supervisor: one process per container, this binary as `supervise DIR`, which is systemd-nspawn's parent and outlives plugin
//! and agent. This file is the plugin's client: it launches a supervisor, reconnects to one, sends requests and waits for the exit.
//! What a launch spec should say is decided by `backend`.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

use crate::blocking;
use crate::container::{Cause, Exit, Process, Started, UNKNOWN_END};
use crate::signal::Signal;

pub mod cleanup;
mod clients;
pub mod enter;
mod exit_status;
pub mod failpoint;
pub mod init_channel;
mod launch_spec_record;
pub mod lock;
pub mod logs;
pub mod orphans;
pub mod owner;
mod pidfd;
pub mod process;
pub mod protocol;
pub mod resource;
pub mod run;
pub mod state_dir;
pub mod task_dir;
mod tree_lock;
mod zone;

pub use lock::TaskLock;
pub use protocol::{Action, StartFailure, StartStep};
pub use task_dir::{LaunchSpec, Pid1, TaskDir};

use protocol::{Event, IncomingEvent, Request};

/// How things stand with a supervised container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It is not up yet.
    Starting,
    /// It is up.
    Up(Arc<Started>),
    /// It did not come up.
    Failed(Arc<StartFailure>),
    /// It has ended.
    Ended(Arc<Exit>),
}

/// A container with a supervisor, seen from the plugin. Clones are the same one.
#[derive(Debug, Clone)]
pub struct SupervisorClient {
    status: watch::Receiver<Status>,
    /// Turns true when the supervisor has freed everything and is gone.
    exited: watch::Receiver<bool>,
    requests: mpsc::Sender<PendingRequest>,
}

type PendingRequest = (Action, oneshot::Sender<Result<(), String>>);

/// Starts a supervisor, which is `binary` in another life, for the order that lies in `records`, and follows it. `program`
/// becomes the container's first where that is ours, see [`init_channel::init_binary`]. Blocks; needs a runtime around it all the same.
#[expect(clippy::disallowed_methods, reason = "a supervisor is a process")]
pub fn launch(
    binary: &Path,
    task_dir: &TaskDir,
    program: OwnedFd,
    tracker: &TaskTracker,
) -> io::Result<SupervisorClient> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let stream = UnixStream::from_std(ours)?;
    let log = task_dir.open_log()?;
    // The supervisor inherits the lock with the descriptor: see `TaskDir::has_supervisor`.
    lock_with_retry(&log)?;
    let mut command = Command::new(binary);
    command
        .arg0("nomad-driver-nspawn")
        .arg("supervise")
        .arg(task_dir.path())
        .env_clear();
    // Never the plugin's own stdout and stderr: an agent takes a plugin for alive as long as anybody holds them.
    command
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(program)
        .stderr(log);
    let mut child = command.spawn()?;
    // The command holds the other end of the line, which only the supervisor may have: its closing is the supervisor's end.
    drop(command);
    let reaped = async move { drop(child.wait().await) };
    Ok(follow(stream, task_dir.clone(), false, reaped, tracker))
}

/// How long a start waits for those who look whether it has a supervisor already.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// Nobody can hold this lock but somebody who looks whether it is held, for a moment.
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

/// Finds the supervisor of `started` again, or the end it has recorded. `None` if there is neither.
pub async fn attach(
    task_dir: &TaskDir,
    started: &Started,
    tracker: &TaskTracker,
) -> io::Result<Option<SupervisorClient>> {
    match UnixStream::connect(task_dir.control_socket()).await {
        Ok(stream) => {
            let reaped = wait_for_exit(started.supervisor);
            Ok(Some(follow(
                stream,
                task_dir.clone(),
                true,
                reaped,
                tracker,
            )))
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
                    "nobody listens there, and the record of its end can't be read: {error}"
                );
                io::Error::new(error.kind(), text)
            })?;
            Ok(exit.map(SupervisorClient::ended))
        }
        Err(error) => Err(error),
    }
}

/// Asks whoever watches these records to end the container by force. Nobody there is fine.
pub async fn request_kill(task_dir: &TaskDir) {
    if let Ok(mut stream) = UnixStream::connect(task_dir.control_socket()).await {
        let request = Request {
            request: 0,
            verb: Action::Kill,
        };
        // One that is going away needs no telling.
        let _ = stream.write_all(&protocol::encode(&request)).await;
    }
}

impl SupervisorClient {
    /// One that has ended, with nobody to ask any more.
    fn ended(exit: Exit) -> Self {
        let (requests, _) = mpsc::channel(1);
        let (_, status) = watch::channel(Status::Ended(Arc::new(exit)));
        let (_, exited) = watch::channel(true);
        Self {
            status,
            exited,
            requests,
        }
    }

    /// How things stand now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits until the start is over, one way or the other.
    pub async fn start_outcome(&self) -> Status {
        let mut status = self.status.clone();
        let outcome = status.wait_for(|status| *status != Status::Starting).await;
        outcome.map_or_else(|_| self.status(), |status| status.clone())
    }

    /// Waits for the end; `None` if it never came up.
    pub async fn end(&self) -> Option<Exit> {
        let mut status = self.status.clone();
        let _ = status
            .wait_for(|status| matches!(status, Status::Failed(_) | Status::Ended(_)))
            .await;
        match self.status() {
            Status::Ended(exit) => Some((*exit).clone()),
            _ => None,
        }
    }

    /// Waits until the supervisor has freed everything and is gone.
    pub async fn wait_until_gone(&self) {
        let mut exited = self.exited.clone();
        let _ = exited.wait_for(|exited| *exited).await;
    }

    /// Asks the supervisor for something and waits for its answer. One that is gone has nothing left to do.
    pub async fn request(&self, verb: Action) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        if self.requests.send((verb, answer)).await.is_err() {
            return Ok(());
        }
        answered.await.unwrap_or(Ok(()))
    }
}

/// Reads a lifeline until it ends, and then waits until the process at its other end has `departed`.
fn follow(
    stream: UnixStream,
    task_dir: TaskDir,
    known: bool,
    wait_for_exit: impl Future<Output = ()> + Send + 'static,
    tracker: &TaskTracker,
) -> SupervisorClient {
    let (requests_sender, requests) = mpsc::channel(8);
    let (status, status_seen) = watch::channel(Status::Starting);
    let (exited, exited_seen) = watch::channel(false);
    let connection = Connection {
        stream,
        task_dir,
        known,
        status,
    };
    tracker.spawn(async move {
        connection.follow(requests).await;
        wait_for_exit.await;
        exited.send_replace(true);
    });
    SupervisorClient {
        status: status_seen,
        exited: exited_seen,
        requests: requests_sender,
    }
}

/// How a lifeline came to its end.
#[derive(Debug, Clone, Copy)]
enum Disconnect {
    Ended,
    Garbled,
}

impl Disconnect {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "its supervisor was killed",
            Self::Garbled => "its supervisor talked nonsense",
        }
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    task_dir: TaskDir,
    /// Whether there is a handle of the container, because it was not this plugin that started it.
    known: bool,
    status: watch::Sender<Status>,
}

impl Connection {
    async fn follow(mut self, mut requests: mpsc::Receiver<PendingRequest>) {
        let mut received = Vec::new();
        let mut pending: Vec<(u64, oneshot::Sender<Result<(), String>>)> = Vec::new();
        let mut number = 0;
        let why = 'line: loop {
            tokio::select! {
                read = self.stream.read_buf(&mut received) => match read {
                    Ok(0) | Err(_) => break Disconnect::Ended,
                    Ok(_) => while let Some(incoming) = protocol::decode_next(&mut received) {
                        match incoming {
                            Ok(IncomingEvent::Known(event)) => self.handle_event(event, &mut pending),
                            Ok(IncomingEvent::Unknown(_)) => {}
                            Err(_) => break 'line Disconnect::Garbled,
                        }
                        if received.is_empty() {
                            // What a start needed is not held for as long as the task runs.
                            received = Vec::new();
                        }
                    },
                },
                Some((verb, answer)) = requests.recv() => {
                    number += 1;
                    pending.push((number, answer));
                    if self.stream.write_all(&protocol::encode(&Request { request: number, verb })).await.is_err() {
                        break Disconnect::Ended;
                    }
                }
            }
        };
        self.on_disconnect(why).await;
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
            Event::Done { request, error } => {
                if let Some(index) = pending.iter().position(|(number, _)| *number == request) {
                    let _ = pending.swap_remove(index).1.send(error.map_or(Ok(()), Err));
                }
            }
        }
    }

    /// The first end is the end.
    fn set(&self, new: Status) {
        self.status.send_if_modified(|status| {
            let open = matches!(status, Status::Starting | Status::Up(_));
            if open {
                *status = new;
            }
            open
        });
    }

    /// The supervisor is gone, or of no use any more. If it left no word of the end, nobody can learn the end: then the
    /// container is ended, so that it can't run on unwatched beside its successor.
    async fn on_disconnect(&self, why: Disconnect) {
        let status = self.status.borrow().clone();
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

/// Waits until a supervisor that nobody here is the parent of has ended. Takes no thread: a thousand may end at once.
async fn wait_for_exit(supervisor: Process) {
    let Ok(handle) = process::ProcessHandle::open_checked(supervisor) else {
        return;
    };
    // No pipe, and nothing is read from it: this is the runtime's one safe way to await a descriptor that it did not open.
    let Ok(handle) = pipe::Receiver::from_owned_fd_unchecked(handle.into()) else {
        return;
    };
    let _ = tokio::time::timeout(REQUEST_TIMEOUT, handle.readable()).await;
}

/// Lets a supervisor that was stopped go on: nobody else carries out what is asked of it. One that runs takes no notice.
pub fn sigcont(supervisor: Process) {
    if let Ok(handle) = process::ProcessHandle::open_checked(supervisor) {
        let _ = handle.signal(Signal::CONT);
    }
}

/// Ends a supervisor that does not answer. What it watched over ends with it, see [`SupervisorClient`].
pub async fn kill_supervisor(supervisor: Process) {
    let _ = tokio::task::spawn_blocking(move || cleanup::kill(supervisor)).await;
}

/// How long a supervisor may take to carry out a kill.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
