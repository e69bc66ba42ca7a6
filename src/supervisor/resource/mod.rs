//! What a start acquires on the host and what has to be released after it. Every resource stands in the order, and so on disk,
//! before it is acquired; whoever ends a start releases all of them by [`release_all`]: the supervisor at the container's end,
//! DestroyTask and reconciliation where the supervisor did not get that far. Releases only what the records of that start name, and
//! may be repeated.
//!
//! A new kind is one file with its `Lease`, and its line in each of [`Resource`] and `Resource::lease`.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::task_dir::{Running, TaskDir};

mod cgroup;
mod ephemeral_copy;
mod lock_file;
mod nspawn_mounts;
mod skeleton;
mod tree_lock;
mod uid_range;
mod zone_bridge;

pub use cgroup::{Cgroup, CgroupMirror};
pub use ephemeral_copy::EphemeralCopy;
pub use nspawn_mounts::NspawnMounts;
pub use skeleton::Skeleton;
pub use tree_lock::TreeLock;
pub use uid_range::UidRange;
pub use zone_bridge::ZoneBridge;

pub(super) use ephemeral_copy::ephemeral_root_of;
pub(super) use nspawn_mounts::remove_leaked_mounts;
pub(super) use uid_range::first_uid_of;

/// Something a start holds on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// The control group of the start.
    Cgroup(Cgroup),
    /// The same group in the other hierarchy.
    CgroupMirror(CgroupMirror),
    /// The bridge of a zone.
    ZoneBridge(ZoneBridge),
    /// The lock of a range of user ids that systemd-nspawn picks.
    UidRange(UidRange),
    /// systemd-nspawn's lock of a tree or an image.
    TreeLock(TreeLock),
    /// The stand-in for a root that lacks mount points.
    Skeleton(Skeleton),
    /// The throw-away copy of an ephemeral root.
    EphemeralCopy(EphemeralCopy),
    /// What systemd-nspawn mounts for a machine below `/run`.
    NspawnMounts(NspawnMounts),
    /// A kind that a newer driver has recorded. It is kept as it is, and reported instead of released.
    #[serde(untagged)]
    Unknown(Value),
}

/// What is known of a start when its resources are released; its processes are gone by then.
#[derive(Debug)]
pub struct Context<'a> {
    /// The records of the start.
    pub task_dir: &'a TaskDir,
    /// Its machine name, which was checked.
    pub machine: &'a str,
    /// What was learned when it came up, if it did.
    pub running: Option<&'a Running>,
    /// Whether the host still runs the boot of the start.
    pub same_boot: bool,
    /// Whether the end is on record and systemd-nspawn took its interfaces along.
    pub by_itself: bool,
    /// Whether systemd-nspawn was killed. One that has ended by itself has given up its locks, and the tree may be another's since.
    pub killed: bool,
}

/// How one kind of resource is released.
trait Lease {
    /// Releases it. One that is not there (any more) is success.
    fn release(&self, context: &Context<'_>) -> io::Result<()>;

    /// Whether the record may be believed: `false` where it names what can't be the start's own.
    fn is_own(&self, _records: &TaskDir) -> bool {
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
            Self::ZoneBridge(lease) => lease,
            Self::UidRange(lease) => lease,
            Self::TreeLock(lease) => lease,
            Self::Skeleton(lease) => lease,
            Self::EphemeralCopy(lease) => lease,
            Self::NspawnMounts(lease) => lease,
            Self::Unknown(_) => return None,
        })
    }

    /// Whether the record may be believed: `false` where it names what can't be the start's own.
    pub fn is_own(&self, task_dir: &TaskDir) -> bool {
        self.lease().is_none_or(|lease| lease.is_own(task_dir))
    }

    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        match self.lease() {
            Some(lease) => lease.release(context),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a newer driver has acquired it, and only a driver that knows this kind can release it",
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

/// Releases all of these, in the reverse order of their acquisition. One that can't be released keeps no other from it.
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
    use super::super::task_dir::tests::an_order;
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::PathBuf;

    /// A start with records and nothing else.
    pub(super) struct Start {
        pub(super) temp: tempfile::TempDir,
        pub(super) task_dir: TaskDir,
    }

    impl Start {
        pub(super) fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let task_dir = TaskDir::new(temp.path().join("records"));
            task_dir.create().unwrap();
            let launch_spec = an_order("a/t/1");
            task_dir
                .write_launch_spec(&launch_spec, &BTreeMap::new(), None)
                .unwrap();
            Self { temp, task_dir }
        }

        pub(super) fn directory(&self, name: &str) -> PathBuf {
            let directory = self.temp.path().join(name);
            fs::create_dir(&directory).unwrap();
            directory
        }

        /// What is known of a start that never came up.
        pub(super) fn context(&self) -> Context<'_> {
            Context {
                task_dir: &self.task_dir,
                machine: "t-a",
                running: None,
                same_boot: true,
                by_itself: false,
                killed: true,
            }
        }
    }

    #[test]
    fn what_can_not_be_released_keeps_no_other_from_it() {
        let start = Start::new();
        let group = start.directory("group");
        // No hierarchy of groups has files, so this is one that does not go.
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
    fn a_kind_of_a_newer_driver_is_kept_as_it_is() {
        let text = r#"[{"kind":"zone_bridge","zone":"web"},{"kind":"address","number":7}]"#;
        let resources: Vec<Resource> = serde_json::from_str(text).unwrap();
        let zone = "web".to_owned();
        assert_eq!(resources[0], Resource::ZoneBridge(ZoneBridge { zone }));
        assert!(matches!(resources[1], Resource::Unknown(_)));
        assert_eq!(serde_json::to_string(&resources).unwrap(), text);
    }
}
