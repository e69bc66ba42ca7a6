//! Mounts an overlay: several directories of the host as one, with the container's ids.
//!
//! Each directory is a mount with mapped ids, the one for changes too, so that every owner in it is the same on the host and in each container, whatever
//! its range. The kernel makes its own files in that one as the host's root, for which the mapping needs an id (`OF_HOST_ROOT`): without it the
//! overlay is mounted, and can't be written.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::sys::statvfs::{FsFlags, fstatvfs, statvfs};
use nix::unistd::{Gid, Uid, fchown};

use super::attach::{AttachError, Mappings, about};
use super::{IdRange, Layer, PlannedMount, id_map, id_map_for_changes, layers};
use crate::container::{Changes, Overlay, Restrictions};
use crate::sys::mount_tree::{MountTree, place};

/// The directories of an overlay, opened and mapped.
pub(super) struct OpenedOverlay {
    option: String,
    lower: Vec<MountTree>,
    changes: OpenedChanges,
    restrictions: Restrictions,
}

enum OpenedChanges {
    Refused,
    Discarded { size: Option<u64>, top: Top },
    Kept(Kept),
}

/// Where changes are kept.
struct Kept {
    option: String,
    path: PathBuf,
    tree: MountTree,
    /// Held until the overlay is mounted: the kernel then knows that the directory is in use.
    _lock: Flock<OwnedFd>,
}

/// The owner and the permissions of the topmost directory, which the one for changes gets too: they are those of the whole overlay.
#[derive(Clone, Copy)]
struct Top {
    user: u32,
    group: u32,
    mode: Mode,
}

/// Opens the directories of an overlay by their checked paths. Still in the host's mount namespace.
pub(super) fn open(
    planned: &PlannedMount,
    overlay: &Overlay,
    ids: Option<IdRange>,
    mappings: &mut Mappings,
) -> Result<OpenedOverlay, AttachError> {
    let ids = ids.filter(|_| planned.mapped);
    let mut lower = Vec::new();
    let mut top = None;
    let mut kept = None;
    let mut restrictions = planned.restrictions;
    for layer in layers(&planned.source, planned.option.as_deref(), overlay) {
        let failed = |what| AttachError::of_source(Some(&layer.option), what, layer.path);
        let opened = place(layer.path).map_err(failed("can't open"))?;
        let about = about(&opened).map_err(failed("can't examine"))?;
        let owner = (about.stx_uid, about.stx_gid);
        let mode = Mode::from_bits_truncate(about.stx_mode.into());
        let top = *top.get_or_insert(Top {
            user: owner.0,
            group: owner.1,
            mode,
        });
        let lock = match layer.is_upper {
            false => None,
            true => Some(prepare(&opened, &layer, top.stored(ids))?),
        };
        let tree = MountTree::copy_of_one(opened.as_fd()).map_err(failed("can't copy"))?;
        // A copy of a shared mount is its peer: unmounting the copy would also unmount on the host what has been mounted there meanwhile.
        match tree.follow_later_mounts(false) {
            // Before Linux 5.12: see `attach`.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOSYS) => {}
            other => other.map_err(failed("can't separate from the host"))?,
        }
        forbid_as(&opened, &mut restrictions).map_err(failed("can't examine"))?;
        let map = ids.map(|ids| match layer.is_upper {
            false => id_map(ids, owner.0, owner.1),
            true => id_map_for_changes(ids, owner.0, owner.1),
        });
        let mapped = map.map_or(Ok(()), |map| mappings.apply(&map, &tree));
        mapped.map_err(failed("can't map the ids of"))?;
        match lock {
            None => lower.push(tree),
            Some(lock) => {
                kept = Some(Kept {
                    path: layer.path.to_owned(),
                    option: layer.option,
                    tree,
                    _lock: lock,
                });
            }
        }
    }
    let changes = match (kept, &overlay.changes, top) {
        (Some(kept), ..) => OpenedChanges::Kept(kept),
        (None, Changes::Discarded { size }, Some(top)) => OpenedChanges::Discarded {
            size: *size,
            top: top.shown(ids),
        },
        _ => OpenedChanges::Refused,
    };
    Ok(OpenedOverlay {
        option: planned.option.clone().unwrap_or_default(),
        lower,
        changes,
        restrictions,
    })
}

/// Forbids what the mount that a directory is on forbids. An overlay has none of its restrictions, unlike a copy of it.
fn forbid_as(directory: &OwnedFd, restrictions: &mut Restrictions) -> io::Result<()> {
    let flags = fstatvfs(directory)?.flags();
    restrictions.nosuid |= flags.contains(FsFlags::ST_NOSUID);
    restrictions.nodev |= flags.contains(FsFlags::ST_NODEV);
    restrictions.noexec |= flags.contains(FsFlags::ST_NOEXEC);
    Ok(())
}

impl Top {
    /// As files have it on a file system whose ids are not mapped.
    fn shown(self, ids: Option<IdRange>) -> Self {
        let shown = |owner: u32| match ids {
            Some(IdRange { first, count }) if owner < count => first + owner,
            Some(IdRange { first, .. }) => first,
            None => owner,
        };
        Self {
            user: shown(self.user),
            group: shown(self.group),
            ..self
        }
    }

    /// As files have it where changes are kept. An owner whom the container does not have is its root.
    fn stored(self, ids: Option<IdRange>) -> Self {
        let stored = |owner: u32| match ids {
            Some(ids) if owner >= ids.count => 0,
            _ => owner,
        };
        Self {
            user: stored(self.user),
            group: stored(self.group),
            ..self
        }
    }
}

const DIRECTORY: OFlag = OFlag::O_DIRECTORY
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Makes in the directory for changes what the kernel needs, and locks it: `upper` for the changes, with this owner, and `work` for itself. Both have to
/// be on one mount, and one that a volume is mounted at has no other place for it.
fn prepare(opened: &OwnedFd, layer: &Layer<'_>, top: Top) -> Result<Flock<OwnedFd>, AttachError> {
    let failed = |what| AttachError::of_source(Some(&layer.option), what, layer.path);
    let directory = openat(opened, ".", OFlag::O_RDONLY | DIRECTORY, Mode::empty());
    let directory = directory.map_err(|error| failed("can't open")(error.into()))?;
    make(&directory, "work", None)
        .and_then(|()| make(&directory, "upper", Some(top)))
        .map_err(|error| failed("can't make the directories for changes in")(error.into()))?;
    // Not the directory itself, which others may be able to open, and so to lock: only root can open this one.
    let work = openat(
        &directory,
        "work",
        OFlag::O_RDONLY | DIRECTORY,
        Mode::empty(),
    );
    let work = work.map_err(|error| failed("can't open")(error.into()))?;
    let lock = Flock::lock(work, FlockArg::LockExclusiveNonblock);
    lock.map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => in_use(&layer.option, layer.path),
        errno => failed("can't lock")(errno.into()),
    })
}

fn in_use(option: &str, path: &Path) -> AttachError {
    AttachError::InUse {
        option: option.to_owned(),
        path: path.to_owned(),
        error: Errno::EBUSY.into(),
    }
}

/// Makes a directory, unless it exists: complete, or not at all.
fn make(directory: &OwnedFd, name: &str, top: Option<Top>) -> nix::Result<()> {
    let exists = openat(directory, name, OFlag::O_PATH | DIRECTORY, Mode::empty());
    match exists {
        Err(Errno::ENOENT) => {}
        other => return other.map(drop),
    }
    let new = format!("{name}.new");
    match mkdirat(directory, &*new, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error),
    }
    if let Some(top) = top {
        let made = openat(directory, &*new, OFlag::O_RDONLY | DIRECTORY, Mode::empty())?;
        let (user, group) = (Uid::from_raw(top.user), Gid::from_raw(top.group));
        fchown(&made, Some(user), Some(group))?;
        fchmod(&made, top.mode)?;
    }
    renameat(directory, &*new, directory, name)
}

impl OpenedOverlay {
    /// Mounts it at this path, where nothing is yet. `scratch` is where its directories are mounted meanwhile. In the mount namespace of systemd-nspawn.
    pub(super) fn mount(self, at: &Path, scratch: &Path) -> Result<(), AttachError> {
        let failed = |error: io::Error| AttachError::of_overlay(&self.option, error);
        fs::create_dir(at)
            .and_then(|()| fs::create_dir(scratch))
            .map_err(failed)?;
        let mut used = Vec::new();
        let mut lower = Vec::new();
        for (index, tree) in self.lower.iter().enumerate() {
            used.push(attach(tree, &scratch.join(index.to_string())).map_err(failed)?);
            lower.push(path_of(tree));
        }
        let mut options = format!("{SETTINGS},lowerdir={}", lower.join(":"));
        let for_changes = self.for_changes(scratch)?;
        if let Some((place, [upper, work])) = &for_changes {
            used.push(place.clone());
            let [upper, work] = [path_of(upper), path_of(work)];
            options += &format!(",upperdir={upper},workdir={work}");
        }
        let read_only = for_changes.is_none();
        mount_overlay(at, &options, flags(self.restrictions, read_only)).map_err(failed)?;
        // Where it can't be changed although it should be, the kernel says so only here.
        let found = statvfs(at).map_err(|errno| failed(errno.into()))?;
        if found.flags().contains(FsFlags::ST_RDONLY) && !read_only {
            return Err(failed(io::Error::other(READ_ONLY)));
        }
        let unmounted = used
            .iter()
            .try_for_each(|place| umount2(place, MntFlags::MNT_DETACH));
        unmounted.map_err(|errno| failed(errno.into()))
    }

    /// Where changes go: a mount, and in it the directory of the changes and that of the kernel.
    fn for_changes(&self, scratch: &Path) -> Result<Option<(PathBuf, [OwnedFd; 2])>, AttachError> {
        let at = scratch.join("changes");
        match &self.changes {
            OpenedChanges::Refused => Ok(None),
            OpenedChanges::Discarded { size, top } => {
                let made = mount_tmpfs(&at, *size, *top);
                let both = made.and_then(|()| both_in(place(&at)?));
                let both = both.map_err(|error| AttachError::of_overlay(&self.option, error))?;
                Ok(Some((at, both)))
            }
            OpenedChanges::Kept(kept) => {
                let attached = attach(&kept.tree, &at);
                let both = attached.and_then(|_| both_in(&kept.tree));
                let failed = AttachError::of_source(Some(&kept.option), "can't use", &kept.path);
                let both = both.map_err(failed)?;
                match is_in_use(&both[0], scratch) {
                    true => Err(in_use(&kept.option, &kept.path)),
                    false => Ok(Some((at, both))),
                }
            }
        }
    }
}

/// What a kernel may be built to do by default, and what makes changes depend on directories below that an operator replaces; and what a program could
/// have written into the directory for changes is not followed.
const SETTINGS: &str = "index=off,metacopy=off,redirect_dir=nofollow";

const READ_ONLY: &str = "the kernel has mounted it read-only, because the file system of its directory for changes can't be used for that";

fn attach(tree: &MountTree, at: &Path) -> io::Result<PathBuf> {
    fs::create_dir(at)?;
    tree.attach(place(at)?.as_fd())?;
    mount(
        None::<&str>,
        at,
        None::<&str>,
        MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    Ok(at.to_owned())
}

/// A path that leads to an open directory and nowhere else, whatever its name is and becomes.
fn path_of(directory: impl AsFd) -> String {
    format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd())
}

/// The directories that `prepare` has made.
fn both_in(directory: impl AsFd) -> io::Result<[OwnedFd; 2]> {
    let open = |name| openat(&directory, name, OFlag::O_PATH | DIRECTORY, Mode::empty());
    Ok([open("upper")?, open("work")?])
}

/// Mounts the file system for changes that are not kept.
fn mount_tmpfs(at: &Path, size: Option<u64>, top: Top) -> io::Result<()> {
    fs::create_dir(at)?;
    let size = size.map(|size| format!(",size={size}")).unwrap_or_default();
    let options = format!("mode=0700{size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let source = Some("nomad-driver-nspawn");
    mount(source, at, Some("tmpfs"), flags, Some(options.as_str()))?;
    let directory = place(at)?;
    make(&directory, "work", None)?;
    Ok(make(&directory, "upper", Some(top))?)
}

/// Whether an overlay that is mounted keeps its changes in this directory. The kernel knows it as long as that is mounted anywhere, and refuses a second
/// one only with a setting that is of no use here. So it is asked by one that it can't mount: a directory of its own on another file system.
fn is_in_use(upper: &OwnedFd, scratch: &Path) -> bool {
    let probe = place(scratch).and_then(|other| {
        let [upper, other] = [path_of(upper), path_of(&other)];
        let options = format!("index=on,lowerdir={other},upperdir={upper},workdir={other}");
        mount_overlay(scratch, &options, MsFlags::empty())
    });
    probe.is_err_and(|error| error.raw_os_error() == Some(nix::libc::EBUSY))
}

fn mount_overlay(at: &Path, options: &str, flags: MsFlags) -> io::Result<()> {
    let source = Some("nomad-driver-nspawn");
    Ok(mount(source, at, Some("overlay"), flags, Some(options))?)
}

fn flags(restrictions: Restrictions, read_only: bool) -> MsFlags {
    let flag = |set: bool, flag: MsFlags| if set { flag } else { MsFlags::empty() };
    flag(restrictions.nosuid, MsFlags::MS_NOSUID)
        | flag(restrictions.nodev, MsFlags::MS_NODEV)
        | flag(restrictions.noexec, MsFlags::MS_NOEXEC)
        | flag(read_only, MsFlags::MS_RDONLY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    fn me(mode: u32) -> Top {
        Top {
            user: nix::unistd::geteuid().as_raw(),
            group: nix::unistd::getegid().as_raw(),
            mode: Mode::from_bits_truncate(mode),
        }
    }

    #[test]
    fn a_directory_for_changes_is_made_once_and_completed_after_an_interruption() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap();
        let directory = place(&path).unwrap();
        let mode = |name: &str| path.join(name).metadata().unwrap().mode() & 0o7777;
        fs::create_dir(path.join("upper.new")).unwrap();
        make(&directory, "upper", Some(me(0o2751))).unwrap();
        assert_eq!(mode("upper"), 0o2751);
        assert!(!path.join("upper.new").exists());
        make(&directory, "work", None).unwrap();
        assert_eq!(mode("work"), 0o700);
        fs::set_permissions(path.join("upper"), fs::Permissions::from_mode(0o711)).unwrap();
        make(&directory, "upper", Some(me(0o700))).unwrap();
        assert_eq!(mode("upper"), 0o711);
    }

    #[test]
    fn no_link_and_no_file_is_taken_for_a_directory_for_changes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap();
        let directory = place(&path).unwrap();
        fs::create_dir(path.join("elsewhere")).unwrap();
        fs::set_permissions(path.join("elsewhere"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("elsewhere", path.join("link")).unwrap();
        symlink("elsewhere", path.join("new.new")).unwrap();
        fs::write(path.join("file"), "").unwrap();
        for name in ["link", "new", "file"] {
            make(&directory, name, Some(me(0o700))).unwrap_err();
        }
        let mode = path.join("elsewhere").metadata().unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }

    #[test]
    fn an_owner_whom_the_container_does_not_have_is_its_root() {
        let ids = Some(IdRange {
            first: 1_000_000,
            count: 65_536,
        });
        let top = Top {
            user: 33,
            group: 70_000,
            mode: Mode::S_IRWXU,
        };
        let both = |top: Top| (top.user, top.group);
        assert_eq!(both(top.shown(ids)), (1_000_033, 1_000_000));
        assert_eq!(both(top.stored(ids)), (33, 0));
        assert_eq!(both(top.shown(None)), (33, 70_000));
        assert_eq!(both(top.stored(None)), (33, 70_000));
    }
}
