//! One cgroup: creating it, its processes, killing and removing them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::plan::make_visible;
use super::{SUBTREE, freezer};

/// How long to keep creating a cgroup whose parent other starts remove.
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long to keep re-killing a cgroup whose members keep forking. [`Group::wait_empty`] reports survivors.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

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

    /// Creates it and its parents, also if another start removes an empty parent at the same time.
    pub fn create(&self) -> io::Result<()> {
        retry_raced(|| fs::create_dir_all(&self.0))
    }

    /// Creates the cgroup `name` inside this one, which must not exist yet, so that the container can see it.
    pub fn create_child(&self, name: &str) -> io::Result<Self> {
        let child = self.child(name);
        fs::create_dir(&child.0)?;
        make_visible(&child.0).inspect_err(|_| drop(fs::remove_dir(&child.0)))?;
        Ok(child)
    }

    /// The cgroups directly inside this one.
    pub fn children(&self) -> Vec<Self> {
        groups_in(&self.0).into_iter().map(Self).collect()
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

/// Makes a directory whose parent other starts create and remove, and tries again for up to [`CREATE_TIMEOUT`]. The pauses grow:
/// without them this and another process can take turns on the parent's lock so that no attempt ever succeeds.
pub(super) fn retry_raced<T>(mut create: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    // Which of the two errors that is depends on whether the parent was removed before or after it was found to exist.
    let is_raced = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
        )
    };
    let end = Instant::now() + CREATE_TIMEOUT;
    let mut pause = Duration::from_micros(10);
    loop {
        match create() {
            Err(error) if is_raced(&error) && Instant::now() < end => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// The cgroups directly below a directory.
pub(super) fn groups_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
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
    fn removing_is_safe_to_repeat_and_takes_the_empty_subtree_along() {
        let root = tempfile::tempdir().unwrap();
        let group = Group::new(root.path().join(SUBTREE).join("x"));
        group.child("payload").create().unwrap();
        group.remove().unwrap();
        group.remove().unwrap();
        assert!(!root.path().join(SUBTREE).exists());
    }

    #[test]
    fn an_empty_parent_that_other_starts_make_and_remove_is_no_error() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let root = tempfile::tempdir().unwrap();
        let parent = root.path().join("parent");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = fs::create_dir(&parent);
                    let _ = fs::remove_dir(&parent);
                }
            });
            let created = (0..5000).try_for_each(|_| {
                let group = Group::new(parent.join("group"));
                group.create()?;
                fs::remove_dir(group.path())
            });
            over.store(true, Ordering::Relaxed);
            created.unwrap();
        });
    }
}
