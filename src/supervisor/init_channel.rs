//! The driver's init in the container: its binary, which the plugin opens, and the supervisor's end of the channel to it. Whatever
//! arrives on the channel comes out of the container and is treated as hostile: it can falsify the reported exit of this container
//! and nothing else.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, RecvMsg, SockFlag, SockType, UnixCredentials,
    recvmsg, send, setsockopt, socketpair, sockopt,
};
use nspawn_init::{InitEvent, MAX_PACKET_BYTES, Request, message, packet};

/// The init binary, as built by the build script: static, for the architecture of the host.
const INIT_BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nspawn-init"));

/// The kernel's flag for an executable memfd. Kernels before 6.3 neither need nor know it.
const MFD_EXEC: MFdFlags = MFdFlags::from_bits_retain(0x10);

/// The init binary as a descriptor that can be executed and that no process can write. It has no name in any file system: the state
/// directory may be mounted `noexec`, as `/run` is on many hosts. If the kernel refuses an executable memfd (`vm.memfd_noexec`), it
/// is an unnamed file in `directory`.
pub fn init_binary(directory: &Path) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = memfd_create(c"nspawn-init", flags | MFD_EXEC).or_else(|error| match error {
        nix::Error::EINVAL => memfd_create(c"nspawn-init", flags),
        other => Err(other),
    });
    let writable = match memory {
        Ok(memory) => {
            let mut file = File::from(memory);
            file.write_all(INIT_BINARY)?;
            let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals | SealFlag::F_SEAL_SEAL))?;
            file
        }
        Err(nix::Error::EACCES) => {
            let mut file = tempfile(directory)?;
            file.write_all(INIT_BINARY)?;
            file
        }
        Err(error) => return Err(error.into()),
    };
    // A file that is open for writing can't be executed.
    Ok(File::open(format!("/proc/self/fd/{}", writable.as_raw_fd()))?.into())
}

fn tempfile(directory: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
        .mode(0o555)
        .open(directory)
}

/// The channel to the init.
#[derive(Debug)]
pub(super) struct InitChannel {
    /// `None` once the peer has closed the channel or has sent an invalid message.
    socket: Option<OwnedFd>,
    /// The pid of the init on the host, once it has sent a message.
    peer_pid: Option<i32>,
    state: ProtocolState,
    /// Holds one packet. It has the maximum length; the kernel allocates only the pages that are written.
    buffer: Vec<u8>,
}

/// How far the init has come, according to its messages. Each one is accepted only once, which limits their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProtocolState {
    Initial,
    Ready,
    Running,
    Done,
}

impl ProtocolState {
    /// The state after this event, if the event is valid now. Events of exec sessions are never valid: none is requested.
    fn then(self, event: &InitEvent) -> Option<Self> {
        match (self, event) {
            (Self::Initial, InitEvent::Ready) => Some(Self::Ready),
            (Self::Ready, InitEvent::Running { .. }) => Some(Self::Running),
            (Self::Initial | Self::Ready, InitEvent::Failed(_))
            | (Self::Running, InitEvent::Ended { .. }) => Some(Self::Done),
            _ => None,
        }
    }
}

impl InitChannel {
    /// A channel, and its other end.
    pub(super) fn open() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        setsockopt(&ours, sockopt::PassCred, &true)?;
        let channel = Self {
            socket: Some(ours),
            peer_pid: None,
            state: ProtocolState::Initial,
            buffer: vec![0; MAX_PACKET_BYTES],
        };
        Ok((channel, theirs))
    }

    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// The pid of the init on the host, as reported by the kernel.
    pub(super) fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// The next event, if one has arrived and is valid now; at most three in all. Anything else closes the channel.
    pub(super) fn recv(&mut self) -> Option<InitEvent> {
        let socket = self.socket.as_ref()?;
        let buffer = &mut self.buffer;
        let mut credentials = nix::cmsg_space!(UnixCredentials);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut receive = || {
            let mut slices = [IoSliceMut::new(buffer)];
            recvmsg::<()>(
                socket.as_raw_fd(),
                &mut slices,
                Some(&mut credentials),
                flags,
            )
            .map(|received| (received.bytes, peer_pid_of(&received)))
        };
        let received = match receive() {
            // The init exited without reading everything that was sent to it. Its earlier messages are still queued: the kernel
            // reports the reset once and delivers them afterwards.
            Err(nix::Error::ECONNRESET) => receive(),
            other => other,
        };
        let (length, peer_pid) = match received {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return None,
            Ok((length, peer_pid)) if length > 0 => (length, peer_pid),
            _ => {
                self.close();
                return None;
            }
        };
        let event: Option<InitEvent> = message(&self.buffer[..length]).ok();
        let Some(state) = event.as_ref().and_then(|event| self.state.then(event)) else {
            self.close();
            return None;
        };
        self.state = state;
        self.peer_pid = self.peer_pid.or_else(|| peer_pid.filter(|pid| *pid > 0));
        event
    }

    fn close(&mut self) {
        self.socket = None;
        self.buffer = Vec::new();
    }

    /// Lets the command run.
    pub(super) fn send_go(&self) {
        if let Some(socket) = &self.socket {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            // If the init is gone, the supervisor sees its exit anyway.
            let _ = send(socket.as_raw_fd(), &packet(&Request::Go), flags);
        }
    }
}

/// The pid of the sender, as reported by the kernel.
fn peer_pid_of(received: &RecvMsg<'_, '_, ()>) -> Option<i32> {
    let mut messages = received.cmsgs().into_iter().flatten();
    messages.find_map(|message| match message {
        ControlMessageOwned::ScmCredentials(who) => Some(who.pid()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: InitEvent = InitEvent::Running { pid: 2 };
    const ALL_EVENTS: [InitEvent; 3] = [InitEvent::Ready, RUNNING, InitEvent::Ended { status: 0 }];

    /// What is received when these events are sent, and whether the channel is open afterwards.
    fn received(state: &[InitEvent]) -> (Vec<InitEvent>, bool) {
        let (mut channel, theirs) = InitChannel::open().unwrap();
        for event in state {
            let flags = MsgFlags::MSG_DONTWAIT;
            // The socket buffer may be full.
            let _ = send(theirs.as_raw_fd(), &packet(event), flags);
        }
        let events = std::iter::from_fn(|| channel.recv()).collect();
        (events, channel.descriptor().is_some())
    }

    #[test]
    fn a_whole_life_is_received() {
        assert_eq!(received(&ALL_EVENTS), (ALL_EVENTS.to_vec(), true));
    }

    #[test]
    fn of_a_flood_nothing_is_received_but_what_can_be_true() {
        for flood in ALL_EVENTS {
            let mut state = ALL_EVENTS.to_vec();
            state.truncate(1 + ALL_EVENTS.iter().position(|event| *event == flood).unwrap());
            let expected = state.clone();
            state.resize(1000, flood);
            assert_eq!(received(&state), (expected, false));
        }
    }

    #[test]
    fn what_can_not_be_said_yet_ends_it() {
        let failed = InitEvent::Failed(nspawn_init::StartError {
            step: nspawn_init::Step::Execute,
            file: "/bin/none".into(),
            errno: 2,
        });
        for (state, events) in [
            (vec![RUNNING], 0),
            (vec![InitEvent::Ended { status: 0 }], 0),
            (vec![InitEvent::Ready, InitEvent::Ended { status: 0 }], 1),
            (vec![InitEvent::Ready, RUNNING, failed.clone()], 2),
            (vec![failed.clone(), InitEvent::Ready], 1),
            (
                vec![InitEvent::Ready, InitEvent::ExecEnded { id: 1, status: 0 }],
                1,
            ),
        ] {
            assert_eq!(
                received(&state),
                (state[..events].to_vec(), false),
                "{state:?}"
            );
        }
    }
}
