//! Output of a container: Nomad's FIFOs, opened once and passed to systemd-nspawn as they are. Copies no data, follows no symlink,
//! and waits for a reader no longer than necessary.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fchmod};

const NULL: &str = "/dev/null";

/// How long a start waits for Nomad's log collector to open its end. It does so within milliseconds.
const READER_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens the file for stdout or stderr. Rejects anything but a FIFO or a regular file: tasks can write to the directory, and one of
/// them may have put a device there. With no path, the null device or a path that does not exist, the output is discarded.
pub fn open(path: Option<&Path>) -> io::Result<File> {
    let Some(path) = path else {
        return open_null();
    };
    let file = match open_now(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return open_null(),
        // A FIFO that no process has open for reading yet.
        Err(error) if error.raw_os_error() == Some(nix::Error::ENXIO as i32) => {
            open_with_reader(path)?
        }
        other => other?,
    };
    let about = file.metadata()?;
    let null = about.file_type().is_char_device() && about.rdev() == fs::metadata(NULL)?.rdev();
    if !about.is_file() && !about.file_type().is_fifo() && !null {
        let text = format!("it is neither a FIFO nor a regular file nor {NULL}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if about.file_type().is_fifo() {
        // Programs reopen /dev/stdout, as any user of the container and in a user namespace to which root is not mapped. The
        // directory above stays closed to the rest of the host.
        fchmod(&file, Mode::from_bits_truncate(0o622))?;
        blocking(&file)?;
    }
    Ok(file)
}

fn open_null() -> io::Result<File> {
    OpenOptions::new().write(true).open(NULL)
}

/// Opens a log for writing. Fails if it is a FIFO that no process has open for reading.
pub fn open_now(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_APPEND | OFlag::O_NOCTTY;
    OpenOptions::new()
        .write(true)
        .custom_flags(flags.bits())
        .open(path)
}

/// Waits for the reader in a blocking open(2). If no reader comes, the waiting thread ends with this process, which then has
/// nothing to do.
fn open_with_reader(path: &Path) -> io::Result<File> {
    let (sender, receiver) = mpsc::channel();
    let owned = path.to_owned();
    std::thread::Builder::new()
        .stack_size(64 * 1024)
        .spawn(move || {
            let flags = OFlag::O_NOFOLLOW | OFlag::O_APPEND | OFlag::O_NOCTTY;
            let _ = sender.send(
                OpenOptions::new()
                    .write(true)
                    .custom_flags(flags.bits())
                    .open(owned),
            );
        })?;
    receiver.recv_timeout(READER_TIMEOUT).unwrap_or_else(|_| {
        let text = format!(
            "no process has opened it for reading within {} s: Nomad's log collector does not run",
            READER_TIMEOUT.as_secs()
        );
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

/// The same log for a writer that must not wait. A FIFO is opened for reading too, so that it keeps what is written while Nomad starts
/// its log collector anew.
pub fn reopen(log: &File) -> io::Result<File> {
    let is_fifo = log.metadata()?.file_type().is_fifo();
    let flags = OFlag::O_NONBLOCK | OFlag::O_APPEND | OFlag::O_NOCTTY;
    OpenOptions::new()
        .read(is_fifo)
        .write(true)
        .custom_flags(flags.bits())
        .open(format!("/proc/self/fd/{}", log.as_raw_fd()))
}

/// A payload expects writes to block when the pipe is full.
fn blocking(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_takes_a_stream_and_a_device_does_not() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [
            None,
            Some(Path::new(NULL)),
            Some(&file),
            Some(&temp.path().join("none")),
        ] {
            open(path).unwrap();
        }
        let error = open(Some(Path::new("/dev/zero"))).unwrap_err().to_string();
        assert_eq!(
            error,
            "it is neither a FIFO nor a regular file nor /dev/null"
        );
    }
}
