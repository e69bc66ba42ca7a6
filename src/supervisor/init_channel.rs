//! The driver's init in the container: its binary, which the plugin opens, and the supervisor's end of the channel to it. Whatever
//! arrives on the channel comes out of the container and is treated as hostile: it can falsify the reported exit of this container
//! and nothing else.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nspawn_init::{InitEvent, Request};
use packets::Packet;

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
    /// The state after this event, if the event is valid now.
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
        let (ours, theirs) = packets::pair()?;
        packets::report_senders(&ours)?;
        let channel = Self {
            socket: Some(ours),
            peer_pid: None,
            state: ProtocolState::Initial,
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
        let packet = match packets::receive(self.socket.as_ref()?) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            received => received.ok(),
        };
        let event = packet.and_then(|packet| self.accept(packet));
        if event.is_none() {
            self.socket = None;
        }
        event
    }

    /// The event in this packet, if it is valid now. No event takes descriptors.
    fn accept(&mut self, packet: Packet) -> Option<InitEvent> {
        let event = packet.message().ok()?;
        let state = self.state.then(&event)?;
        packet.descriptors.take::<0>().ok()?;
        self.state = state;
        self.peer_pid = self.peer_pid.or(packet.sender);
        Some(event)
    }

    /// Lets the command run.
    pub(super) fn send_go(&self) {
        if let Some(socket) = &self.socket {
            // If the init is gone, the supervisor sees its exit anyway.
            let _ = packets::send(socket, &packets::encode(&Request::Go), &[]);
        }
    }
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
            // The socket buffer may be full.
            let _ = packets::send(&theirs, &packets::encode(event), &[]);
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
    fn events_of_an_init_that_is_gone_are_received() {
        let (mut channel, theirs) = InitChannel::open().unwrap();
        // It does not read this.
        channel.send_go();
        for event in &ALL_EVENTS {
            packets::send(&theirs, &packets::encode(event), &[]).unwrap();
        }
        drop(theirs);
        assert!(std::iter::from_fn(|| channel.recv()).eq(ALL_EVENTS));
        assert!(channel.descriptor().is_none());
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(channel.peer_pid(), Some(own));
    }

    #[test]
    fn descriptors_and_what_is_too_long_close_the_channel() {
        let null = File::open("/dev/null").unwrap();
        let ready = packets::encode(&InitEvent::Ready);
        let mut too_long = ready.clone();
        too_long.resize(packets::MAX_PACKET_BYTES + 1, b' ');
        for (bytes, descriptors) in [(&ready, vec![null.as_fd()]), (&too_long, Vec::new())] {
            let (mut channel, theirs) = InitChannel::open().unwrap();
            send_raw(&theirs, bytes, &descriptors);
            assert_eq!(channel.recv(), None);
            assert!(channel.descriptor().is_none());
            assert_eq!(channel.peer_pid(), None);
        }
    }

    /// Sends without the limits of the driver.
    fn send_raw(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&numbers)];
        let rights = &rights[..usize::from(!numbers.is_empty())];
        let bytes = [io::IoSlice::new(bytes)];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(socket.as_raw_fd(), &bytes, rights, flags, None).unwrap();
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
            (vec![InitEvent::Ready, InitEvent::Ready], 1),
        ] {
            assert_eq!(
                received(&state),
                (state[..events].to_vec(), false),
                "{state:?}"
            );
        }
    }
}
