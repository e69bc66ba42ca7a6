//! Cgroups of tasks: choosing the path, creating, killing all processes, reading usage, removing. Uses cgroup v2 where
//! it is mounted (unified or hybrid), otherwise the named cgroup v1 hierarchy. Knows nothing about containers, and does
//! not touch cgroups that the driver did not create.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::container::{CgroupLayout, Usage};
use crate::sys::procfs::{self, Mount};

pub mod freezer;

/// The mount point of the cgroup file systems.
const TOP: &str = "/sys/fs/cgroup";

/// The driver's own subtree, used where Nomad provides no cgroup.
const SUBTREE: &str = "nomad-driver-nspawn";

/// How long to keep re-killing a cgroup whose members keep forking. [`Group::wait_empty`] reports survivors.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

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

/// The cgroups directly below a directory.
fn groups_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// A cgroup, identified by its directory. The directory need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group(PathBuf);

impl Group {
    /// The cgroup with this directory.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The cgroup `name` inside this one.
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    /// Creates it and its parents. Retries if another start removes an empty parent at the same time.
    pub fn create(&self) -> io::Result<()> {
        let mut attempts = 0;
        loop {
            match fs::create_dir_all(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 100 => {
                    attempts += 1
                }
                other => return other,
            }
        }
    }

    /// Moves the calling process into it.
    pub fn enter(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), "0")
    }

    /// The processes of this cgroup and of all cgroups below.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        self.walk(&mut |group| {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(
                text.lines()
                    .filter_map(|line| line.parse::<i32>().ok())
                    .filter(|pid| *pid > 0),
            );
        });
        found
    }

    /// Kills every process of this cgroup and of those below, including stopped and frozen ones. Returns when the
    /// signals are sent; [`wait_empty`](Self::wait_empty) waits for the processes to exit.
    pub fn kill(&self) {
        if fs::write(self.0.join("cgroup.kill"), "1").is_ok() {
            self.processes().into_iter().for_each(freezer::release);
            return;
        }
        self.kill_one_by_one();
    }

    /// Kills without `cgroup.kill`, which does not exist in cgroup v1 nor in cgroup v2 before Linux 5.14. A process
    /// that forks faster than the list is read is killed in a later round: the loop continues as long as a round finds
    /// new processes.
    fn kill_one_by_one(&self) {
        let end = Instant::now() + KILL_TIMEOUT;
        let mut seen = BTreeSet::new();
        while Instant::now() < end {
            let processes = self.processes();
            if processes.iter().all(|pid| seen.contains(pid)) {
                return;
            }
            // In chunks, because each process needs a descriptor.
            for some in processes.chunks(64) {
                let pidfds = open_pidfds(some);
                // List the members again after opening the pidfds, and kill only those that are still listed: before
                // its pidfd was open, a pid may have been reused by a process outside the cgroup.
                kill_members(&pidfds, &self.processes());
            }
            seen.extend(processes);
        }
    }

    /// Thaws every process of this cgroup and of those below, in cgroup v1 and v2.
    pub fn thaw(&self) {
        self.walk(&mut |group| {
            let _ = fs::write(group.join("cgroup.freeze"), "0");
        });
        self.processes().into_iter().for_each(freezer::release);
    }

    /// Waits until no process is left, for at most `limit`, and returns whether that is so. A killed process takes a
    /// moment to exit, and the kernel only notifies about empty cgroups in cgroup v2, so this polls at increasing
    /// intervals.
    pub fn wait_empty(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut pause = Duration::from_micros(200);
        while !self.processes().is_empty() {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        true
    }

    /// Removes the cgroup with all cgroups below, and the driver's own subtree if this was its last cgroup. A cgroup
    /// that still has processes is kept and is an error; a missing one is not.
    pub fn remove(&self) -> io::Result<()> {
        let mut groups = Vec::new();
        self.walk(&mut |group| groups.push(group.to_owned()));
        for group in groups.iter().rev() {
            match fs::remove_dir(group) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if let Some(parent) = self.0.parent().filter(|parent| parent.ends_with(SUBTREE)) {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    /// The number of processes that the kernel's OOM killer has killed in it; 0 where that is not counted.
    pub fn oom_kills(&self) -> u64 {
        self.field("memory.events", "oom_kill").unwrap_or(0)
    }

    /// The resource usage of its processes.
    pub fn usage(&self) -> Usage {
        let cpu = |key: &str| self.field("cpu.stat", key);
        let memory = |key: &str| self.field("memory.stat", key);
        let micro = |value: u64| value.saturating_mul(1000);
        Usage {
            cpu_user_ns: cpu("user_usec").map(micro),
            cpu_system_ns: cpu("system_usec").map(micro),
            throttled_periods: cpu("nr_throttled"),
            throttled_ns: cpu("throttled_usec").map(micro),
            // Without the memory controller, add up the resident memory of the processes.
            memory_rss: memory("anon").or_else(|| self.resident()),
            memory_cache: memory("file"),
            memory_usage: self.value("memory.current"),
            memory_peak: self.value("memory.peak"),
            memory_swap: self.value("memory.swap.current"),
        }
    }

    fn resident(&self) -> Option<u64> {
        let kib = |pid: i32| {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let value = procfs::status_field(&text, "RssAnon")?;
            value.strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        let all: Vec<u64> = self.processes().into_iter().filter_map(kib).collect();
        (!all.is_empty()).then(|| all.iter().sum::<u64>().saturating_mul(1024))
    }

    fn value(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.0.join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    fn field(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.0.join(file)).ok()?;
        text.lines().find_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
    }

    /// Visits this cgroup's directory and all below it, parents first.
    fn walk(&self, visit: &mut dyn FnMut(&Path)) {
        let mut pending = vec![self.0.clone()];
        while let Some(directory) = pending.pop() {
            if !directory.is_dir() {
                continue;
            }
            visit(&directory);
            pending.extend(groups_in(&directory));
        }
    }
}

/// Opens a pidfd for each process that still exists, so that pid reuse can't redirect a signal.
fn open_pidfds(pids: &[i32]) -> Vec<(i32, OwnedFd)> {
    let open = |pid: &i32| {
        let descriptor = pidfd_open(Pid::from_raw(*pid)?, PidfdFlags::empty()).ok()?;
        Some((*pid, descriptor))
    };
    pids.iter().filter_map(open).collect()
}

/// Kills those of the open processes whose pid is in `members`, including frozen ones, and returns their pids.
fn kill_members(pidfds: &[(i32, OwnedFd)], members: &[i32]) -> Vec<i32> {
    let members = pidfds.iter().filter(|(pid, _)| members.contains(pid));
    let kill = |(pid, descriptor): &(i32, OwnedFd)| {
        // A process that has exited needs no signal.
        let _ = pidfd_send_signal(descriptor, Signal::KILL);
        freezer::release(*pid);
        *pid
    };
    members.map(kill).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

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

    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs processes to kill"
    )]
    #[test]
    fn without_cgroup_kill_only_members_are_killed() {
        use std::os::unix::process::ExitStatusExt;
        let sleep = || {
            std::process::Command::new("sleep")
                .arg("600")
                .spawn()
                .unwrap()
        };
        let pid = |child: &std::process::Child| i32::try_from(child.id()).unwrap();
        let (mut member, mut below, mut foreign) = (sleep(), sleep(), sleep());
        let root = tempfile::tempdir().unwrap();
        let group = Group::new(root.path());
        group.child("payload").create().unwrap();
        let procs = |group: &Group, pids: &[i32]| {
            let lines: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
            fs::write(group.path().join("cgroup.procs"), lines).unwrap();
        };
        // `i32::MAX` stands for a process that has exited before it is opened.
        procs(&group, &[pid(&member), i32::MAX]);
        procs(&group.child("payload"), &[pid(&below)]);
        group.kill_one_by_one();
        for child in [&mut member, &mut below] {
            assert_eq!(child.wait().unwrap().signal(), Some(9));
        }
        // A process that is no longer a member, or that got the reused pid of one.
        let pidfds = open_pidfds(&[pid(&foreign)]);
        assert_eq!(pidfds.len(), 1);
        assert!(kill_members(&pidfds, &[1]).is_empty());
        assert!(foreign.try_wait().unwrap().is_none());
        assert_eq!(kill_members(&pidfds, &[pid(&foreign)]), [pid(&foreign)]);
        foreign.wait().unwrap();
    }

    #[test]
    fn usage_is_read_from_the_files_that_are_there() {
        let root = tempfile::tempdir().unwrap();
        fs::write(
            root.path().join("cpu.stat"),
            "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_throttled 3\nthrottled_usec 7\n",
        )
        .unwrap();
        fs::write(
            root.path().join("memory.stat"),
            "anon 4096\nfile 8192\nanon_thp 1\n",
        )
        .unwrap();
        fs::write(root.path().join("memory.current"), "12288\n").unwrap();
        let usage = Group::new(root.path()).usage();
        assert_eq!(usage.cpu_user_ns, Some(10_000));
        assert_eq!(usage.cpu_system_ns, Some(20_000));
        assert_eq!(usage.throttled_periods, Some(3));
        assert_eq!(usage.throttled_ns, Some(7_000));
        assert_eq!(usage.memory_rss, Some(4096));
        assert_eq!(usage.memory_cache, Some(8192));
        assert_eq!(usage.memory_usage, Some(12288));
        assert_eq!(usage.memory_peak, None);
    }

    #[test]
    fn removing_is_safe_to_repeat_and_takes_the_empty_subtree_along() {
        let root = tempfile::tempdir().unwrap();
        let group = Group::new(root.path().join(SUBTREE).join("x"));
        group.child("payload").create().unwrap();
        group.remove().unwrap();
        group.remove().unwrap();
        assert!(!root.path().join(SUBTREE).exists());
    }
}
