//! The plugin's side of a running session: the command's streams, and the channel to the process that has started it. What arrives comes
//! out of the container and is not trusted: it can falsify the result of this session and nothing else.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

use nspawn_init::StartError;
use nspawn_init::session_spec::SessionEvent;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::terminal::Terminal;

/// How long a session may take to end after it was asked to. What is left then is in a state in which the kernel can't kill it.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A command that was started in a container.
#[derive(Debug)]
pub struct Session {
    /// Its streams.
    pub streams: Streams,
    /// What becomes of it.
    pub control: Control,
}

/// The streams of a command, as the other side has them.
#[derive(Debug)]
pub enum Streams {
    /// Three pipes.
    Pipes {
        /// Dropping it is the end of the command's input.
        stdin: pipe::Sender,
        /// What the command writes to stdout.
        stdout: pipe::Receiver,
        /// What the command writes to stderr.
        stderr: pipe::Receiver,
    },
    /// A terminal. Dropping it hangs up.
    Terminal(Terminal),
}

/// What has become of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It has exited.
    Exited(Ended),
    /// It does not run.
    NotRun(StartError),
    /// It was killed together with the process that watches it: the container has ended, or something in it has killed that process.
    Lost,
}

/// How a command has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit code as a shell reports it: the status, or 128 + signal.
    pub code: i32,
    /// The signal that killed it, or 0.
    pub signal: i32,
}

impl Ended {
    /// From a wait status.
    fn of(status: i32) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = std::process::ExitStatus::from_raw(status);
        let signal = status.signal().unwrap_or_default();
        Self {
            code: status.code().unwrap_or(128 + signal),
            signal,
        }
    }
}

/// The channel of a session. Dropping it ends the session with everything that the command has started, but does not wait for that.
pub struct Control {
    channel: UnixStream,
    state: State,
    /// Completes when the process at the other end has exited, and with it everything of the session is gone.
    gone: Pin<Box<dyn Future<Output = ()> + Send + Sync>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// How far a session has come, according to its events. Each is accepted only once.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Starting,
    Running,
    Ended(End),
}

impl Control {
    /// The channel of a session that is being started. Must be called within a tokio runtime.
    pub fn new(
        channel: OwnedFd,
        gone: impl Future<Output = ()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Ok(Self {
            // tokio has no type for a packet socket, and only waits for this one to become ready.
            channel: UnixStream::from_std(channel.into())?,
            state: State::Starting,
            gone: Box::pin(gone),
        })
    }

    /// Sends the order.
    pub(super) async fn send(
        &self,
        message: &[u8],
        descriptors: &[std::os::fd::BorrowedFd<'_>],
    ) -> io::Result<()> {
        let send = || packets::send(&self.channel, message, descriptors);
        self.channel.async_io(Interest::WRITABLE, send).await
    }

    /// Waits for the terminal, the first event of a session with one.
    pub(super) async fn terminal(&mut self) -> Result<OwnedFd, End> {
        match self.receive().await {
            Some((SessionEvent::Terminal, Some(master))) => Ok(master),
            Some((SessionEvent::Failed(start_error), None)) => Err(End::NotRun(start_error)),
            _ => Err(End::Lost),
        }
    }

    /// Waits until the command runs, or has failed to. Cancel safe.
    pub async fn started(&mut self) {
        while self.state == State::Starting {
            self.advance().await;
        }
    }

    /// Waits until the command has ended. Cancel safe, and can be repeated.
    pub async fn ended(&mut self) -> End {
        loop {
            if let State::Ended(end) = &self.state {
                return end.clone();
            }
            self.advance().await;
        }
    }

    /// Ends the session: kills everything that the command has started and has left, and waits until it is gone.
    pub async fn end(self) {
        drop(self.channel);
        if timeout(END_TIMEOUT, self.gone).await.is_err() {
            tracing::warn!(
                "an exec session did not end within {} s",
                END_TIMEOUT.as_secs()
            );
        }
    }

    async fn advance(&mut self) {
        let received = self.receive().await;
        self.state = match (&self.state, received) {
            (State::Starting, Some((SessionEvent::Running, None))) => State::Running,
            (State::Starting, Some((SessionEvent::Failed(start_error), None))) => {
                State::Ended(End::NotRun(start_error))
            }
            (State::Running, Some((SessionEvent::Ended { status }, None))) => {
                State::Ended(End::Exited(Ended::of(status)))
            }
            _ => State::Ended(End::Lost),
        };
    }

    /// The next event and its descriptor; `None` if the channel is closed or something else has arrived.
    async fn receive(&self) -> Option<(SessionEvent, Option<OwnedFd>)> {
        let receive = || packets::receive(&self.channel);
        let packet = self.channel.async_io(Interest::READABLE, receive).await;
        let packet = packet.ok()?;
        let event = packet.message().ok()?;
        match event {
            SessionEvent::Terminal => {
                let [master] = packet.descriptors.take().ok()?;
                Some((event, Some(master)))
            }
            _ => {
                packet.descriptors.take::<0>().ok()?;
                Some((event, None))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nspawn_init::Step;

    async fn end_of(events: &[SessionEvent]) -> End {
        let (ours, theirs) = packets::pair().unwrap();
        for event in events {
            packets::send(&theirs, &packets::encode(event), &[]).unwrap();
        }
        drop(theirs);
        let mut control = Control::new(ours, std::future::ready(())).unwrap();
        control.started().await;
        control.ended().await
    }

    #[tokio::test]
    async fn what_is_reported_in_another_order_is_no_result() {
        use SessionEvent::{Failed, Running, Terminal};
        let ended = |status| SessionEvent::Ended { status };
        let start_error = StartError {
            step: Step::Execute,
            file: "x".to_owned(),
            errno: 2,
        };
        let exited = |code, signal| End::Exited(Ended { code, signal });
        let failed = Failed(start_error.clone());
        for (events, end) in [
            (vec![Running, ended(7 << 8)], exited(7, 0)),
            (vec![Running, ended(9)], exited(137, 9)),
            (vec![Running, ended(7 << 8), ended(0)], exited(7, 0)),
            (vec![failed.clone()], End::NotRun(start_error)),
            (vec![ended(0)], End::Lost),
            (vec![Running, failed], End::Lost),
            (vec![Running, Running, ended(0)], End::Lost),
            (vec![Terminal], End::Lost),
            (vec![Running], End::Lost),
            (vec![], End::Lost),
        ] {
            assert_eq!(end_of(&events).await, end, "{events:?}");
        }
    }
}
