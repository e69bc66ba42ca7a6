//! Plans the mounts of a start: which of them get the container's ids. The kernel is asked for each, by mapping a copy that nobody sees.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{IdRange, MountPlan, PlannedMount, directory, id_map, layers, place_of};
use crate::container::{Mount, MountIds, Overlay, Propagation, Restrictions};
use crate::sys::kernel;
use crate::sys::mount_tree::{MountTree, place, place_as_it_is};
use crate::sys::procfs;

/// File systems that show the kernel's own objects. Their files have no owners to keep apart, and tasks use them as they are.
pub(super) const OF_THE_KERNEL: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sysfs",
    "tracefs",
];

/// The mounts of a start, planned.
#[derive(Debug)]
pub struct Planned {
    /// For the exec shim.
    pub plan: MountPlan,
    /// For systemd-nspawn: the same mounts, where the exec shim puts them.
    pub mounts: Vec<Mount>,
    /// The targets of mounts whose files belong to nobody, and why.
    pub unmapped: Vec<(PathBuf, Unmappable)>,
}

/// Why the ids of the files of a mount can't be mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmappable {
    /// The file system can't do it.
    #[error("the file system {kind} at {} does not support it on this kernel", at.display())]
    FileSystem {
        /// The mount point.
        at: PathBuf,
        /// The type of the file system.
        kind: String,
    },
    /// A mount has a mapping already.
    #[error("the mount at {} has an id mapping already", at.display())]
    Mapped {
        /// The mount point.
        at: PathBuf,
    },
    /// The kernel has no mounts with mapped ids.
    #[error("this kernel does not support it: {0}")]
    Kernel(String),
    /// Whether it can be done could not be found out.
    #[error("the kernel could not be asked: {0}")]
    Failed(String),
}

/// A mount that can't be had as the job asks for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The ids of its files can't be mapped.
    #[error(
        "{option}: the ids of the files of {} can't be mapped to those of the container, because {why}. Use another file system; {remedy}\
         set config.user_namespacing = false",
        path.display()
    )]
    Unmappable {
        /// The option that asks for it.
        option: String,
        /// The source.
        path: PathBuf,
        /// Why.
        why: Unmappable,
        /// What else can be done.
        remedy: &'static str,
    },
    /// Something is mounted below a directory of an overlay, which the overlay would not show.
    #[error("{option}: {} is mounted below {}, and an overlay does not show what is mounted below its directories", at.display(), path.display())]
    Below {
        /// The option that asks for it.
        option: String,
        /// The directory.
        path: PathBuf,
        /// The mount point.
        at: PathBuf,
    },
}

/// What else can be done about a mount whose files may belong to nobody.
const UNMAPPED: &str = "or set idmap = false, with which they belong to nobody; or ";

/// About others.
const NOTHING_ELSE: &str = "or ";

impl Refused {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        let Self::Unmappable { why, .. } = self else {
            return false;
        };
        matches!(why, Unmappable::Failed(_))
    }
}

/// Plans these mounts for a container with these ids; `None` are those of the host. Blocks on the file systems of the sources. A source that can't
/// be opened is left to the exec shim.
pub fn plan(mounts: Vec<Mount>, ids: Option<IdRange>, task_dir: &Path) -> Result<Planned, Refused> {
    // Kept from the first start on, whichever that is, so that a plugin does not come to hold more with its tasks. Without it none can be mapped.
    let _ = any_mapping();
    let directory = directory(task_dir);
    let mut planned = Planned {
        plan: MountPlan {
            ids,
            ..MountPlan::default()
        },
        mounts: Vec::new(),
        unmapped: Vec::new(),
    };
    for (index, mount) in mounts.into_iter().enumerate() {
        if let Some(overlay) = &mount.overlay {
            refuse_below(&mount, overlay)?;
        }
        let mapped = ids.is_some()
            && match &mount.overlay {
                None => is_mapped(&mount, &mut planned.unmapped)?,
                Some(overlay) => are_mapped(&mount, overlay)?,
            };
        planned.plan.mounts.push(PlannedMount {
            source: mount.source.clone(),
            target: mount.target.clone(),
            option: mount.option.clone(),
            read_only: mount.read_only,
            restrictions: mount.restrictions,
            propagation: mount.propagation,
            mapped,
            follows: follows(&mount, mapped),
            overlay: mount.overlay.clone(),
        });
        planned.mounts.push(Mount {
            source: place_of(&directory, index),
            ..mount
        });
    }
    Ok(planned)
}

/// Whether the supervisor hands later mounts on: they have to be changed. Not below Nomad's own directories, where nothing is mounted later.
fn follows(mount: &Mount, mapped: bool) -> bool {
    let Restrictions {
        nosuid,
        nodev,
        noexec,
    } = mount.restrictions;
    mount.option.is_some()
        && mount.propagation == Propagation::HostToTask
        && (mapped || mount.read_only || nosuid || nodev || noexec)
        && kernel::version() >= (5, 12)
        && mount.source.is_dir()
}

/// Whether the ids of a mount are to be mapped, as far as they can be.
fn is_mapped(mount: &Mount, unmapped: &mut Vec<(PathBuf, Unmappable)>) -> Result<bool, Refused> {
    if mount.ids == MountIds::Unmapped {
        return Ok(false);
    }
    let found = unmappable(&mount.source);
    let is_top = |why: &&Unmappable| match why {
        Unmappable::FileSystem { at, .. } | Unmappable::Mapped { at } => {
            mount.source.starts_with(at)
        }
        Unmappable::Kernel(_) | Unmappable::Failed(_) => true,
    };
    // Of what the kernel shows of itself nothing is mapped, whatever is mounted below it, such as `/dev/shm`.
    let top = found.iter().find(is_top);
    if let Some(why) = top.filter(|why| !has_owners(&mount.source, why)) {
        unmapped.push((mount.target.clone(), why.clone()));
        return Ok(false);
    }
    let mapped = top.is_none();
    if mount.ids == MountIds::Mapped
        && let Some(why) = found.iter().find(|why| has_owners(&mount.source, why))
    {
        let option = mount.option.clone();
        return Err(Refused::Unmappable {
            option: option.unwrap_or_else(|| "a mount".to_owned()),
            path: mount.source.clone(),
            why: why.clone(),
            remedy: UNMAPPED,
        });
    }
    let target = &mount.target;
    unmapped.extend(found.into_iter().map(|why| (target.clone(), why)));
    Ok(mapped)
}

/// Whether the ids of the directories of an overlay are to be mapped. Those of some of them can't be.
fn are_mapped(mount: &Mount, overlay: &Overlay) -> Result<bool, Refused> {
    if mount.ids == MountIds::Unmapped {
        return Ok(false);
    }
    for layer in layers(&mount.source, mount.option.as_deref(), overlay) {
        if let Some(why) = unmappable(layer.path).into_iter().next() {
            return Err(Refused::Unmappable {
                option: layer.option,
                path: layer.path.to_owned(),
                why,
                remedy: if layer.is_upper {
                    NOTHING_ELSE
                } else {
                    UNMAPPED
                },
            });
        }
    }
    Ok(true)
}

/// Refuses an overlay that would hide files: the kernel shows nothing in it that is mounted below its directories.
fn refuse_below(mount: &Mount, overlay: &Overlay) -> Result<(), Refused> {
    let mounts = procfs::own_mounts().unwrap_or_default();
    for layer in layers(&mount.source, mount.option.as_deref(), overlay) {
        let below = |other: &&procfs::Mount| {
            other.target != layer.path && other.target.starts_with(layer.path)
        };
        if let Some(below) = mounts.iter().find(below) {
            return Err(Refused::Below {
                option: layer.option,
                path: layer.path.to_owned(),
                at: below.target.clone(),
            });
        }
    }
    Ok(())
}

/// Whether something is lost if the owners of these files are not known: not of device nodes, sockets and what the kernel shows of itself. On a
/// kernel that maps no mount at all, every job would be refused.
fn has_owners(source: &Path, why: &Unmappable) -> bool {
    let kind = fs::metadata(source).map(|about| about.file_type());
    let is_stored = kind.is_ok_and(|kind| kind.is_dir() || kind.is_file());
    match why {
        Unmappable::FileSystem { kind, .. } => is_stored && !OF_THE_KERNEL.contains(&kind.as_str()),
        Unmappable::Mapped { .. } | Unmappable::Failed(_) => is_stored,
        Unmappable::Kernel(_) => false,
    }
}

/// Why the ids of what is mounted at this path, and below it, can't be mapped: one reason for each mount that can't. None if all can, and if the path
/// can't be opened. Blocks.
pub fn unmappable(source: &Path) -> Vec<Unmappable> {
    let namespace = match any_mapping() {
        Ok(namespace) => namespace,
        Err(error) => return vec![Unmappable::Failed(error.to_string())],
    };
    let tree = place(source).and_then(|opened| MountTree::copy(opened.as_fd()));
    let Ok(tree) = tree else {
        return Vec::new();
    };
    match tree.map_ids(namespace) {
        Ok(()) => Vec::new(),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOSYS) => {
            vec![Unmappable::Kernel(error.to_string())]
        }
        Err(error) => match each(source, namespace) {
            // What can't be mapped is covered by another mount.
            found if found.is_empty() && is_of_a_mount(&error) => Vec::new(),
            found if found.is_empty() => vec![Unmappable::Failed(error.to_string())],
            found => found,
        },
    }
}

/// Whether the kernel has refused to map a mount, and not failed.
pub(super) fn is_of_a_mount(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EINVAL | nix::libc::EPERM)
    )
}

/// Any mapping: whether a mount can be mapped does not depend on the ids. Made once.
fn any_mapping() -> io::Result<BorrowedFd<'static>> {
    static MADE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(made) = MADE.get() {
        return Ok(made.as_fd());
    }
    let first = super::PICKED_IDS;
    let ids = IdRange { first, count: 1 };
    let made = id_map(ids, 0, 0).user_namespace()?;
    Ok(MADE.get_or_init(|| made).as_fd())
}

/// The mounts at this path and below it whose ids can't be mapped.
fn each(source: &Path, namespace: BorrowedFd<'_>) -> Vec<Unmappable> {
    let mounts = procfs::own_mounts().unwrap_or_default();
    let own = mounts
        .iter()
        .filter(|mount| source.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.components().count());
    let below = mounts
        .iter()
        .filter(|mount| mount.target != source && mount.target.starts_with(source));
    let own = own.map(|mount| (place(source), mount)).into_iter();
    let places = own.chain(below.map(|mount| (place_as_it_is(&mount.target), mount)));
    let unmappable = places.filter_map(|(opened, mount)| {
        let opened = opened.and_then(|opened| MountTree::copy_of_one(opened.as_fd()));
        let error = opened.ok()?.map_ids(namespace).err()?;
        let at = mount.target.clone();
        Some(match error.raw_os_error() {
            Some(nix::libc::EPERM) => Unmappable::Mapped { at },
            _ => Unmappable::FileSystem {
                at,
                kind: mount.kind.clone(),
            },
        })
    });
    unmappable.collect()
}
