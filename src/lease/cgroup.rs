//! The cgroup of a start, and its mirror: the cgroup that systemd-nspawn creates in the named cgroup v1 hierarchy, with the path
//! of the one in cgroup v2, and leaves behind.

use std::io;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Context, Lease};
use crate::cgroup::Group;

/// The cgroup that the supervisor creates and starts systemd-nspawn in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directory.
    pub group: PathBuf,
}

/// The cgroup of the same name in the other hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupMirror {
    /// Its directory.
    pub group: PathBuf,
}

/// The cgroups of the start in the hierarchies of cgroup v1 controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerCgroups {
    /// Their directories.
    pub groups: Vec<PathBuf>,
}

impl Lease for Cgroup {
    fn release(&self, _: &Context<'_>) -> io::Result<()> {
        Group::new(&self.group).remove()
    }

    fn is_own(&self, task_dir: &Path) -> bool {
        is_named_like(&self.group, task_dir)
    }
}

impl Lease for CgroupMirror {
    fn release(&self, _: &Context<'_>) -> io::Result<()> {
        Group::new(&self.group).remove()
    }

    fn is_own(&self, task_dir: &Path) -> bool {
        is_named_like(&self.group, task_dir)
    }
}

impl Lease for ControllerCgroups {
    fn release(&self, _: &Context<'_>) -> io::Result<()> {
        // One that can't be removed does not keep the others from being removed.
        let removed = self.groups.iter().map(|group| Group::new(group).remove());
        let failed: Vec<io::Error> = removed.filter_map(Result::err).collect();
        failed.into_iter().next().map_or(Ok(()), Err)
    }

    fn is_own(&self, task_dir: &Path) -> bool {
        self.groups
            .iter()
            .all(|group| is_named_like(group, task_dir))
    }
}

/// The cgroup of a start has the name of its task directory.
fn is_named_like(group: &Path, task_dir: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    group.file_name() == task_dir.file_name()
        && group.is_absolute()
        && group.components().all(plain)
}
