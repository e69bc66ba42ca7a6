//! The freezer of version 1: a process in a frozen group takes no signal, not even SIGKILL, until it is thawed. Lets go single
//! processes, and changes no group's state: the group may be somebody else's, with others in it.

use std::fs;

use crate::procfs::{self, Mount};

/// Lets a process go that lies in a frozen group of version 1, by moving it to the top, which is never frozen. With a SIGKILL
/// pending it dies without another instruction. Anything else is left as it is.
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
    // A group that thaws at this moment needs no help.
    if fs::read_to_string(state).is_ok_and(|state| state.trim() != "THAWED") {
        let _ = fs::write(top.join("cgroup.procs"), pid.to_string());
    }
}

/// The freezer's group in the text of `/proc/<pid>/cgroup`; none at the top, where nothing is ever frozen.
fn group_in(groups: &str) -> Option<&str> {
    let group = groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next()?;
        let mut names = controllers.split(',');
        names.any(|name| name == "freezer").then(|| parts.next())?
    });
    group.filter(|group| *group != "/")
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
