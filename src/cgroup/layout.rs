//! Which cgroup hierarchies this host has, and where the cgroup of a start is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

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
    /// The cgroup v1 hierarchies of resource controllers, by controller. Several controllers may share a hierarchy.
    pub controllers: BTreeMap<String, PathBuf>,
}

/// The controllers of cgroup v1.
const CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// Where the cgroups of one start are. None of them is one of the agent's, in any hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The cgroup that all processes of the start are in.
    pub tracking: CgroupPath,
    /// Whether that is in cgroup v2.
    pub version_2: bool,
    /// Whether that is in a cgroup that Nomad made for the task.
    pub granted: bool,
    /// In cgroup v1: the cgroup of the start in the hierarchy of each controller. That of `cpuset` is Nomad's own where it has one:
    /// the kernel refuses to take cores from a cgroup that has a child with them, so Nomad could not reserve a core any more.
    pub controllers: BTreeMap<String, PathBuf>,
}

impl Place {
    /// The cgroup that systemd-nspawn makes for the container's processes.
    pub fn payload(&self) -> PathBuf {
        self.tracking.group.join("payload")
    }

    /// The cgroups that compete with those of other tasks: that of the start, and the one that Nomad made for the task.
    pub fn siblings(&self) -> impl Iterator<Item = &Path> {
        let group = &*self.tracking.group;
        let granted = group.parent().filter(|_| self.granted);
        granted.into_iter().chain([group])
    }
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
                controllers: BTreeMap::new(),
            };
        }
        let target = |mount: &Mount| mount.target.clone();
        let mut legacy = mounts.iter().filter(|mount| mount.kind == "cgroup");
        let mut version_2 = mounts.iter().filter(|mount| mount.kind == "cgroup2");
        let version_2 = version_2.find(|mount| !at_top(mount));
        let controllers = controllers(legacy.clone());
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
            controllers,
        }
    }

    /// The layout of this host; no cgroups if the mount table can't be read.
    pub fn of_this_host() -> Self {
        Self::of(&procfs::own_mounts().unwrap_or_default())
    }

    /// The cgroups of one start: below the cgroup that Nomad made for the task if that is in the tracking hierarchy, else in the
    /// driver's own subtree. Every start gets a new leaf, because systemd-nspawn leaves its own cgroups with controllers enabled, and
    /// such a cgroup does not accept processes again. `None` if processes can't be tracked.
    pub fn place(&self, granted: Option<&Path>, leaf: &str) -> Option<Place> {
        let tracking = self.tracking.as_ref()?;
        let below = granted_in(granted, tracking);
        let parent = below.map_or_else(|| tracking.join(SUBTREE), Path::to_owned);
        let group = parent.join(leaf);
        let mirror = self
            .mirror
            .as_ref()
            .zip(group.strip_prefix(tracking).ok())
            .map(|(mirror, below)| mirror.join(below));
        let controllers = self.controllers.iter().map(|(controller, hierarchy)| {
            let nomads = granted_in(granted, hierarchy).filter(|_| controller == "cpuset");
            let own = || hierarchy.join(SUBTREE).join(leaf);
            (controller.clone(), nomads.map_or_else(own, Path::to_owned))
        });
        Some(Place {
            tracking: CgroupPath { group, mirror },
            version_2: self.tracks_in_version_2(),
            granted: below.is_some(),
            controllers: controllers.collect(),
        })
    }

    /// Whether processes are tracked in cgroup v2.
    pub fn tracks_in_version_2(&self) -> bool {
        matches!(self.kind, CgroupLayout::V2 | CgroupLayout::Hybrid)
    }

    /// The controllers of the cgroup v2 hierarchy. None of them is in cgroup v1 at the same time.
    pub fn version_2_controllers(&self) -> BTreeSet<String> {
        let tracking = self.tracking.as_ref();
        let tracking = tracking.filter(|_| self.tracks_in_version_2());
        let text = tracking
            .and_then(|top| fs::read_to_string(top.join("cgroup.controllers")).ok())
            .unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// The controllers that the driver can use, of whichever version.
    pub fn usable_controllers(&self) -> BTreeSet<String> {
        let mut usable = self.version_2_controllers();
        usable.extend(self.controllers.keys().cloned());
        usable
    }
}

/// The hierarchies of resource controllers among these mounts of cgroup v1.
fn controllers<'a>(legacy: impl Iterator<Item = &'a Mount>) -> BTreeMap<String, PathBuf> {
    let of = |mount: &'a Mount| {
        let own = CONTROLLERS.iter().filter(|name| mount.has_option(name));
        own.map(|name| ((*name).to_owned(), mount.target.clone()))
    };
    legacy.flat_map(of).collect()
}

/// The cgroup that Nomad made, if it exists in this hierarchy.
fn granted_in<'a>(granted: Option<&'a Path>, hierarchy: &Path) -> Option<&'a Path> {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    granted.filter(|granted| {
        granted.starts_with(hierarchy) && granted.components().all(plain) && granted.is_dir()
    })
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
        let controllers: BTreeSet<&PathBuf> = self.controllers.values().collect();
        self.tracking.iter().chain(&self.mirror).chain(controllers)
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
            controllers: layout(mounts).controllers,
        };
        assert_eq!(layout(mounts), wanted);
    }

    #[rstest]
    #[case::hybrid(&[TMPFS, ("/c/cpu,cpuacct", "cpu,cpuacct"), MEMORY, NAMED, BESIDE],
        &[("cpu", "/c/cpu,cpuacct"), ("cpuacct", "/c/cpu,cpuacct"), ("memory", MEMORY.0)])]
    #[case::version_1(&[TMPFS, MEMORY, NAMED], &[("memory", MEMORY.0)])]
    #[case::version_2_with_a_stray_mount(&[STRAY, UNIFIED], &[])]
    fn controllers_of_version_1_are_found(
        #[case] mounts: &[(&str, &str)],
        #[case] wanted: &[(&str, &str)],
    ) {
        let owned = |(name, at): &(&str, &str)| ((*name).to_owned(), PathBuf::from(at));
        let wanted: BTreeMap<String, PathBuf> = wanted.iter().map(owned).collect();
        assert_eq!(layout(mounts).controllers, wanted);
    }

    /// The kernel refuses to take a core from a cpuset that has a child with it, which would make Nomad's next start fail.
    #[test]
    fn nomads_cpuset_is_joined_and_everything_else_is_the_drivers_own() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let controllers = ["cpu", "cpuset", "memory"].map(|name| (name.to_owned(), at(name)));
        let layout = Layout {
            kind: CgroupLayout::Hybrid,
            tracking: Some(at("unified")),
            mirror: None,
            controllers: controllers.into(),
        };
        let share = at("cpuset/nomad/share");
        fs::create_dir_all(&share).unwrap();
        let own = |name: &str| (name.to_owned(), at(name).join(SUBTREE).join("x"));
        let place = layout.place(Some(&share), "x").unwrap();
        assert_eq!(
            place.controllers,
            [own("cpu"), ("cpuset".to_owned(), share), own("memory")].into()
        );
        assert!(!place.granted);
        assert_eq!(place.tracking.group, at("unified").join(SUBTREE).join("x"));
        let place = layout.place(None, "x").unwrap();
        assert_eq!(
            place.controllers,
            [own("cpu"), own("cpuset"), own("memory")].into()
        );
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
            controllers: BTreeMap::new(),
        };
        let own = CgroupPath {
            group: root.path().join("nomad-driver-nspawn/x"),
            mirror: Some("/named/nomad-driver-nspawn/x".into()),
        };
        let path = |granted: &Path| layout.place(Some(granted), "x").unwrap().tracking;
        assert_eq!(path(&granted), own);
        fs::create_dir_all(&granted).unwrap();
        assert_eq!(path(&granted).group, granted.join("x"));
        let mirror = path(&granted).mirror;
        assert_eq!(mirror, Some("/named/nomad.slice/a.t.scope/x".into()));
        assert_eq!(path(Path::new("/elsewhere")), own);
        assert_eq!(path(&granted.join("..")), own);
    }

    #[test]
    fn groups_are_found_by_name_and_in_the_subtree() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout {
            kind: CgroupLayout::Hybrid,
            tracking: Some(root.path().join("unified")),
            mirror: Some(root.path().join("named")),
            controllers: BTreeMap::new(),
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
