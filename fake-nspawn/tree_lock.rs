//! The lock of a tree, acquired and released as in the real tool: shared or exclusive, and the last holder removes the file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// One lock that is held.
#[derive(Debug)]
pub(crate) struct TreeLock {
    file: File,
    path: PathBuf,
}

impl TreeLock {
    /// Locks a tree unless another process has it locked. The root directory has no parent for the lock file and is not locked.
    pub(crate) fn take(tree: &Path, shared: bool) -> Result<Option<Self>, Errno> {
        let Some(name) = tree.file_name() else {
            return Ok(None);
        };
        let path = tree.with_file_name(format!(".#{}.lck", name.to_string_lossy()));
        loop {
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(&path);
            let file =
                opened.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
            set(
                &file,
                if shared {
                    nix::libc::F_RDLCK
                } else {
                    nix::libc::F_WRLCK
                },
            )?;
            // The previous holder may have removed the file.
            if file.metadata().is_ok_and(|about| about.nlink() > 0) {
                return Ok(Some(Self { file, path }));
            }
        }
    }
}

impl Drop for TreeLock {
    fn drop(&mut self) {
        if set(&self.file, nix::libc::F_WRLCK).is_ok() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the kinds are below 3")]
fn set(file: &File, kind: i32) -> Result<(), Errno> {
    let whole = nix::libc::flock {
        l_type: kind as i16,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}
