//! Which cgroup hierarchies this host has, and where the cgroup of a start is.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::SUBTREE;
use super::group::groups_in;
use crate::container::CgroupLayout;
use crate::sys::procfs::{self, Mount};

/// The mount point of the cgroup file systems.
const TOP: &str = "/sys/fs/cgroup";

/// How the cgroup hierarchies of this host are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Which cgroup versions are in use.
    pub kind: CgroupLayout,
    /// The hierarchy that tracks processes: cgroup v2, or the named cgroup v1 hierarchy.
    pub tracking: Option<PathBuf>,
    /// On a hybrid host: the named cgroup v1 hierarchy, in which systemd-nspawn also creates the cgroups that it makes.
    pub mirror: Option<PathBuf>,
}

/// The cgroup of one start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPath {
    /// The cgroup to create and to start systemd-nspawn in.
    pub group: PathBuf,
    /// The same cgroup in the other hierarchy, which systemd-nspawn creates itself and does not remove.
    pub mirror: Option<PathBuf>,
}

impl Layout {
    /// Derives the layout from a mount table.
    ///
    /// A host is unified where `/sys/fs/cgroup` itself is cgroup v2, as systemd defines it. A cgroup v1 hierarchy that
    /// is mounted elsewhere in addition (a VPN client mounts `net_cls`) does not change that.
    pub fn of(mounts: &[Mount]) -> Self {
        let at_top = |mount: &&Mount| mount.target == Path::new(TOP);
        // A later mount covers an earlier one.
        if let Some(top) = mounts.iter().rfind(at_top)
            && top.kind == "cgroup2"
        {
            return Self {
                kind: CgroupLayout::V2,
                tracking: Some(top.target.clone()),
                mirror: None,
            };
        }
        let target = |mount: &Mount| mount.target.clone();
        let mut legacy = mounts.iter().filter(|mount| mount.kind == "cgroup");
        let mut version_2 = mounts.iter().filter(|mount| mount.kind == "cgroup2");
        let version_2 = version_2.find(|mount| !at_top(mount));
        let named = legacy
            .clone()
            .find(|mount| mount.has_option("name=systemd"));
        let (kind, tracking, mirror) = match version_2 {
            Some(version_2) => (CgroupLayout::Hybrid, Some(version_2), named),
            None if legacy.next().is_some() => (CgroupLayout::V1, named, None),
            None => (CgroupLayout::None, None, None),
        };
        Self {
            kind,
            tracking: tracking.map(target),
            mirror: mirror.map(target),
        }
    }

    /// The layout of this host; no cgroups if the mount table can't be read.
    pub fn of_this_host() -> Self {
        Self::of(&procfs::own_mounts().unwrap_or_default())
    }

    /// The cgroup of one start: below the cgroup that Nomad made for the task if that is in the tracking hierarchy,
    /// else in the driver's own subtree. Every start gets a new leaf, because systemd-nspawn leaves its own cgroups
    /// with controllers enabled, and such a cgroup does not accept processes again.
    pub fn path_for(&self, granted: Option<&Path>, leaf: &str) -> Option<CgroupPath> {
        let tracking = self.tracking.as_ref()?;
        let parent = match granted {
            Some(granted) if granted.starts_with(tracking) && granted.is_dir() => {
                granted.to_owned()
            }
            _ => tracking.join(SUBTREE),
        };
        let group = parent.join(leaf);
        let mirror = self
            .mirror
            .as_ref()
            .zip(group.strip_prefix(tracking).ok())
            .map(|(mirror, below)| mirror.join(below));
        Some(CgroupPath { group, mirror })
    }
}

impl Layout {
    /// Every cgroup whose name satisfies `is_leaf`, in every hierarchy and at any depth, except below another match.
    pub fn leaves(&self, is_leaf: impl Fn(&str) -> bool) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut pending: Vec<PathBuf> = self.hierarchies().cloned().collect();
        while let Some(directory) = pending.pop() {
            for group in groups_in(&directory) {
                let name = group.file_name().and_then(|name| name.to_str());
                match name.is_some_and(&is_leaf) {
                    true => found.push(group),
                    false => pending.push(group),
                }
            }
        }
        found
    }

    /// Every cgroup with this name, at any depth.
    pub fn find(&self, leaf: &str) -> Vec<PathBuf> {
        self.leaves(|name| name == leaf)
    }

    /// Whether a cgroup is directly in the driver's own subtree, where only the driver creates cgroups.
    pub fn is_own(&self, group: &Path) -> bool {
        self.hierarchies()
            .any(|hierarchy| group.parent() == Some(&*hierarchy.join(SUBTREE)))
    }

    fn hierarchies(&self) -> impl Iterator<Item = &PathBuf> {
        self.tracking.iter().chain(&self.mirror)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::fs;

    /// The layout for a cgroup v2 mount (`2`) or a cgroup v1 mount (its options) at each of these paths, in this order.
    fn layout(mounts: &[(&str, &str)]) -> Layout {
        let line = |(target, what): &(&str, &str)| match *what {
            "2" => format!("1 2 0:1 / {target} rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"),
            "tmpfs" => format!("1 2 0:1 / {target} rw - tmpfs tmpfs rw,mode=755\n"),
            options => format!("1 2 0:1 / {target} rw - cgroup cgroup rw,{options}\n"),
        };
        let table: String = mounts.iter().map(line).collect();
        Layout::of(&procfs::parse_mountinfo(table.as_bytes()))
    }

    const UNIFIED: (&str, &str) = ("/sys/fs/cgroup", "2");
    const TMPFS: (&str, &str) = ("/sys/fs/cgroup", "tmpfs");
    const BESIDE: (&str, &str) = ("/sys/fs/cgroup/unified", "2");
    const NAMED: (&str, &str) = ("/sys/fs/cgroup/systemd", "xattr,name=systemd");
    const MEMORY: (&str, &str) = ("/sys/fs/cgroup/memory", "memory");
    const STRAY: (&str, &str) = ("/opt/vpn/net_cls", "net_cls");

    #[rstest]
    #[case::unified(&[UNIFIED], CgroupLayout::V2, Some(UNIFIED), None)]
    #[case::stray_after(&[UNIFIED, STRAY], CgroupLayout::V2, Some(UNIFIED), None)]
    #[case::stray_before(&[STRAY, UNIFIED], CgroupLayout::V2, Some(UNIFIED), None)]
    #[case::mounted_over_a_hybrid(&[TMPFS, MEMORY, NAMED, BESIDE, UNIFIED], CgroupLayout::V2, Some(UNIFIED), None)]
    #[case::below_a_tmpfs(&[UNIFIED, TMPFS, NAMED, BESIDE], CgroupLayout::Hybrid, Some(BESIDE), Some(NAMED))]
    #[case::hybrid(&[TMPFS, MEMORY, NAMED, BESIDE], CgroupLayout::Hybrid, Some(BESIDE), Some(NAMED))]
    #[case::version_2_elsewhere(&[("/mnt", "2")], CgroupLayout::Hybrid, Some(("/mnt", "2")), None)]
    #[case::version_1(&[TMPFS, MEMORY, NAMED], CgroupLayout::V1, Some(NAMED), None)]
    #[case::without_a_name(&[TMPFS, MEMORY], CgroupLayout::V1, None, None)]
    #[case::none(&[TMPFS], CgroupLayout::None, None, None)]
    fn layouts_are_distinguished(
        #[case] mounts: &[(&str, &str)],
        #[case] kind: CgroupLayout,
        #[case] tracking: Option<(&str, &str)>,
        #[case] mirror: Option<(&str, &str)>,
    ) {
        let path = |mount: Option<(&str, &str)>| mount.map(|(target, _)| PathBuf::from(target));
        let wanted = Layout {
            kind,
            tracking: path(tracking),
            mirror: path(mirror),
        };
        assert_eq!(layout(mounts), wanted);
    }

    #[test]
    fn a_mount_point_with_a_space_is_found() {
        let layout = layout(&[(r"/my\040groups", "2")]);
        assert_eq!(layout.tracking, Some("/my groups".into()));
    }

    #[test]
    fn a_granted_group_is_used_only_if_it_exists_in_the_tracking_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        let granted = root.path().join("nomad.slice/a.t.scope");
        let layout = Layout {
            kind: CgroupLayout::Hybrid,
            tracking: Some(root.path().to_owned()),
            mirror: Some("/named".into()),
        };
        let own = CgroupPath {
            group: root.path().join("nomad-driver-nspawn/x"),
            mirror: Some("/named/nomad-driver-nspawn/x".into()),
        };
        assert_eq!(layout.path_for(Some(&granted), "x").as_ref(), Some(&own));
        fs::create_dir_all(&granted).unwrap();
        let place = layout.path_for(Some(&granted), "x").unwrap();
        assert_eq!(place.group, granted.join("x"));
        assert_eq!(place.mirror, Some("/named/nomad.slice/a.t.scope/x".into()));
        assert_eq!(
            layout.path_for(Some(Path::new("/elsewhere")), "x"),
            Some(own)
        );
    }

    #[test]
    fn groups_are_found_by_name_and_in_the_subtree() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout {
            kind: CgroupLayout::Hybrid,
            tracking: Some(root.path().join("unified")),
            mirror: Some(root.path().join("named")),
        };
        let own = root.path().join("unified").join(SUBTREE).join("x");
        let granted = root.path().join("named/nomad.slice/a.scope/x");
        fs::create_dir_all(own.join("payload")).unwrap();
        fs::create_dir_all(&granted).unwrap();
        fs::write(root.path().join("named/file"), "").unwrap();
        assert!(layout.is_own(&own));
        for other in [&granted, &own.join("payload")] {
            assert!(!layout.is_own(other), "{}", other.display());
        }
        assert_eq!(layout.find("payload"), [own.join("payload")]);
        let mut found = layout.find("x");
        found.sort();
        assert_eq!(found, [granted.clone(), own.clone()]);
        // Whatever a container creates inside its own cgroup is not listed.
        let mut found = layout.leaves(|name| matches!(name, "x" | "payload"));
        found.sort();
        assert_eq!(found, [granted, own]);
    }
}
