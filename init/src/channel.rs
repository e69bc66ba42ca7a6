//! The channel to the supervisor: one JSON value a packet, descriptors beside it. Never waits for a supervisor that does not
//! read, and never takes its death for an error: the container lives on.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nspawn_init::{InitEvent, MAX_PACKET_BYTES, packet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, recv, recvmsg, send,
    shutdown,
};

/// How long the last words wait for room, in seconds. Only a supervisor that stands still lets them wait at all.
const FLUSH_TIMEOUT_SECS: i64 = 5;

/// One end of a socket of the `SOCK_SEQPACKET` kind.
pub(crate) struct Channel {
    /// None once there is nobody at the other end.
    socket: Option<OwnedFd>,
    /// Words for which there was no room.
    unsent: VecDeque<Vec<u8>>,
}

/// One packet as it came.
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    /// At most four: one more than any request has, so that too many are seen as such.
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            unsent: VecDeque::new(),
        }
    }

    /// Sends a word, or keeps it until there is room for it.
    pub(crate) fn send(&mut self, event: &InitEvent) {
        self.unsent.push_back(packet(event));
        self.flush();
    }

    /// Sends what was kept, as far as there is room.
    pub(crate) fn flush(&mut self) {
        while let (Some(socket), Some(packet)) = (&self.socket, self.unsent.front()) {
            // A SIGPIPE would be taken for one that somebody sent to the command.
            match send(socket, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => {
                    self.unsent.pop_front();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.close(),
            }
        }
    }

    /// Sends everything, and gives up only on a supervisor that does not read for [`FLUSH_TIMEOUT_SECS`]. Nothing is heard after it.
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

    /// A socket that is closed with something unread is an error at the other end, in place of the words that are still there.
    fn shutdown_read(&self) {
        if let Some(socket) = &self.socket {
            let _ = shutdown(socket, Shutdown::Read);
            let mut nothing = [0; 0];
            let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
            while recv(socket, &mut nothing[..], flags).is_ok_and(|(_, length)| length > 0) {}
        }
    }

    /// Waits for the next packet. `None` once there is nobody at the other end.
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
                && let Some(packet) = self.next(seen.contains(PollFlags::HUP))
            {
                return Some(packet);
            }
        }
    }

    /// What to wait for: requests, or room for what was kept. Whoever does not read the answers is not asked for more.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flags = if self.unsent.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        };
        Some((self.socket.as_ref()?.as_fd(), flags))
    }

    /// The next packet, if one is there. `ended` says that the other end was seen to be closed.
    pub(crate) fn next(&mut self, ended: bool) -> Option<Packet> {
        let socket = self.socket.as_ref()?;
        match receive(socket.as_fd()) {
            // No packet of ours is empty: it is the end, or somebody's nonsense.
            Ok(packet) if packet.bytes.is_empty() && ended => {
                self.close();
                None
            }
            Ok(packet) => Some(packet),
            Err(Errno::AGAIN | Errno::INTR) => None,
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

/// Takes one packet off the socket, in a buffer of its size: an idle program holds none.
fn receive(socket: BorrowedFd<'_>) -> rustix::io::Result<Packet> {
    let mut nothing = [0; 0];
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let (_, length) = recv(socket, &mut nothing[..], flags)?;
    // A longer one is cut there, and refused for its length.
    let mut bytes = vec![0; length.min(MAX_PACKET_BYTES + 1)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    bytes.truncate(received.bytes);
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    Ok(Packet { bytes, descriptors })
}
