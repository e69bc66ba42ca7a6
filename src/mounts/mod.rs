//! The host directories and files that a container gets. Which they are is planned before anything is started, and the kernel is asked whether it
//! can map the ids of their files (`plan`). The exec shim opens them by their checked paths, in which no link is followed any more, maps them, and
//! puts them into a mount namespace that only systemd-nspawn is in (`attach`, `namespace`). So what is mounted is what was checked, systemd-nspawn
//! gets mounts that are ready, and nothing of them is left when it has ended. Knows nothing of jobs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::container::{Changes, Overlay, Propagation, Restrictions};
use crate::sys::mount_tree::Denied;
use crate::sys::{Extent, IdMap};

mod attach;
mod create;
mod later;
mod mount_point;
mod namespace;
mod overlay;
mod plan;

pub use attach::{AttachError, attach};
pub use create::create_directory;
pub use later::{LaterMounts, Outcome, Work};
pub use plan::{Planned, Refused, Unmappable, plan, unmappable};

/// How many ids a range has that the driver picks.
pub const PICKED_IDS: u32 = 65_536;

/// The ids of the host that a container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The id of its root.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// What the exec shim mounts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPlan {
    /// The container's ids, if the driver knows them and they are not those of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ids: Option<IdRange>,
    /// The root, if its ids are mapped before systemd-nspawn gets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    root: Option<PathBuf>,
    /// The mounts, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<PlannedMount>,
    /// The temporary file systems that systemd-nspawn mounts, by their paths in the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tmpfs: Vec<PathBuf>,
    /// The paths of the host that systemd-nspawn uses besides those of the system.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    used: Vec<PathBuf>,
    /// The same with everything that is mounted below.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    whole: Vec<PathBuf>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PlannedMount {
    /// A path of the host without links.
    source: PathBuf,
    /// The path in the container.
    #[serde(default)]
    target: PathBuf,
    /// The option that asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    option: Option<String>,
    read_only: bool,
    #[serde(default)]
    restrictions: Restrictions,
    #[serde(default)]
    propagation: Propagation,
    /// Whether the ids of its files are mapped.
    mapped: bool,
    /// Whether what the host mounts below it later has to be changed like the mount itself, so that propagation by the kernel is not enough.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    follows: bool,
    /// The other parts of an overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overlay: Option<Overlay>,
}

impl PlannedMount {
    fn denied(&self) -> Denied {
        Denied {
            write: self.read_only,
            set_user_id: self.restrictions.nosuid,
            devices: self.restrictions.nodev,
            execution: self.restrictions.noexec,
        }
    }
}

impl MountPlan {
    /// Whether nothing is to be mounted.
    pub fn is_empty(&self) -> bool {
        self.root.is_none() && self.mounts.is_empty()
    }

    /// Leaves to systemd-nspawn what these paths of the host are on, and what is mounted below those in `whole`.
    pub fn keep(&mut self, used: Vec<PathBuf>, whole: Vec<PathBuf>) {
        (self.used, self.whole) = (used, whole);
    }

    /// Tells where systemd-nspawn mounts temporary file systems.
    pub fn add_tmpfs(&mut self, targets: impl Iterator<Item = PathBuf>) {
        self.tmpfs.extend(targets);
    }

    /// Has the ids of this root mapped before systemd-nspawn gets it.
    pub fn map_root(&mut self, root: &Path) {
        self.root = Some(root.to_owned());
    }

    /// Whether the ids of the root are mapped before systemd-nspawn gets it.
    pub fn maps_root(&self) -> bool {
        self.root.is_some()
    }
}

/// Where the mounts of a start are, as systemd-nspawn sees it. On the host this is an empty directory.
pub fn directory(task_dir: &Path) -> PathBuf {
    task_dir.join("mounts")
}

/// Where the root is, if its ids are mapped before systemd-nspawn gets it.
pub fn root(task_dir: &Path) -> PathBuf {
    directory(task_dir).join("root")
}

/// Where one of the mounts is.
fn place_of(directory: &Path, index: usize) -> PathBuf {
    directory.join(index.to_string())
}

/// The id that files on a mount get which the host's root makes, as in systemd (`UID_MAPPED_ROOT`): systemd-nspawn makes mount points before it has
/// entered the user namespace, and then gives them to the container.
const OF_HOST_ROOT: u32 = 2_147_483_646;

/// A directory of an overlay.
struct Layer<'a> {
    option: String,
    path: &'a Path,
    /// Whether changes are kept in it.
    is_upper: bool,
}

/// The directories of an overlay, the topmost one of those that stay as they are first, and the one for changes last.
fn layers<'a>(source: &'a Path, option: Option<&str>, overlay: &'a Overlay) -> Vec<Layer<'a>> {
    let option = option.unwrap_or("an overlay");
    let lower = std::iter::once(source).chain(overlay.below.iter().map(PathBuf::as_path));
    let lower = lower.enumerate().map(|(index, path)| Layer {
        option: format!("{option}.lower[{index}]"),
        path,
        is_upper: false,
    });
    let upper = match &overlay.changes {
        Changes::Kept { directory, .. } => Some(Layer {
            option: format!("{option}.upper"),
            path: directory,
            is_upper: true,
        }),
        Changes::Refused | Changes::Discarded { .. } => None,
    };
    lower.chain(upper).collect()
}

/// The mapping of a mount whose top directory or file belongs to this user and group: every id is the same on the host and in the container. An
/// owner whom the container does not have is its root instead, so that it can use the mount.
fn id_map(ids: IdRange, user: u32, group: u32) -> IdMap {
    IdMap {
        users: extents(ids, user),
        groups: extents(ids, group),
    }
}

/// The user and the group of the files of such a mount that belong to the container's root.
fn root_of(ids: IdRange, user: u32, group: u32) -> (u32, u32) {
    let stored = |owner: u32| extents(ids, owner)[0].stored;
    (stored(user), stored(group))
}

/// The mapping of a directory in which an overlay keeps changes: every id is the same on the host and in the container. The container never sees this
/// directory itself, but without an id for its owner nobody could look into it.
fn id_map_for_changes(ids: IdRange, user: u32, group: u32) -> IdMap {
    let with_owner = |owner: u32| {
        let mut extents = extents(ids, 0);
        if owner >= ids.count && owner != OF_HOST_ROOT {
            extents.push(Extent {
                stored: owner,
                shown: OF_HOST_ROOT,
                count: 1,
            });
        }
        extents
    };
    IdMap {
        users: with_owner(user),
        groups: with_owner(group),
    }
}

fn extents(ids: IdRange, owner: u32) -> Vec<Extent> {
    let IdRange { first, count } = ids;
    let extent = |stored, shown, count| Extent {
        stored,
        shown,
        count,
    };
    let of_host_root = extent(OF_HOST_ROOT, 0, 1);
    if owner < count || owner == OF_HOST_ROOT {
        return vec![extent(0, first, count), of_host_root];
    }
    let rest = extent(1, first + 1, count - 1);
    let extents = [extent(owner, first, 1), rest, of_host_root].into_iter();
    extents.filter(|extent| extent.count > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: IdRange = IdRange {
        first: 1_000_000,
        count: 65_536,
    };

    const OF_ROOT: Extent = Extent {
        stored: OF_HOST_ROOT,
        shown: 0,
        count: 1,
    };

    fn extent(stored: u32, shown: u32, count: u32) -> Extent {
        Extent {
            stored,
            shown,
            count,
        }
    }

    #[test]
    fn ids_are_the_same_inside_and_users_and_groups_are_mapped_separately() {
        let map = id_map(IDS, 1000, 100);
        let same = [extent(0, 1_000_000, 65_536), OF_ROOT];
        assert_eq!(map.users, same);
        assert_eq!(map.groups, map.users);
        let map = id_map(IDS, 0, 200_000);
        assert_eq!(map.users, same);
        let as_root = [
            extent(200_000, 1_000_000, 1),
            extent(1, 1_000_001, 65_535),
            OF_ROOT,
        ];
        assert_eq!(map.groups, as_root);
        assert_eq!(root_of(IDS, 1000, 200_000), (0, 200_000));
    }

    #[test]
    fn where_changes_are_kept_ids_are_the_same_whoever_owns_it() {
        let same = [extent(0, 1_000_000, 65_536), OF_ROOT];
        let map = id_map_for_changes(IDS, 1000, 200_000);
        assert_eq!(map.users, same);
        let owner = extent(200_000, OF_HOST_ROOT, 1);
        assert_eq!(map.groups, [same[0], same[1], owner]);
    }

    #[test]
    fn a_range_of_one_id_has_an_owner_and_nothing_else() {
        let ids = IdRange { count: 1, ..IDS };
        let map = id_map(ids, 7, 0);
        assert_eq!(map.users, [extent(7, 1_000_000, 1), OF_ROOT]);
        assert_eq!(map.groups, [extent(0, 1_000_000, 1), OF_ROOT]);
    }
}
