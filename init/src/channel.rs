//! The init's end of the channel to the supervisor (runs in the container). The supervisor's death is no error: the container keeps running.

use std::io;
use std::os::fd::OwnedFd;

use nspawn_init::InitEvent;
use packets::Packet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};

/// One end of a `SOCK_SEQPACKET` socket.
pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends an event. The socket buffer has space for the three that an init sends at most, so this never waits for the supervisor, and
    /// fails only if the supervisor is gone.
    pub(crate) fn send(&self, event: &InitEvent) {
        let _ = packets::send(&self.0, &packets::encode(event), &[]);
    }

    /// Waits for the next packet. `None` once the peer has closed its end.
    pub(crate) fn await_packet(&self) -> Option<Packet> {
        loop {
            match packets::receive(&self.0) {
                Ok(packet) => return Some(packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // An error means that a debugger has interrupted it.
                    let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
                }
                Err(_) => return None,
            }
        }
    }
}

/// Closing a socket with unread data makes the peer's next read fail, and the events still queued there would be lost.
impl Drop for Channel {
    fn drop(&mut self) {
        let _ = shutdown(&self.0, Shutdown::Read);
        while packets::receive(&self.0).is_ok() {}
    }
}
