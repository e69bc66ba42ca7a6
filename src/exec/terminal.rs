//! The master side of a terminal that was opened inside a container.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat, major, minor};
use rustix::io::{Errno, ioctl_fionbio, read, write};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::TerminalSize;

/// The device of every terminal's master side, `/dev/ptmx`.
const MASTER: (u32, u32) = (5, 2);

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
        self.0.async_io(Interest::WRITABLE, write).await
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
