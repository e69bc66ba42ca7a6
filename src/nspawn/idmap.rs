//! Determines which mounts support the id mapping of a user namespace, and writes notes for the user about those that
//! don't.

use std::path::Path;

use nix::sys::statfs::statfs;

use super::argv::Bind;
use super::version::Feature;
use crate::container::{Mount, Users};

/// A kernel version, as `(6, 1)`.
pub type Kernel = (u32, u32);

/// File systems by magic number, with the first kernel on which they support id-mapped mounts; from the kernel's
/// `linux/magic.h` and the histories of the file systems.
const FILE_SYSTEMS: &[(u32, &str, Option<Kernel>)] = &[
    (0xEF53, "ext4", Some((5, 12))), // ext2 and ext3 too
    (0x5846_5342, "xfs", Some((5, 12))),
    (0x4d44, "vfat", Some((5, 12))),
    (0x9123_683E, "btrfs", Some((5, 15))),
    (0xF2F5_2010, "f2fs", Some((5, 18))),
    (0xE0F5_E1E2, "erofs", Some((5, 19))),
    (0x7371_7368, "squashfs", Some((6, 2))),
    (0x0102_1994, "tmpfs", Some((6, 3))),
    (0x2FC1_2FC1, "zfs", Some((6, 6))), // zfs 2.2
    (OVERLAY, "overlay", None),
    (0x6969, "nfs", None),
    (0x6573_5546, "fuse", None),
    (0x00c3_6400, "ceph", None),
    (0xFF53_4D42, "cifs", None),
    (0xFE53_4D42, "smb2", None),
    (0x0102_1997, "9p", None),
    (0x8584_58f6, "ramfs", None),
    (0x9fa0, "proc", None),
];

/// The magic number of overlayfs.
const OVERLAY: u32 = 0x794c_7630;

/// The file system under a path, and whether it supports id-mapped mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// Its name, or its magic number if the name is not known.
    pub name: String,
    /// Whether it supports id-mapped mounts on this kernel; false for an unknown file system.
    pub maps: bool,
    /// Whether it is an overlay, in which changing the owner copies the file.
    pub is_overlay: bool,
}

impl FileSystem {
    /// The file system under `path`. One that can't be queried counts as unsupported.
    pub fn under(path: &Path, kernel: Kernel) -> Self {
        let magic = statfs(path).map(|found| found.filesystem_type().0);
        let magic = magic.ok().and_then(|magic| u32::try_from(magic).ok());
        magic.map_or_else(
            || Self {
                name: "unknown".to_owned(),
                maps: false,
                is_overlay: false,
            },
            |magic| Self::of(magic, kernel),
        )
    }

    fn of(magic: u32, kernel: Kernel) -> Self {
        let known = FILE_SYSTEMS.iter().find(|(known, ..)| *known == magic);
        Self {
            name: known.map_or_else(
                || format!("of type {magic:#x}"),
                |(_, name, _)| (*name).to_owned(),
            ),
            maps: known
                .and_then(|(.., since)| *since)
                .is_some_and(|since| kernel >= since),
            is_overlay: magic == OVERLAY,
        }
    }
}

/// The binds for these mounts, with an id mapping where it is needed and possible, and notes for the user about the
/// others.
pub fn binds(
    mounts: Vec<Mount>,
    users: &Users,
    version: u32,
    kernel: Kernel,
) -> (Vec<Bind>, Vec<String>) {
    let shifted = is_shifted(users);
    let able = Feature::MappedBinds.is_in(version);
    let mut lacking = Vec::new();
    let bind = |mount: Mount| {
        if !shifted {
            return Bind {
                mount,
                idmap: false,
            };
        }
        let found = FileSystem::under(&mount.source, kernel);
        let idmap = able && found.maps;
        if !idmap {
            lacking.push((reason(able, &found, version), mount.target.clone()));
        }
        Bind { mount, idmap }
    };
    let binds = mounts.into_iter().map(bind).collect();
    let lacking = lacking.iter();
    let notes = notes(lacking.map(|(why, target)| (why.clone(), target.as_path())));
    (binds, notes)
}

/// Notes for the user about mounts without an id mapping, one for each reason.
pub fn notes<'a>(lacking: impl Iterator<Item = (String, &'a Path)>) -> Vec<String> {
    let mut grouped: Vec<(String, Vec<String>)> = Vec::new();
    for (why, target) in lacking {
        let target = target.display().to_string();
        match grouped.iter_mut().find(|(known, _)| *known == why) {
            Some((_, targets)) => targets.push(target),
            None => grouped.push((why, vec![target])),
        }
    }
    let grouped = grouped.iter();
    grouped
        .map(|(why, targets)| unmapped(why, targets))
        .collect()
}

/// Why a mount can't be mapped.
fn reason(able: bool, file_system: &FileSystem, version: u32) -> String {
    let name = &file_system.name;
    match able {
        true => format!("the file system {name} does not support it on this kernel"),
        false => {
            let since = Feature::MappedBinds.since();
            format!("systemd-nspawn {version} does not support it, {since} and later do")
        }
    }
}

fn unmapped(why: &str, targets: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = targets.iter().take(SHOWN).cloned().collect::<Vec<_>>();
    let more = match targets.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "mounted without an id mapping, because {why}: {}{more}. In the container their files belong to nobody, and root has only the \
         access of other users. Set config.user_namespacing = false, or keep the sources on ext4, xfs or btrfs",
        shown.join(", ")
    )
}

/// Whether ids inside differ from ids outside. Where they are the same, the kernel rejects an id-mapped mount.
fn is_shifted(users: &Users) -> bool {
    let Users::Private { range, .. } = users else {
        return false;
    };
    let first = range.split(':').next().unwrap_or_default();
    !matches!(first, "no" | "identity") && first.parse::<u32>() != Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(0xEF53, (5, 12), "ext4", true)]
    #[case(0xEF53, (5, 11), "ext4", false)]
    #[case(0x0102_1994, (6, 1), "tmpfs", false)]
    #[case(0x0102_1994, (6, 3), "tmpfs", true)]
    #[case(OVERLAY, (6, 18), "overlay", false)]
    #[case(0x6969, (6, 18), "nfs", false)]
    #[case(0x1234, (6, 18), "of type 0x1234", false)]
    fn file_systems_are_identified(
        #[case] magic: u32,
        #[case] kernel: Kernel,
        #[case] name: &str,
        #[case] maps: bool,
    ) {
        let found = FileSystem::of(magic, kernel);
        assert_eq!((found.name.as_str(), found.maps), (name, maps));
    }

    fn private(range: &str) -> Users {
        Users::Private {
            range: range.to_owned(),
            ownership: None,
        }
    }

    fn mount(source: &str, target: &str) -> Mount {
        Mount::new(source, target)
    }

    /// `/proc` supports no id mapping on any kernel.
    #[test]
    fn an_unmapped_mount_is_reported_with_target_and_file_system() {
        let mounts = vec![mount("/proc/self", "/data"), mount("/proc/sys", "/more")];
        let (binds, notes) = super::binds(mounts, &private("pick"), 252, (6, 18));
        assert!(binds.iter().all(|bind| !bind.idmap));
        let [note] = notes.as_slice() else {
            panic!("{notes:?}")
        };
        for part in ["/data, /more", "proc", "user_namespacing = false"] {
            assert!(note.contains(part), "{note}");
        }
    }

    #[test]
    fn a_version_that_maps_no_bind_is_the_reason() {
        let (_, notes) = super::binds(vec![mount("/", "/data")], &private("pick"), 249, (6, 18));
        assert!(
            notes[0].contains("systemd-nspawn 249") && notes[0].contains("250"),
            "{notes:?}"
        );
    }

    #[rstest]
    #[case(Users::Host)]
    #[case(private("identity"))]
    #[case(private("0:65536"))]
    fn identical_ids_need_no_mapping_and_no_event(#[case] users: Users) {
        let (binds, notes) = super::binds(vec![mount("/proc", "/data")], &users, 252, (6, 18));
        assert!(!binds[0].idmap && notes.is_empty(), "{notes:?}");
    }
}
