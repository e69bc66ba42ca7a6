//! Trees of mounts that are attached nowhere: a copy of what is mounted at a place and below it, which nobody else sees, is changed as a whole and
//! then attached. What it was made from may be moved or unmounted meanwhile.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree,
};

use super::ffi::{MountAttributes, set_mount_attributes};

/// Opens what is at a path without links, for nothing but to say where it is: a device or a FIFO is not opened. A link in the path or at its end is
/// an error, so that this is what the path meant when its links were resolved.
pub fn place(path: &Path) -> io::Result<OwnedFd> {
    // Only who asks for a directory has an automount point mounted.
    match opened(path, OFlag::O_DIRECTORY) {
        Err(nix::Error::ENOTDIR) => place_as_it_is(path),
        other => Ok(other?),
    }
}

/// The same, with nothing mounted at an automount point.
pub fn place_as_it_is(path: &Path) -> io::Result<OwnedFd> {
    Ok(opened(path, OFlag::empty())?)
}

fn opened(path: &Path, more: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | more)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(AT_FDCWD, path, how)
}

/// The number of the mount that a place is on, as in mount tables. Asks only the kernel, never the file system.
pub fn mount_id(place: BorrowedFd<'_>) -> io::Result<u32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let about = statx(place, c"", flags, StatxFlags::MNT_ID)?;
    match about.stx_mask & StatxFlags::MNT_ID.bits() {
        0 => Err(io::ErrorKind::Unsupported.into()),
        _ => u32::try_from(about.stx_mnt_id).map_err(io::Error::other),
    }
}

/// Unmounts the mount whose top this place is, with everything below it, also if it is in use: who uses it keeps what it has opened.
pub fn detach(place: BorrowedFd<'_>) -> io::Result<()> {
    // By the descriptor: a path could lead elsewhere by now.
    let path = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
    Ok(umount2(path.as_str(), MntFlags::MNT_DETACH)?)
}

/// A tree of mounts that is attached nowhere. Dropping it unmounts it, unless it has been attached.
#[derive(Debug)]
pub struct MountTree(OwnedFd);

impl AsFd for MountTree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What is not permitted on a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Denied {
    /// To write.
    pub write: bool,
    /// To gain privileges by executing programs.
    pub set_user_id: bool,
    /// To use device nodes.
    pub devices: bool,
    /// To execute programs.
    pub execution: bool,
}

impl MountTree {
    /// A copy of what is mounted at this place, with everything mounted below it.
    pub fn copy(place: BorrowedFd<'_>) -> io::Result<Self> {
        Self::opened(place, OpenTreeFlags::AT_RECURSIVE)
    }

    /// A copy of what is mounted at this place, and of nothing below it.
    pub fn copy_of_one(place: BorrowedFd<'_>) -> io::Result<Self> {
        Self::opened(place, OpenTreeFlags::empty())
    }

    /// A new file system in memory that is never written to swap (ramfs). Its directory has mode 0500. Until it is closed, files can be made in it.
    pub fn in_memory() -> io::Result<Self> {
        let context = fsopen("ramfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "mode", "0500")?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self(tree))
    }

    /// Makes the file system itself read-only, wherever it is mounted.
    pub fn close_file_system(&self) -> io::Result<()> {
        let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
        let context = fspick(&self.0, "", flags)?;
        fsconfig_set_flag(&context, "ro")?;
        Ok(fsconfig_reconfigure(&context)?)
    }

    fn opened(place: BorrowedFd<'_>, flags: OpenTreeFlags) -> io::Result<Self> {
        let flags = flags
            | OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(Self(open_tree(place, c"", flags)?))
    }

    /// Maps the ids of files on all mounts of the tree as this user namespace does; after an error on none. Fails with `EINVAL` for a file system
    /// that can't do it, and with `EPERM` for a mount that has a mapping already.
    pub fn map_ids(&self, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
        const IDMAP: u64 = nix::libc::MOUNT_ATTR_IDMAP;
        let descriptor = user_namespace.as_raw_fd();
        self.set(&MountAttributes {
            set: IDMAP,
            user_namespace: u64::try_from(descriptor).map_err(io::Error::other)?,
            ..MountAttributes::default()
        })
    }

    /// Forbids this on all mounts of the tree.
    pub fn deny(&self, denied: Denied) -> io::Result<()> {
        let flag = |denied: bool, flag: u64| if denied { flag } else { 0 };
        let set = flag(denied.write, nix::libc::MOUNT_ATTR_RDONLY)
            | flag(denied.set_user_id, nix::libc::MOUNT_ATTR_NOSUID)
            | flag(denied.devices, nix::libc::MOUNT_ATTR_NODEV)
            | flag(denied.execution, nix::libc::MOUNT_ATTR_NOEXEC);
        match set {
            0 => Ok(()),
            set => self.set(&MountAttributes {
                set,
                ..MountAttributes::default()
            }),
        }
    }

    /// Whether mounts that are made later at the places of the originals appear in the tree. None that is made in the tree appears there.
    pub fn follow_later_mounts(&self, follow: bool) -> io::Result<()> {
        let propagation = match follow {
            true => nix::libc::MS_SLAVE,
            false => nix::libc::MS_PRIVATE,
        };
        self.set(&MountAttributes {
            propagation,
            ..MountAttributes::default()
        })
    }

    /// Lets what is attached in the tree later appear in its copies.
    pub fn share(&self) -> io::Result<()> {
        self.set(&MountAttributes {
            propagation: nix::libc::MS_SHARED,
            ..MountAttributes::default()
        })
    }

    fn set(&self, attributes: &MountAttributes) -> io::Result<()> {
        set_mount_attributes(self.0.as_fd(), attributes)
    }

    /// Attaches the tree over this directory or file.
    pub fn attach(&self, over: BorrowedFd<'_>) -> io::Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(self.0.as_fd(), c"", over, c"", flags)?)
    }
}
