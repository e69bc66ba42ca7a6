//! A mount namespace for systemd-nspawn alone. It begins as a copy of the host's, of which only those mounts are kept that systemd-nspawn uses: with
//! all of them, a host with 1,000 tasks would have a million mounts, and what an administrator unmounts would stay in use.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::sys::procfs::{self, Mount};

/// Where systemd-nspawn, and the libraries that it loads, have files. The mounts that these paths are on are kept.
const FILES: &[&str] = &[
    "/",
    "/bin",
    "/lib",
    "/lib64",
    "/opt",
    "/run",
    "/run/systemd",
    "/run/udev",
    "/sbin",
    "/tmp",
    "/usr",
    "/usr/lib",
    "/usr/local",
    "/var",
    "/var/lib",
    "/var/lib/machines",
    "/var/tmp",
];

/// The file systems of the kernel, and files that are mounted one by one where this host is a container itself. Every mount below them is kept.
const WHOLE: &[&str] = &["/dev", "/etc", "/proc", "/sys"];

/// Moves this process into a mount namespace of its own, and removes from it what systemd-nspawn does not need. It needs what the paths in `used` are
/// on, and what those in `whole` are on and have mounted below them. What is mounted on the host later does not appear in it.
pub(super) fn enter_own(used: &[&Path], whole: &[&Path]) -> io::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Before anything is removed: otherwise it would be removed on the host as well.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let mounts = procfs::own_mounts()?;
    for unused in unused(&mounts, used, whole) {
        // A mount of a namespace above can't be removed.
        let _ = umount2(unused, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Ok(())
}

/// The mount points to remove, each with everything below it.
fn unused<'a>(mounts: &'a [Mount], used: &[&Path], whole: &[&Path]) -> Vec<&'a Path> {
    let by_id: BTreeMap<u32, &Mount> = mounts.iter().map(|mount| (mount.id, mount)).collect();
    let files = FILES.iter().map(Path::new);
    let of_files = files
        .chain(used.iter().copied())
        .chain(whole.iter().copied())
        .filter_map(|path| mount_of(mounts, path));
    let whole = WHOLE.iter().map(Path::new).chain(whole.iter().copied());
    let whole: Vec<_> = whole.collect();
    let below = mounts.iter().filter(|mount| {
        let mut directories = whole.iter();
        directories.any(|directory| mount.target.starts_with(directory))
    });
    let mut kept = BTreeSet::new();
    for mount in of_files.chain(below) {
        let mut next = Some(mount);
        while let Some(mount) = next
            && kept.insert(mount.id)
        {
            next = by_id.get(&mount.parent).copied();
        }
    }
    let places: BTreeSet<&Path> = mounts
        .iter()
        .filter(|mount| kept.contains(&mount.id))
        .map(|mount| &*mount.target)
        .collect();
    let unused = mounts.iter().filter(|mount| {
        !kept.contains(&mount.id) && kept.contains(&mount.parent)
            // At such a path another mount would be removed.
            && !places.contains(&*mount.target)
    });
    unused.map(|mount| &*mount.target).collect()
}

/// The mount that a path is on.
fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // Of several at one place, the last one covers the others.
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lines: &[(u32, u32, &str)]) -> Vec<Mount> {
        let text: String = lines
            .iter()
            .map(|(id, parent, target)| {
                format!("{id} {parent} 0:1 / {target} rw - ext4 /dev/x rw\n")
            })
            .collect();
        procfs::parse_mountinfo(text.as_bytes())
    }

    fn unused_of(lines: &[(u32, u32, &str)], used: &[&str], whole: &[&str]) -> Vec<String> {
        let mounts = table(lines);
        let (used, whole): (Vec<_>, Vec<_>) = (
            used.iter().map(Path::new).collect(),
            whole.iter().map(Path::new).collect(),
        );
        unused(&mounts, &used, &whole)
            .into_iter()
            .map(|path| path.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn what_systemd_nspawn_uses_is_kept_with_what_it_is_mounted_on() {
        let lines = [
            (1, 0, "/"),
            (2, 1, "/proc"),
            (3, 1, "/sys"),
            (4, 3, "/sys/fs/cgroup"),
            (5, 1, "/run"),
            (6, 5, "/run/user/1000"),
            (7, 1, "/srv"),
            (8, 7, "/srv/images"),
            (13, 8, "/srv/images/web/data"),
            (14, 8, "/srv/images/other"),
            (9, 7, "/srv/other"),
            (10, 1, "/mnt"),
            (11, 10, "/mnt/inner"),
            (12, 1, "/nix/store"),
        ];
        let used = ["/nix/store/x/bin/systemd-nspawn", "/srv/images"];
        assert_eq!(
            unused_of(&lines, &used, &["/srv/images/web"]),
            ["/run/user/1000", "/srv/images/other", "/srv/other", "/mnt"]
        );
    }

    #[test]
    fn a_mount_that_another_one_covers_is_not_removed_in_its_place() {
        let lines = [
            (1, 0, "/"),
            (2, 1, "/srv"),
            (3, 2, "/srv"),
            (4, 3, "/srv/x"),
        ];
        assert_eq!(unused_of(&lines, &[], &["/srv/web"]), ["/srv/x"]);
        let lines = [(1, 0, "/"), (2, 1, "/srv"), (3, 1, "/srv")];
        assert_eq!(unused_of(&lines, &[], &["/srv/web"]), Vec::<String>::new());
    }
}
