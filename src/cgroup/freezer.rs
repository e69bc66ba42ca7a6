//! The cgroup v1 freezer: a process in a frozen cgroup receives no signal, not even SIGKILL, until it is thawed.
//! Releases single processes and never changes the state of a cgroup, because the cgroup may not be the driver's and
//! may hold other processes.

use std::fs;

use super::membership::group_of;
use crate::sys::procfs::{self, Mount};

/// Releases a process from a frozen cgroup v1 cgroup by moving it to the root cgroup, which is never frozen. With a
/// SIGKILL pending it exits without executing another instruction. A process that is not frozen is left as it is.
pub fn release(pid: i32) {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let Some(group) = group_in(&groups) else {
        return;
    };
    let mounts = procfs::own_mounts().unwrap_or_default();
    let freezer = |mount: &&Mount| mount.kind == "cgroup" && mount.has_option("freezer");
    let Some(top) = mounts.iter().find(freezer).map(|mount| &mount.target) else {
        return;
    };
    let state = top
        .join(group.trim_start_matches('/'))
        .join("freezer.state");
    // A cgroup that is thawed at this moment needs no help.
    if fs::read_to_string(state).is_ok_and(|state| state.trim() != "THAWED") {
        let _ = fs::write(top.join("cgroup.procs"), pid.to_string());
    }
}

/// The freezer's cgroup in the text of `/proc/<pid>/cgroup`; `None` for the root cgroup, which is never frozen.
fn group_in(groups: &str) -> Option<&str> {
    group_of(groups, "freezer").filter(|group| *group != "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_freezers_group_is_found() {
        let groups = "9:cpu,cpuacct:/a\n7:freezer:/nomad/x:y\n1:name=systemd:/b\n0::/c\n";
        assert_eq!(group_in(groups), Some("/nomad/x:y"));
        assert_eq!(group_in("7:freezer:/\n0::/c\n"), None);
        assert_eq!(group_in("0::/c\n"), None);
    }
}
