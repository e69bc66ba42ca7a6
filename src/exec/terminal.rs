//! The master side of a terminal that was opened inside a container.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::{FileType, fstat, major, minor};
use rustix::io::{Errno, ioctl_fionbio, read, write};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::TerminalSize;

/// The device of every terminal's master side, `/dev/ptmx`.
const MASTER: (u32, u32) = (5, 2);

/// How often to look for space in a terminal that was hung up once.
const REOPENED_INTERVAL: Duration = Duration::from_millis(10);

/// The master side of a terminal. Dropping it hangs up. tokio has no type for terminals, and only waits for this one to become ready.
#[derive(Debug)]
pub struct Terminal(UnixStream);

impl Terminal {
    /// Checks that this is a terminal: the descriptor comes out of the container, and reading from something else might block. Must be
    /// called within a tokio runtime.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        let status = fstat(&master)?;
        let device = (major(status.st_rdev), minor(status.st_rdev));
        let is_character_device =
            FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
        if !is_character_device || device != MASTER {
            return Err(io::Error::other(
                "/dev/ptmx of the container is no terminal",
            ));
        }
        ioctl_fionbio(&master, true)?;
        Ok(Self(UnixStream::from_std(master.into())?))
    }

    /// Reads what has been written to the terminal; 0 bytes when no process has it open any more. Cancel safe.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let read = || closed(read(&self.0, &mut *into));
        self.0.async_io(Interest::READABLE, read).await
    }

    /// The same without waiting: `WouldBlock` if everything has been read. Everything that a process has written before it exited is
    /// seen by a call after that.
    pub fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        closed(read(&self.0, into))
    }

    /// Writes what was typed. Cancel safe: nothing has been written if it is cancelled.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = || Ok(write(&self.0, bytes)?);
        loop {
            let ready = self.0.ready(Interest::WRITABLE).await?;
            match self.0.try_io(Interest::WRITABLE, write) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
            // tokio takes a terminal that was hung up once for ready ever after, although a process may have opened it again.
            if ready.is_write_closed() {
                tokio::time::sleep(REOPENED_INTERVAL).await;
            }
        }
    }

    /// Changes its size.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(&self.0, size)?)
    }
}

/// The kernel reports EIO when no process has the terminal open.
fn closed(read: rustix::io::Result<usize>) -> io::Result<usize> {
    match read {
        Err(Errno::IO) => Ok(0),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::future::{Future as _, poll_fn};
    use std::io::Read;
    use std::os::unix::ffi::OsStrExt;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

    use super::*;

    /// A terminal whose other side can be opened under this name, and the other side.
    fn terminal() -> (Terminal, std::path::PathBuf, File) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let path = std::path::PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let other = open(&path);
        let mut mode = tcgetattr(&other).unwrap();
        mode.make_raw();
        tcsetattr(&other, OptionalActions::Now, &mode).unwrap();
        (Terminal::new(master).unwrap(), path, other)
    }

    fn open(path: &std::path::Path) -> File {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        let options = options.read(true).write(true);
        options
            .custom_flags(nix::libc::O_NOCTTY)
            .open(path)
            .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_terminal_that_was_opened_again_is_waited_for() {
        let (terminal, path, other) = terminal();
        drop(other);
        assert_eq!(terminal.read(&mut [0; 8]).await.unwrap(), 0);
        let mut other = open(&path);
        let text = vec![b'x'; 64 * 1024];
        let written = async {
            let mut written = 0;
            while written < text.len() {
                written += terminal.write(&text[written..]).await.unwrap();
            }
        };
        tokio::pin!(written);
        let mut polls = 0;
        let counted = poll_fn(|context| {
            polls += 1;
            assert!(polls < 1000, "it does not wait");
            written.as_mut().poll(context)
        });
        // Time passes only while nothing can be done.
        let limit = tokio::time::timeout(Duration::from_secs(1), counted);
        limit.await.unwrap_err();
        tokio::time::resume();
        let reader = std::thread::spawn(move || {
            let mut read = vec![0; 64 * 1024];
            other.read_exact(&mut read).unwrap();
            read
        });
        written.await;
        assert_eq!(reader.join().unwrap(), text);
    }
}
