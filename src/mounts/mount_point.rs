//! Makes the mount point of one mount in another one. systemd-nspawn would make it with the id of the host's root, which a mapped mount stores as one
//! that nobody has.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

/// Makes a directory, or an empty file, and its missing parents at this path below a directory, for this user and group. Does nothing where
/// something exists, and leaves a path that leads through a link to systemd-nspawn, which follows it within the container.
pub(super) fn make(
    top: &OwnedFd,
    below: &Path,
    is_directory: bool,
    owner: (u32, u32),
) -> io::Result<()> {
    let mut names = below.components().peekable();
    let mut at = top.try_clone()?;
    while let Some(part) = names.next() {
        let Component::Normal(name) = part else {
            return Ok(());
        };
        let is_last = names.peek().is_none();
        let made = match is_last && !is_directory {
            true => file(at.as_fd(), name),
            false => mkdirat(&at, name, Mode::from_bits_truncate(0o755)),
        };
        match made {
            Ok(()) => fchownat(
                &at,
                name,
                Some(Uid::from_raw(owner.0)),
                Some(Gid::from_raw(owner.1)),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )?,
            Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        if is_last {
            return Ok(());
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        at = match openat(&at, name, flags, Mode::empty()) {
            Ok(next) => next,
            Err(nix::Error::ELOOP | nix::Error::ENOTDIR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
    }
    Ok(())
}

fn file(at: impl AsFd, name: &OsStr) -> nix::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    openat(at, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mount_tree::place;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn missing_parts_are_made_and_links_are_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap();
        let me = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        let top = place(&path).unwrap();
        fs::create_dir(path.join("there")).unwrap();
        symlink("there", path.join("link")).unwrap();
        let make = |below: &str, is_directory| {
            make(&top, Path::new(below), is_directory, me).unwrap();
            path.join(below)
        };
        assert!(make("a/b", true).is_dir());
        assert!(make("a/file", false).is_file());
        assert!(make("a/b", true).is_dir());
        assert!(!make("link/new", true).exists());
        make("a/file/below", true);
        assert!(path.join("a/file").is_file());
        assert_eq!(fs::read_dir(path.join("there")).unwrap().count(), 0);
    }
}
