//! Kills processes and waits until they are gone. Each process is held by a pidfd from before it is killed, so that no other
//! process that reuses its pid is killed.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::cgroup::{Group, freezer};
use crate::container::Process;
use crate::signal::Signal;
use crate::sys::process::{ProcessHandle, children};

/// How long killed processes may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Kills every process of a cgroup, and removes the cgroup if `remove` is set.
pub fn kill_group(group: &Path, remove: bool) -> io::Result<()> {
    let group = Group::new(group);
    group.kill();
    if !group.wait_empty(KILL_TIMEOUT) {
        let text = format!(
            "processes {:?} did not exit within {} s after SIGKILL; check what they wait for (state D)",
            group.processes(),
            KILL_TIMEOUT.as_secs()
        );
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    }
    if remove { group.remove() } else { Ok(()) }
}

/// Kills a process and waits until it is gone.
pub fn kill(process: Process) {
    if let Ok(handle) = ProcessHandle::open_checked(process) {
        let _ = handle.signal(Signal::KILL);
        freezer::release(process.pid);
        handle.wait(KILL_TIMEOUT);
    }
}

/// Kills a process and its descendants. They are listed before anything is killed, so one that loses its parent meanwhile is not
/// missed.
pub(super) fn kill_with_descendants(process: Process) {
    let Ok(first) = ProcessHandle::open_checked(process) else {
        return;
    };
    let handle: Vec<_> = descendants(process.pid)
        .into_iter()
        .skip(1)
        .filter_map(|pid| ProcessHandle::open(pid).ok())
        .collect();
    for one in std::iter::once(&first).chain(&handle) {
        let _ = one.signal(Signal::KILL);
    }
    for one in std::iter::once(&first).chain(&handle) {
        one.wait(KILL_TIMEOUT);
    }
}

/// Kills the descendants of a process, for hosts without cgroups, and returns whether there were any. Orphaned descendants become its
/// children, because the process is a subreaper; so the caller repeats this when children have exited and been waited for, until
/// there are none.
pub fn kill_descendants(of: i32) -> bool {
    let descendants = descendants(of);
    for pid in &descendants[1..] {
        if let Ok(handle) = ProcessHandle::open(*pid) {
            let _ = handle.signal(Signal::KILL);
        }
    }
    descendants.len() > 1
}

pub(super) fn descendants(of: i32) -> Vec<i32> {
    let mut found = vec![of];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children(*pid));
        next += 1;
    }
    found
}
