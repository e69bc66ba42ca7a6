//! The night watch: one process per container, the same binary in another life, that is systemd-nspawn's parent and outlives
//! plugin and agent. This file is the plugin's end of it: launching one, finding one again, asking it, hearing how it ends.
//! It knows orders and processes; what an order should say is `backend`'s to decide.

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

pub mod claim;
mod ending;
pub mod enter;
pub mod first;
pub mod line;
mod listeners;
pub mod logs;
mod order_form;
pub mod orphans;
pub mod owner;
pub mod pause;
mod pidfd;
pub mod process;
pub mod record;
pub mod remains;
pub mod resource;
pub mod run;
pub mod state_dir;
mod tree_lock;
mod zone;

pub use claim::Claim;
pub use line::{Failure, Step, Verb};
pub use record::{First, Order, Records};

use line::{News, Request, Told};

/// How things stand with a supervised container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It is not up yet.
    Starting,
    /// It is up.
    Up(Arc<Started>),
    /// It did not come up.
    Failed(Arc<Failure>),
    /// It has ended.
    Ended(Arc<Exit>),
}

/// A container with a supervisor, seen from the plugin. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Supervised {
    status: watch::Receiver<Status>,
    /// Turns true when the supervisor has freed everything and is gone.
    gone: watch::Receiver<bool>,
    requests: mpsc::Sender<Asked>,
}

type Asked = (Verb, oneshot::Sender<Result<(), String>>);

/// Starts a supervisor, which is `binary` in another life, for the order that lies in `records`, and follows it. `program`
/// becomes the container's first where that is ours, see [`first::program`]. Blocks; needs a runtime around it all the same.
#[expect(clippy::disallowed_methods, reason = "a supervisor is a process")]
pub fn launch(
    binary: &Path,
    records: &Records,
    program: OwnedFd,
    tracker: &TaskTracker,
) -> io::Result<Supervised> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let stream = UnixStream::from_std(ours)?;
    let log = records.open_log()?;
    // The supervisor inherits the lock with the descriptor: see `Records::is_watched`.
    lock_soon(&log)?;
    let mut command = Command::new(binary);
    command
        .arg0("nomad-driver-nspawn")
        .arg("supervise")
        .arg(records.path())
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
    Ok(follow(stream, records.clone(), false, reaped, tracker))
}

/// How long a start waits for those who look whether it has a supervisor already.
const MOMENT: Duration = Duration::from_millis(500);

/// Nobody can hold this lock but somebody who looks whether it is held, for a moment.
fn lock_soon(log: &File) -> io::Result<()> {
    let end = Instant::now() + MOMENT;
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
    records: &Records,
    started: &Started,
    tracker: &TaskTracker,
) -> io::Result<Option<Supervised>> {
    match UnixStream::connect(records.lifeline()).await {
        Ok(stream) => {
            let reaped = departed(started.supervisor);
            Ok(Some(follow(stream, records.clone(), true, reaped, tracker)))
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::ConnectionReset
            ) =>
        {
            let owned = records.clone();
            let exit = blocking::run(move || owned.exit()).await.map_err(|error| {
                let text = format!(
                    "nobody listens there, and the record of its end can't be read: {error}"
                );
                io::Error::new(error.kind(), text)
            })?;
            Ok(exit.map(Supervised::ended))
        }
        Err(error) => Err(error),
    }
}

/// Asks whoever watches these records to end the container by force. Nobody there is fine.
pub async fn dismiss(records: &Records) {
    if let Ok(mut stream) = UnixStream::connect(records.lifeline()).await {
        let request = Request {
            request: 0,
            verb: Verb::Kill,
        };
        // One that is going away needs no telling.
        let _ = stream.write_all(&line::line(&request)).await;
    }
}

impl Supervised {
    /// One that has ended, with nobody to ask any more.
    fn ended(exit: Exit) -> Self {
        let (requests, _) = mpsc::channel(1);
        let (_, status) = watch::channel(Status::Ended(Arc::new(exit)));
        let (_, gone) = watch::channel(true);
        Self {
            status,
            gone,
            requests,
        }
    }

    /// How things stand now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits until the start is over, one way or the other.
    pub async fn settled(&self) -> Status {
        let mut status = self.status.clone();
        let settled = status.wait_for(|status| *status != Status::Starting).await;
        settled.map_or_else(|_| self.status(), |status| status.clone())
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
    pub async fn gone(&self) {
        let mut gone = self.gone.clone();
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Asks the supervisor for something and waits for its answer. One that is gone has nothing left to do.
    pub async fn ask(&self, verb: Verb) -> Result<(), String> {
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
    records: Records,
    known: bool,
    departed: impl Future<Output = ()> + Send + 'static,
    tracker: &TaskTracker,
) -> Supervised {
    let (asking, requests) = mpsc::channel(8);
    let (status, status_seen) = watch::channel(Status::Starting);
    let (gone, gone_seen) = watch::channel(false);
    let line = Line {
        stream,
        records,
        known,
        status,
    };
    tracker.spawn(async move {
        line.follow(requests).await;
        departed.await;
        gone.send_replace(true);
    });
    Supervised {
        status: status_seen,
        gone: gone_seen,
        requests: asking,
    }
}

/// How a lifeline came to its end.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Ended,
    Garbled,
}

impl Loss {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "its supervisor was killed",
            Self::Garbled => "its supervisor talked nonsense",
        }
    }
}

#[derive(Debug)]
struct Line {
    stream: UnixStream,
    records: Records,
    /// Whether there is a handle of the container, because it was not this plugin that started it.
    known: bool,
    status: watch::Sender<Status>,
}

impl Line {
    async fn follow(mut self, mut requests: mpsc::Receiver<Asked>) {
        let mut received = Vec::new();
        let mut asked: Vec<(u64, oneshot::Sender<Result<(), String>>)> = Vec::new();
        let mut number = 0;
        let why = 'line: loop {
            tokio::select! {
                read = self.stream.read_buf(&mut received) => match read {
                    Ok(0) | Err(_) => break Loss::Ended,
                    Ok(_) => while let Some(told) = line::next(&mut received) {
                        match told {
                            Ok(Told::Known(news)) => self.hear(news, &mut asked),
                            Ok(Told::Unknown(_)) => {}
                            Err(_) => break 'line Loss::Garbled,
                        }
                        if received.is_empty() {
                            // What a start needed is not held for as long as the task runs.
                            received = Vec::new();
                        }
                    },
                },
                Some((verb, answer)) = requests.recv() => {
                    number += 1;
                    asked.push((number, answer));
                    if self.stream.write_all(&line::line(&Request { request: number, verb })).await.is_err() {
                        break Loss::Ended;
                    }
                }
            }
        };
        self.lost(why).await;
    }

    fn hear(&mut self, news: News, asked: &mut Vec<(u64, oneshot::Sender<Result<(), String>>)>) {
        match news {
            News::Started(started) => self.set(Status::Up(Arc::new(started))),
            News::Failed(failure) => self.set(Status::Failed(Arc::new(failure))),
            News::Exited(exit) => self.set(Status::Ended(Arc::new(exit))),
            News::Done { request, error } => {
                if let Some(index) = asked.iter().position(|(number, _)| *number == request) {
                    let _ = asked.swap_remove(index).1.send(error.map_or(Ok(()), Err));
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
    async fn lost(&self, why: Loss) {
        let status = self.status.borrow().clone();
        let was_up = match status {
            Status::Ended(_) | Status::Failed(_) => return,
            Status::Up(_) => true,
            Status::Starting => self.known,
        };
        let records = self.records.clone();
        if let Ok(Some(exit)) = blocking::run(move || records.exit()).await {
            return self.set(Status::Ended(Arc::new(exit)));
        }
        let records = self.records.clone();
        let ended = tokio::task::spawn_blocking(move || remains::end(&records)).await;
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
            let failure = Failure::new(Step::Watch, Cause::Unknown, reason);
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
        let (records, kept) = (self.records.clone(), exit.clone());
        let _ = blocking::run(move || records.write_exit(&kept)).await;
        self.set(Status::Ended(Arc::new(exit)));
    }
}

/// Waits until a supervisor that nobody here is the parent of has ended. Takes no thread: a thousand may end at once.
async fn departed(supervisor: Process) {
    let Ok(held) = process::Held::again(supervisor) else {
        return;
    };
    // No pipe, and nothing is read from it: this is the runtime's one safe way to await a descriptor that it did not open.
    let Ok(held) = pipe::Receiver::from_owned_fd_unchecked(held.into()) else {
        return;
    };
    let _ = tokio::time::timeout(PROMPT, held.readable()).await;
}

/// Lets a supervisor that was stopped go on: nobody else carries out what is asked of it. One that runs takes no notice.
pub fn rouse(supervisor: Process) {
    if let Ok(held) = process::Held::again(supervisor) {
        let _ = held.signal(Signal::CONT);
    }
}

/// Ends a supervisor that does not answer. What it watched over ends with it, see [`Supervised`].
pub async fn put_down(supervisor: Process) {
    let _ = tokio::task::spawn_blocking(move || remains::kill(supervisor)).await;
}

/// How long a supervisor may take to carry out a kill.
pub const PROMPT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
