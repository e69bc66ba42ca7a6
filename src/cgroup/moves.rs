//! Makes the first move of a process to a cgroup quicker.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::layout::Layout;

/// Lets the kernel prepare to move processes, which takes it 4 to 15 ms if it has not moved any for a while. Returns once it is prepared;
/// moves that follow within some milliseconds take microseconds. Meanwhile no cgroup can be made or removed, so the earlier a start calls
/// this, the less of it the start has to wait for. Does nothing while another call does it.
///
/// The kernel prepares when a process is moved to the cgroup that it is in, which changes nothing.
pub fn prepare_moves() {
    static PREPARING: AtomicBool = AtomicBool::new(false);
    if PREPARING.swap(true, Ordering::Acquire) {
        return;
    }
    let layout = Layout::of_this_host();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = layout
        .tracking
        .as_deref()
        .and_then(|top| own_group(top, &groups, std::process::id()));
    if let Some(own) = own {
        // Only a start that could have been quicker depends on it.
        let _ = fs::write(own.join("cgroup.procs"), "0");
    }
    PREPARING.store(false, Ordering::Release);
}

/// The cgroup of a process in the hierarchy that is mounted at `top`, by the text of its `/proc/<pid>/cgroup`. `None` if that is not certain:
/// in a cgroup namespace the path may be another one.
fn own_group(top: &Path, groups: &str, pid: u32) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| {
        let unified = line.strip_prefix("0::");
        unified.or_else(|| line.split_once(":name=systemd:").map(|(_, path)| path))
    })?;
    let below = Path::new(path.strip_prefix('/')?);
    let plain = |part| matches!(part, Component::Normal(_));
    let group = below.components().all(plain).then(|| top.join(below))?;
    let members = fs::read_to_string(group.join("cgroup.procs")).ok()?;
    let listed = members.lines().any(|line| line.parse() == Ok(pid));
    listed.then_some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_and_another_one_is_not_touched() {
        let top = tempfile::tempdir().unwrap();
        let group = top.path().join("a.slice/b.service");
        fs::create_dir_all(&group).unwrap();
        let write = |directory: &Path, members: &str| {
            fs::write(directory.join("cgroup.procs"), members).unwrap();
        };
        write(&group, "7\n42\n");
        write(top.path(), "1\n");
        let own = |groups, pid| own_group(top.path(), groups, pid);
        let hybrid = "3:memory:/x\n0::/a.slice/b.service\n";
        assert_eq!(own(hybrid, 42), Some(group.clone()));
        let version_1 = "3:memory:/x\n1:name=systemd:/a.slice/b.service\n";
        assert_eq!(own(version_1, 7), Some(group));
        assert_eq!(own("0::/\n", 1), Some(top.path().to_owned()));
        for (groups, pid) in [
            (hybrid, 4),
            ("0::/\n", 42),
            ("0::/gone\n", 42),
            ("0::/../a.slice\n", 42),
            ("3:memory:/\n", 1),
        ] {
            assert_eq!(own(groups, pid), None, "{groups}");
        }
    }

    /// With whatever this process may do.
    #[test]
    fn the_process_stays_where_it_is() {
        let groups = || fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = groups();
        prepare_moves();
        assert_eq!(groups(), before);
    }
}
