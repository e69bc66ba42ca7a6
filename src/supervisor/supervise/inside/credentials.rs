//! Credentials of a command that runs as another user than root. systemd-nspawn gives them to root of the container alone; so a file system
//! with the same files, which belong to that user, is mounted over its own. Like its own it is never written to swap, and it is read-only.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, chownat, fchown, openat, openat2};
use rustix::process::{Gid, Uid};

use super::{ContainerRoot, refused};
use crate::container::{Credential, Process};
use crate::nspawn::refusal::cause_of_host_error;
use crate::supervisor::protocol::StartFailure;
use crate::sys::mount_namespace::MountNamespace;
use crate::sys::mount_tree::MountTree;
use crate::sys::procfs;

/// Gives the credentials to the user that the leader runs as: the container init, which becomes or starts the command.
pub(super) fn give(
    credentials: &[Credential],
    root: &ContainerRoot,
    leader: Process,
) -> Result<(), StartFailure> {
    // Without root there is no real container.
    if credentials.is_empty() || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let given = Owner::of(leader.pid).and_then(|owner| match owner {
        Some(owner) => give_to(owner, credentials, root, leader),
        None => Ok(()),
    });
    given.map_err(|error| {
        let reason = format!(
            "config.credentials: the files can't be given to the user of the command: {error}"
        );
        refused(cause_of_host_error(&error), reason)
    })
}

/// Who gets the files: ids of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    user: Uid,
    group: Gid,
}

impl Owner {
    /// The user and the group of a process. `None` if that is root of its user namespace.
    fn of(pid: i32) -> io::Result<Option<Self>> {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let status = read("status")?;
        let effective = |name| {
            let words = procfs::status_field(&status, name);
            let word = words.and_then(|words| words.split_ascii_whitespace().nth(1));
            let id = word.and_then(|word| word.parse().ok());
            id.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        let user: u32 = effective("Uid")?;
        let root = super::devices::IdMap::parse(&read("uid_map")?).root();
        Ok((root != Some(user)).then_some(Self {
            user: Uid::from_raw(user),
            group: Gid::from_raw(effective("Gid")?),
        }))
    }
}

fn give_to(
    owner: Owner,
    credentials: &[Credential],
    root: &ContainerRoot,
    leader: Process,
) -> io::Result<()> {
    /// `RAMFS_MAGIC` of `linux/magic.h`.
    const RAMFS: u64 = 0x8584_58f6;
    let place = root.directory(Credential::DIRECTORY)?;
    if !root.is_own(place.as_fd(), RAMFS)? {
        let text = "something else is mounted at /run/host/credentials";
        return Err(io::Error::other(text));
    }
    let files = MountTree::in_memory()?;
    for credential in credentials {
        let text = read(place.as_fd(), &credential.name)?;
        write(files.as_fd(), &credential.name, &text, owner)?;
    }
    chownat(
        &files,
        "",
        Some(owner.user),
        Some(owner.group),
        AtFlags::EMPTY_PATH,
    )?;
    files.close_file_system()?;
    // Nothing is looked up there.
    MountNamespace::of_process(leader.pid)?.run(|| files.attach(place.as_fd()))
}

fn read(directory: BorrowedFd<'_>, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = openat2(directory, name, flags, Mode::empty(), resolve)?;
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text)?;
    Ok(text)
}

fn write(directory: BorrowedFd<'_>, name: &str, text: &[u8], owner: Owner) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut file = File::from(openat(directory, name, flags, Mode::RUSR)?);
    file.write_all(text)?;
    Ok(fchown(&file, Some(owner.user), Some(owner.group))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn only_another_user_than_root_gets_the_files() {
        let me = nix::unistd::getpid().as_raw();
        let about = std::fs::metadata("/proc/self").unwrap();
        let wanted = (about.uid() != 0).then(|| Owner {
            user: Uid::from_raw(about.uid()),
            group: Gid::from_raw(about.gid()),
        });
        assert_eq!(Owner::of(me).unwrap(), wanted);
    }

    /// Here nothing is mounted that systemd-nspawn has made.
    #[test]
    fn nothing_else_is_covered() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(temp.path().join("run/host/credentials")).unwrap();
        let root = super::super::tests::root_at(temp.path());
        let owner = Owner {
            user: Uid::from_raw(1000),
            group: Gid::from_raw(1000),
        };
        let this = crate::sys::process::current_process().unwrap();
        let error = give_to(owner, &[], &root, this).unwrap_err();
        let wanted = "something else is mounted at /run/host/credentials";
        assert_eq!(error.to_string(), wanted);
    }
}
