//! The other side of a session: the command and the process that has started it, played by the test.

use std::os::fd::OwnedFd;
use std::time::Duration;

use nspawn_init::session_spec::SessionEvent;
use nspawn_init::{StartError, Step};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::exec::{Control, Session, Streams};

/// What a session is connected to. A stream is closed by dropping it.
#[derive(Debug)]
pub(crate) struct OtherSide {
    pub(crate) channel: Option<OwnedFd>,
    pub(crate) stdin: Option<pipe::Receiver>,
    pub(crate) stdout: Option<pipe::Sender>,
    pub(crate) stderr: Option<pipe::Sender>,
    /// Dropped when everything of the session is gone.
    pub(crate) rest: Option<oneshot::Sender<()>>,
}

impl OtherSide {
    /// Reports an event.
    pub(crate) fn report(&self, event: &SessionEvent) {
        let channel = self.channel.as_ref().unwrap();
        packets::send(channel, &packets::encode(event), &[]).unwrap();
    }

    /// The end of the command with this exit code, which leaves nothing.
    pub(crate) fn exit(&mut self, code: i32) {
        self.report(&SessionEvent::Ended { status: code << 8 });
        (self.stdin, self.stdout, self.stderr, self.rest) = (None, None, None, None);
    }

    /// Everything of the session has been killed.
    pub(crate) fn kill(&mut self) {
        (self.stdin, self.stdout, self.stderr, self.rest) = (None, None, None, None);
        self.channel = None;
    }

    /// Whether the plugin has ended the session.
    pub(crate) fn is_ended(&self) -> bool {
        let received = packets::receive(self.channel.as_ref().unwrap());
        received.is_err_and(|error| error.kind() == std::io::ErrorKind::UnexpectedEof)
    }

    /// Waits until the plugin has ended the session.
    pub(crate) async fn ended(&self) {
        while !self.is_ended() {
            // Also lets a paused clock advance.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A session with three pipes whose command runs.
pub(crate) fn piped() -> (Session, OtherSide) {
    let (session, other) = starting();
    other.report(&SessionEvent::Running);
    (session, other)
}

/// A session with three pipes whose command does not run yet.
pub(crate) fn starting() -> (Session, OtherSide) {
    let (stdin, command_stdin) = pipe::pipe().unwrap();
    let (command_stdout, stdout) = pipe::pipe().unwrap();
    let (command_stderr, stderr) = pipe::pipe().unwrap();
    let streams = Streams::Pipes {
        stdin,
        stdout,
        stderr,
    };
    let (session, mut other) = session(streams);
    other.stdin = Some(command_stdin);
    other.stdout = Some(command_stdout);
    other.stderr = Some(command_stderr);
    (session, other)
}

/// A session with these streams.
pub(crate) fn session(streams: Streams) -> (Session, OtherSide) {
    let (ours, theirs) = packets::pair().unwrap();
    let (rest, gone) = oneshot::channel();
    let control = Control::new(ours, async { drop(gone.await) }).unwrap();
    let other = OtherSide {
        channel: Some(theirs),
        stdin: None,
        stdout: None,
        stderr: None,
        rest: Some(rest),
    };
    (Session { streams, control }, other)
}

/// The command was not found.
pub(crate) fn not_found() -> StartError {
    StartError {
        step: Step::Execute,
        file: "nope".to_owned(),
        errno: 2,
    }
}
