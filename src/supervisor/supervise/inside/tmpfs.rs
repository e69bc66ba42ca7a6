//! The sizes of the temporary file systems that systemd-nspawn mounts in a container: it gives them a share of the host's memory,
//! whatever the task may use.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};

use super::ContainerRoot;
use crate::container::TmpfsSizes;

/// Sets the sizes. What is mounted there otherwise belongs to the job or the host and is left alone. Returns a note for each size
/// that the kernel refuses: the container can run without it.
pub(super) fn resize(sizes: TmpfsSizes, root: &ContainerRoot) -> Vec<String> {
    let places = [
        ("/tmp", sizes.tmp),
        ("/run", sizes.run),
        ("/dev/shm", sizes.shm),
    ];
    let mut notes = Vec::new();
    for (path, size) in places {
        let Some(size) = size else { continue };
        if let Err(reason) = resize_one(path, size, root) {
            notes.push(format!(
                "{path} of the container keeps the size that systemd-nspawn gave it, because it can't be limited to {size} bytes: \
                 {reason}"
            ));
        }
    }
    notes
}

fn resize_one(path: &str, size: u64, root: &ContainerRoot) -> Result<(), String> {
    let place = match root.directory(path) {
        Ok(place) => place,
        // An image may lack it, and systemd-nspawn may be set up to mount nothing there.
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !root
        .is_own_tmpfs(place.as_fd())
        .map_err(|error| error.to_string())?
    {
        return Ok(());
    }
    let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
    let context = match fspick(&place, "", flags) {
        Ok(context) => context,
        // Not the root of a mount: a directory of another file system of the container.
        Err(Errno::INVAL) => return Ok(()),
        Err(Errno::NOSYS) => return Err("the kernel is older than 5.2".to_owned()),
        Err(error) => return Err(io::Error::from(error).to_string()),
    };
    fsconfig_set_string(&context, "size", size.to_string())
        .and_then(|()| fsconfig_reconfigure(&context))
        .map_err(|error| explained(error, context.as_fd()))
}

fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP];
    absent.contains(&Errno::from_io_error(error).unwrap_or(Errno::IO))
}

/// The error, with the message that the kernel has left in the context if there is one, such as `e tmpfs: Too small a size for
/// current use`.
fn explained(error: Errno, context: BorrowedFd<'_>) -> String {
    let error = io::Error::from(error);
    let mut buffer = [0; 256];
    let length = rustix::io::read(context, &mut buffer).unwrap_or(0);
    let message = String::from_utf8_lossy(&buffer[..length]);
    match message.strip_prefix("e ").map(str::trim) {
        Some(message) if !message.is_empty() => format!("{message} ({error})"),
        _ => error.to_string(),
    }
}
