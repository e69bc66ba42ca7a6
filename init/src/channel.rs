//! The init's end of the channel to the supervisor (runs in the container). Never blocks on a supervisor that does not read, and does not
//! treat the supervisor's death as an error: the container keeps running.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nspawn_init::InitEvent;
use packets::Packet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

/// How long, in seconds, the last events may wait for space in the socket buffer. They wait only if the supervisor has stopped reading.
const FLUSH_TIMEOUT_SECS: i64 = 5;

/// One end of a `SOCK_SEQPACKET` socket.
pub(crate) struct Channel {
    /// None once the peer has closed its end.
    socket: Option<OwnedFd>,
    /// Encoded events that did not fit into the socket buffer.
    unsent: VecDeque<Vec<u8>>,
}

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            unsent: VecDeque::new(),
        }
    }

    /// Sends an event, or queues it until the socket buffer has space.
    pub(crate) fn send(&mut self, event: &InitEvent) {
        self.unsent.push_back(packets::encode(event));
        self.flush();
    }

    /// Sends queued events until the socket buffer is full.
    pub(crate) fn flush(&mut self) {
        while let (Some(socket), Some(packet)) = (&self.socket, self.unsent.front()) {
            match packets::send(socket, packet, &[]) {
                Ok(()) => {
                    self.unsent.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.close(),
            }
        }
    }

    /// Sends everything that is queued. Gives up only if the supervisor does not read for [`FLUSH_TIMEOUT_SECS`]. Later requests are not
    /// read.
    pub(crate) fn finish(&mut self) {
        self.shutdown_read();
        loop {
            self.flush();
            let Some(socket) = self.socket.as_ref().filter(|_| !self.unsent.is_empty()) else {
                return;
            };
            let mut descriptors = [PollFd::new(socket, PollFlags::OUT)];
            let timeout = Timespec {
                tv_sec: FLUSH_TIMEOUT_SECS,
                tv_nsec: 0,
            };
            match poll(&mut descriptors, Some(&timeout)) {
                Ok(0) => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Closing a socket with unread data makes the peer's next read fail, and the events still queued there would be lost.
    fn shutdown_read(&self) {
        if let Some(socket) = &self.socket {
            let _ = shutdown(socket, Shutdown::Read);
            while packets::receive(socket).is_ok() {}
        }
    }

    /// Waits for the next packet. `None` once the peer has closed its end.
    pub(crate) fn await_packet(&mut self) -> Option<Packet> {
        loop {
            let (socket, flags) = self.interest()?;
            let mut descriptors = [PollFd::from_borrowed_fd(socket, flags)];
            let seen = match poll(&mut descriptors, None) {
                Ok(_) => descriptors[0].revents(),
                Err(_) => PollFlags::empty(),
            };
            if seen.contains(PollFlags::OUT) {
                self.flush();
            } else if !seen.is_empty()
                && let Some(packet) = self.next()
            {
                return Some(packet);
            }
        }
    }

    /// What to poll for: requests, or space for queued events. No requests are read from a peer that does not read the answers.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flags = if self.unsent.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        };
        Some((self.socket.as_ref()?.as_fd(), flags))
    }

    /// The next packet, if there is one.
    pub(crate) fn next(&mut self) -> Option<Packet> {
        match packets::receive(self.socket.as_ref()?) {
            Ok(packet) => Some(packet),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => {
                self.close();
                None
            }
        }
    }

    fn close(&mut self) {
        self.socket = None;
        self.unsent.clear();
    }
}
