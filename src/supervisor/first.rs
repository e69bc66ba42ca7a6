//! The container's first program, where it is ours: the file that is executed, and the supervisor's end of the channel to it.
//! What comes from there comes out of the container and is read as hostile: it can make this container's end be told wrongly
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
use nspawn_init::{LONGEST, Request, Word, message, packet};

/// The program, as the build has made it: static, for the machine's architecture.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nspawn-init"));

/// The kernel's name for "may be executed", which older ones have no need of and no word for (6.3).
const MFD_EXEC: MFdFlags = MFdFlags::from_bits_retain(0x10);

/// The program as a descriptor that can be executed and not be written, by anybody. It has no name in any file system: a state
/// directory may lie on one that executes nothing, as `/run` does on many hosts. Where the kernel gives no memory for that
/// (`vm.memfd_noexec`), it is a file without a name in `directory`.
pub fn program(directory: &Path) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = memfd_create(c"nspawn-init", flags | MFD_EXEC).or_else(|error| match error {
        nix::Error::EINVAL => memfd_create(c"nspawn-init", flags),
        other => Err(other),
    });
    let writable = match memory {
        Ok(memory) => {
            let mut file = File::from(memory);
            file.write_all(PROGRAM)?;
            let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals | SealFlag::F_SEAL_SEAL))?;
            file
        }
        Err(nix::Error::EACCES) => {
            let mut file = tempfile(directory)?;
            file.write_all(PROGRAM)?;
            file
        }
        Err(error) => return Err(error.into()),
    };
    // What is open for writing can't be executed.
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

/// The channel to the program.
#[derive(Debug)]
pub(super) struct Channel {
    /// `None` once the other end is closed, or has said what it can't have to say.
    socket: Option<OwnedFd>,
    /// The program's process id on the host, once it has said anything.
    speaker: Option<i32>,
    said: Said,
    /// Takes one word. As long as the longest, of which the kernel gives what is written.
    buffer: Vec<u8>,
}

/// How far the program has come, by its words. Each is said once, so that few words can ever come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    Ready,
    Running,
    Over,
}

impl Said {
    /// Where this word leads, if it may come now. Of further commands there is nothing to tell: none is asked for.
    fn then(self, word: &Word) -> Option<Self> {
        match (self, word) {
            (Self::Nothing, Word::Ready) => Some(Self::Ready),
            (Self::Ready, Word::Running { .. }) => Some(Self::Running),
            (Self::Nothing | Self::Ready, Word::Failed(_))
            | (Self::Running, Word::Ended { .. }) => Some(Self::Over),
            _ => None,
        }
    }
}

impl Channel {
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
            speaker: None,
            said: Said::Nothing,
            buffer: vec![0; LONGEST],
        };
        Ok((channel, theirs))
    }

    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// The program's process id on the host, as the kernel tells it.
    pub(super) fn speaker(&self) -> Option<i32> {
        self.speaker
    }

    /// The next word, if one is there and may come now; four in all at the most. Whoever says anything else is heard no more.
    pub(super) fn hear(&mut self) -> Option<Word> {
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
            .map(|received| (received.bytes, speaker_of(&received)))
        };
        let received = match receive() {
            // The program ended without having read all that it was asked. What it had said before is still there: the kernel
            // tells the reset once and hands the words out afterwards.
            Err(nix::Error::ECONNRESET) => receive(),
            other => other,
        };
        let (length, speaker) = match received {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return None,
            Ok((length, speaker)) if length > 0 => (length, speaker),
            _ => {
                self.close();
                return None;
            }
        };
        let word: Option<Word> = message(&self.buffer[..length]).ok();
        let Some(said) = word.as_ref().and_then(|word| self.said.then(word)) else {
            self.close();
            return None;
        };
        self.said = said;
        self.speaker = self.speaker.or_else(|| speaker.filter(|pid| *pid > 0));
        word
    }

    fn close(&mut self) {
        self.socket = None;
        self.buffer = Vec::new();
    }

    /// Lets the command run.
    pub(super) fn go(&self) {
        if let Some(socket) = &self.socket {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            // A program that is gone has an end that will be seen.
            let _ = send(socket.as_raw_fd(), &packet(&Request::Go), flags);
        }
    }
}

/// Who said it, as the kernel tells it.
fn speaker_of(received: &RecvMsg<'_, '_, ()>) -> Option<i32> {
    let mut told = received.cmsgs().into_iter().flatten();
    told.find_map(|message| match message {
        ControlMessageOwned::ScmCredentials(who) => Some(who.pid()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: Word = Word::Running { pid: 2 };
    const LIFE: [Word; 3] = [Word::Ready, RUNNING, Word::Ended { status: 0 }];

    /// What is heard when this is said, and whether the channel is open after it.
    fn heard(said: &[Word]) -> (Vec<Word>, bool) {
        let (mut channel, theirs) = Channel::open().unwrap();
        for word in said {
            let flags = MsgFlags::MSG_DONTWAIT;
            // There is an end to what fits.
            let _ = send(theirs.as_raw_fd(), &packet(word), flags);
        }
        let words = std::iter::from_fn(|| channel.hear()).collect();
        (words, channel.descriptor().is_some())
    }

    #[test]
    fn a_whole_life_is_heard() {
        assert_eq!(heard(&LIFE), (LIFE.to_vec(), true));
    }

    #[test]
    fn of_a_flood_nothing_is_heard_but_what_can_be_true() {
        for flood in LIFE {
            let mut said = LIFE.to_vec();
            said.truncate(1 + LIFE.iter().position(|word| *word == flood).unwrap());
            let life = said.clone();
            said.resize(1000, flood);
            assert_eq!(heard(&said), (life, false));
        }
    }

    #[test]
    fn what_can_not_be_said_yet_ends_it() {
        let failed = Word::Failed(nspawn_init::Trouble {
            step: nspawn_init::Step::Execute,
            file: "/bin/none".into(),
            errno: 2,
        });
        for (said, words) in [
            (vec![RUNNING], 0),
            (vec![Word::Ended { status: 0 }], 0),
            (vec![Word::Ready, Word::Ended { status: 0 }], 1),
            (vec![Word::Ready, RUNNING, failed.clone()], 2),
            (vec![failed.clone(), Word::Ready], 1),
            (vec![Word::Ready, Word::ExecEnded { id: 1, status: 0 }], 1),
        ] {
            assert_eq!(heard(&said), (said[..words].to_vec(), false), "{said:?}");
        }
    }
}
