//! The plugin's end of a control connection, on tokio.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::net::UnixStream;

use super::framing::{Framing, Received};
use super::protocol::{IncomingEvent, ProtocolError, Request};
use crate::state::TaskDir;

/// The plugin's end of a control connection.
#[derive(Debug)]
pub(super) struct ControlConnection {
    /// A packet socket too: tokio has no type for it, and only waits for this one to become ready.
    socket: UnixStream,
    framing: Framing,
}

impl ControlConnection {
    /// A connection, and the supervisor's end of it. Must be called within a tokio runtime.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = packets::pair()?;
        Ok((Self::packets(ours)?, theirs))
    }

    /// Connects to the supervisor of this task directory: at its packet socket, or at its stream socket if it is of a driver that
    /// had no other.
    pub(super) async fn open(task_dir: &TaskDir) -> io::Result<Self> {
        match packets::connect(&task_dir.control_socket()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self {
                socket: UnixStream::connect(task_dir.control_stream()).await?,
                framing: Framing::Lines(Vec::new()),
            }),
            socket => Self::packets(socket?),
        }
    }

    fn packets(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            socket: UnixStream::from_std(socket.into())?,
            framing: Framing::Packets,
        })
    }

    /// Sends a request.
    pub(super) async fn send(&self, request: &Request) -> io::Result<()> {
        let send = || self.framing.send(&self.socket, request);
        self.socket.async_io(Interest::WRITABLE, send).await
    }

    /// The next event. Fails with [`io::ErrorKind::InvalidData`] if something else was received. Cancel safe.
    pub(super) async fn receive(&mut self) -> io::Result<IncomingEvent> {
        let receive = || self.framing.receive(&self.socket);
        let received = self.socket.async_io(Interest::READABLE, receive).await?;
        let Received {
            message,
            descriptors,
        } = received;
        // What an unknown event carries is closed.
        if descriptors.take::<0>().is_err() && matches!(message, IncomingEvent::Known(_)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, ProtocolError));
        }
        Ok(message)
    }
}
