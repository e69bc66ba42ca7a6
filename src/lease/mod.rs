//! Leases: the resources that a start acquires on the host and that have to be released after it. Every resource is in the launch spec,
//! and so on disk, before it is acquired. [`release_all`] releases those of a launch spec: called by the supervisor process at the
//! container's exit, and by the plugin in DestroyTask and reconciliation if the supervisor did not get that far. It releases only
//! what the records of that start name, and may be repeated.
//!
//! A new kind of resource is one file with its `Lease`, a line in each of [`Resource`] and `Resource::lease`, and an arm in
//! `state::launch_spec_record`; CONTRIBUTING.md lists every file.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

mod cgroup;
mod ephemeral_copy;
mod network;
mod nspawn_lock;
mod nspawn_mounts;
mod remove_tree;
mod skeleton;
mod tree_lock;
mod uid_range;

pub use cgroup::{Cgroup, CgroupMirror, ControllerCgroups};
pub use ephemeral_copy::{EphemeralCopy, ephemeral_root_of};
pub use network::Network;
pub use nspawn_lock::SharedLocks;
pub use nspawn_mounts::{NspawnMounts, remove_leaked_mounts};
pub use skeleton::Skeleton;
pub use tree_lock::TreeLock;
pub use uid_range::{UidRange, first_uid_of};

/// A resource that a start holds on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// The cgroup of the start.
    Cgroup(Cgroup),
    /// The cgroup of the same name in the other hierarchy.
    CgroupMirror(CgroupMirror),
    /// The cgroups of the start in the hierarchies of cgroup v1 controllers.
    ControllerCgroups(ControllerCgroups),
    /// The network that the driver makes.
    Network(Network),
    /// The uid range of the container.
    UidRange(UidRange),
    /// systemd-nspawn's lock of a tree or an image.
    TreeLock(TreeLock),
    /// The skeleton that replaces a root that lacks mount points.
    Skeleton(Skeleton),
    /// The copy of an ephemeral root.
    EphemeralCopy(EphemeralCopy),
    /// What systemd-nspawn mounts for a machine below `/run`.
    NspawnMounts(NspawnMounts),
    /// A kind recorded by a newer driver. It is kept unchanged, and reported instead of released.
    #[serde(untagged)]
    Unknown(Value),
}

/// What is known of a start when its resources are released, after its processes have been killed.
#[derive(Debug)]
pub struct Context<'a> {
    /// The task directory of the start.
    pub task_dir: &'a Path,
    /// The skeleton of its root, if it needed one.
    pub skeleton: &'a Path,
    /// When its launch spec was written, if it still exists.
    pub ordered_at: Option<SystemTime>,
    /// Its machine name, which has been validated.
    pub machine: &'a str,
    /// The first host uid of the container's uid range, if the container came up and has a range of its own.
    pub first_uid: Option<u32>,
    /// The copy of an ephemeral root, if the container came up and has one.
    pub copy: Option<&'a Path>,
    /// Whether the host has not rebooted since the start.
    pub same_boot: bool,
    /// Whether an exit record without an error exists, so that systemd-nspawn removed its interfaces itself.
    pub by_itself: bool,
    /// Whether systemd-nspawn was killed. If it exited by itself it has released its locks, and another container may have locked
    /// the tree since.
    pub killed: bool,
}

/// How one kind of resource is released.
trait Lease {
    /// Releases it. A resource that does not exist (any more) is success.
    fn release(&self, context: &Context<'_>) -> io::Result<()>;

    /// Whether the record can be trusted: `false` if it names something that can't belong to the start.
    fn is_own(&self, _task_dir: &Path) -> bool {
        true
    }
}

/// Why a resource could not be released.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {source}")]
pub struct ReleaseError {
    /// The kind of the resource, as records name it.
    pub kind: String,
    /// What went wrong.
    pub source: io::Error,
}

impl Resource {
    fn lease(&self) -> Option<&dyn Lease> {
        Some(match self {
            Self::Cgroup(lease) => lease,
            Self::CgroupMirror(lease) => lease,
            Self::ControllerCgroups(lease) => lease,
            Self::Network(lease) => lease,
            Self::UidRange(lease) => lease,
            Self::TreeLock(lease) => lease,
            Self::Skeleton(lease) => lease,
            Self::EphemeralCopy(lease) => lease,
            Self::NspawnMounts(lease) => lease,
            Self::Unknown(_) => return None,
        })
    }

    /// Whether the record can be trusted: `false` if it names something that can't belong to the start.
    pub fn is_own(&self, task_dir: &Path) -> bool {
        self.lease().is_none_or(|lease| lease.is_own(task_dir))
    }

    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        match self.lease() {
            Some(lease) => lease.release(context),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "acquired by a newer driver; only a driver that knows this kind can release it, so install the newer driver",
            )),
        }
    }
}

impl fmt::Display for Resource {
    /// The kind, as records name it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = serde_json::to_value(self).unwrap_or_default();
        f.write_str(
            record["kind"]
                .as_str()
                .unwrap_or("a resource without a kind"),
        )
    }
}

/// Releases all of these, in the reverse order of acquisition. One that can't be released does not keep the others from being
/// released.
pub fn release_all(resources: &[Resource], context: &Context<'_>) -> Vec<ReleaseError> {
    let failed = |resource: &Resource| {
        let source = resource.release(context).err()?;
        let kind = resource.to_string();
        Some(ReleaseError { kind, source })
    };
    resources.iter().rev().filter_map(failed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    /// A start that never came up.
    pub(super) struct Start {
        pub(super) temp: tempfile::TempDir,
        pub(super) task_dir: PathBuf,
        pub(super) ordered_at: Option<SystemTime>,
    }

    impl Start {
        pub(super) fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let task_dir = temp.path().join("records");
            fs::create_dir(&task_dir).unwrap();
            let ordered_at = fs::metadata(&task_dir).unwrap().modified().ok();
            Self {
                temp,
                task_dir,
                ordered_at,
            }
        }

        pub(super) fn directory(&self, name: &str) -> PathBuf {
            let directory = self.temp.path().join(name);
            fs::create_dir(&directory).unwrap();
            directory
        }

        pub(super) fn context(&self) -> Context<'_> {
            Context {
                task_dir: &self.task_dir,
                skeleton: Path::new("/nonexistent"),
                ordered_at: self.ordered_at,
                machine: "t-a",
                first_uid: None,
                copy: None,
                same_boot: true,
                by_itself: false,
                killed: true,
            }
        }
    }

    #[test]
    fn a_resource_that_cannot_be_released_does_not_block_others() {
        let start = Start::new();
        let group = start.directory("group");
        // A real cgroup directory contains no regular files. With one in it, this directory can't be removed.
        let mirror = start.directory("mirror");
        fs::write(mirror.join("file"), "").unwrap();
        let resources = [
            Resource::Cgroup(Cgroup {
                group: group.clone(),
            }),
            Resource::CgroupMirror(CgroupMirror { group: mirror }),
            Resource::Unknown(serde_json::json!({"kind": "address", "ip": "10.0.0.2"})),
        ];
        let errors = release_all(&resources, &start.context());
        let kinds: Vec<_> = errors
            .iter()
            .map(|error| (&*error.kind, error.source.kind()))
            .collect();
        let want = [
            ("address", io::ErrorKind::Unsupported),
            ("cgroup_mirror", io::ErrorKind::DirectoryNotEmpty),
        ];
        assert_eq!(kinds, want);
        assert!(!group.exists());
    }

    #[test]
    fn a_kind_of_a_newer_driver_is_kept_unchanged() {
        let text = r#"[{"kind":"uid_range"},{"kind":"address","number":7}]"#;
        let resources: Vec<Resource> = serde_json::from_str(text).unwrap();
        assert_eq!(resources[0], Resource::UidRange(UidRange::default()));
        assert!(matches!(resources[1], Resource::Unknown(_)));
        assert_eq!(serde_json::to_string(&resources).unwrap(), text);
    }
}
