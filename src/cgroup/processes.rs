//! The processes of a cgroup and what each of them uses, for statistics: bounded, because a container decides how many there are.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::param::{clock_ticks_per_second, page_size};

use super::group::groups_in;
use crate::container::{Process, ProcessUsage};
use crate::sys::procfs::{self, Statm};

/// The most processes of one container whose figures are read.
pub const MAX_PROCESSES: usize = 512;
/// The most cgroups of one container that are searched for processes.
const MAX_GROUPS: usize = 512;

/// The processes of a cgroup and of those below, parents first.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Members {
    /// At most [`MAX_PROCESSES`].
    pub(super) pids: Vec<i32>,
    /// Whether these are all.
    pub(super) complete: bool,
}

impl Members {
    pub(super) fn of(group: &Path) -> Self {
        let mut pids = Vec::new();
        let mut pending = VecDeque::from([group.to_owned()]);
        let mut visited = 0;
        while let Some(directory) = pending.pop_front() {
            if visited == MAX_GROUPS || pids.len() > MAX_PROCESSES {
                pending.push_front(directory);
                break;
            }
            visited += 1;
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            let listed = text.lines().filter_map(|line| line.parse::<i32>().ok());
            pids.extend(listed.filter(|pid| *pid > 0).take(MAX_PROCESSES + 1));
            if has_groups(&directory) {
                pending.extend(groups_in(&directory));
            }
        }
        let complete = pending.is_empty() && pids.len() <= MAX_PROCESSES;
        pids.truncate(MAX_PROCESSES);
        Self { pids, complete }
    }

    /// What each of them uses, without those that have exited meanwhile.
    pub(super) fn usage(&self) -> Vec<ProcessUsage> {
        self.pids.iter().filter_map(|pid| usage(*pid)).collect()
    }

    /// Their anonymous memory in bytes; `None` if there is no process, or if these are not all.
    pub(super) fn anonymous(&self) -> Option<u64> {
        let pages = |pid: &i32| Some(statm(*pid)?.anonymous);
        let all: Vec<u64> = self.pids.iter().filter_map(pages).collect();
        let known = self.complete && !all.is_empty();
        known.then(|| bytes(all.iter().fold(0, |sum, pages| sum.saturating_add(*pages))))
    }
}

/// Whether there are cgroups below this one. In a cgroup file system the number of links says so, which saves a listing.
fn has_groups(directory: &PathBuf) -> bool {
    fs::metadata(directory).is_ok_and(|data| data.nlink() != 2)
}

fn usage(pid: i32) -> Option<ProcessUsage> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = procfs::parse_stat(&String::from_utf8_lossy(&text))?;
    Some(ProcessUsage {
        process: Process {
            pid,
            start: stat.start,
        },
        cpu_user_ns: nanoseconds(stat.user),
        cpu_system_ns: nanoseconds(stat.system),
        memory_rss: bytes(statm(pid)?.resident),
    })
}

fn statm(pid: i32) -> Option<Statm> {
    procfs::parse_statm(&fs::read_to_string(format!("/proc/{pid}/statm")).ok()?)
}

fn nanoseconds(ticks: u64) -> u64 {
    ticks.saturating_mul(1_000_000_000 / clock_ticks_per_second().max(1))
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processes_of_all_cgroups_are_found_up_to_the_bound() {
        let root = tempfile::tempdir().unwrap();
        let below = root.path().join("payload/system.slice");
        fs::create_dir_all(&below).unwrap();
        fs::write(root.path().join("cgroup.procs"), "0\n7\n").unwrap();
        fs::write(below.join("cgroup.procs"), "9\n8\n").unwrap();
        let found = Members::of(root.path());
        assert_eq!((found.pids, found.complete), (vec![7, 9, 8], true));
        let many: String = (1..=600).map(|pid| format!("{pid}\n")).collect();
        fs::write(root.path().join("payload/cgroup.procs"), many).unwrap();
        let found = Members::of(root.path());
        assert_eq!((found.pids.len(), found.complete), (MAX_PROCESSES, false));
        assert_eq!(found.anonymous(), None, "a part would look like the whole");
    }

    #[test]
    fn a_process_has_figures_until_it_is_gone() {
        let own = i32::try_from(std::process::id()).unwrap();
        let members = |pids: &[i32]| Members {
            pids: pids.to_vec(),
            complete: true,
        };
        let read = members(&[own, i32::MAX]).usage();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].process.pid, own);
        assert!(read[0].memory_rss > 0 && read[0].process.start > 0);
        assert!(members(&[own, i32::MAX]).anonymous() > Some(0));
        assert_eq!(members(&[i32::MAX]).anonymous(), None);
    }
}
