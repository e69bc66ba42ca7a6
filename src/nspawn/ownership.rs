//! Determines what is lost where systemd-nspawn changes the owners of an image's files instead of mapping them: file
//! capabilities, ids above 65535, and on an overlay the space for a copy of every file. Only reports it; changes
//! nothing.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::idmap::{FileSystem, Kernel};
use super::version::Feature;
use crate::container::{Root, Rootfs, Users, Volatile};
use crate::rootfs_path::{Entry, RootDir};

/// The maximum number of files to examine. systemd-nspawn is about to visit all of them, so this adds little to a
/// start.
const ENTRIES: usize = 10_000;

/// The number of ids that systemd-nspawn preserves when it changes an owner; a greater id is reduced modulo this
/// number.
const IDS: u32 = 65536;

/// Notes for the user about the owners of this image's files, one sentence each. Empty where the owners are mapped or
/// not changed.
pub fn notes(rootfs: &Rootfs, users: &Users, version: u32, kernel: Kernel) -> Vec<String> {
    let (Users::Private { range, ownership }, Root::Directory(tree)) = (users, &rootfs.source)
    else {
        return Vec::new();
    };
    let file_system = FileSystem::under(tree, kernel);
    let in_memory = rootfs.volatile == Volatile::Overlay;
    let changed = match ownership.as_deref() {
        Some("chown") => true,
        Some("auto") if Feature::Ownership.is_in(version) => in_memory || !file_system.maps,
        Some("auto") => range == "pick",
        _ => false,
    };
    let top = fs::symlink_metadata(tree);
    if !changed || top.is_ok_and(|top| belongs_to(&top, range)) {
        return Vec::new();
    }
    let is_automatic = ownership.as_deref() == Some("auto");
    let why = reason(&file_system, in_memory, is_automatic);
    Survey::of(tree, ENTRIES).result(why.as_deref())
}

/// Why changing the owners costs more than usual, or is done although the job does not ask for it.
fn reason(file_system: &FileSystem, in_memory: bool, is_automatic: bool) -> Option<String> {
    if in_memory {
        let text = "volatile = \"overlay\" in a user namespace copies the whole image into memory";
        return Some(text.to_owned());
    }
    if file_system.is_overlay {
        let text = "the image is on overlayfs, and changing the owners of its files copies the whole tree into the upper layer";
        return Some(text.to_owned());
    }
    is_automatic.then(|| {
        format!(
            "the file system of the image ({}) does not support id mapping, so the owners of its files are changed",
            file_system.name
        )
    })
}

/// Whether the tree belongs to the range already. systemd-nspawn decides that by the top directory, and then changes
/// nothing. A picked range is the one that the tree belongs to, if that is in the range for containers.
fn belongs_to(top: &Metadata, range: &str) -> bool {
    const FIRST: u32 = 0x0008_0000;
    const LAST: u32 = 0x6FFF_0000;
    let base = top.uid() - top.uid() % IDS;
    let number: Option<u32> = range.split(':').next().and_then(|first| first.parse().ok());
    let known = match number {
        Some(number) => base == number,
        None => (FIRST..=LAST).contains(&base),
    };
    known && top.gid() - top.gid() % IDS == base
}

/// What was found in a tree.
#[derive(Debug, Default, PartialEq, Eq)]
struct Survey {
    files: usize,
    bytes: u64,
    /// Whether the tree has more files than were examined.
    more: bool,
    capable: usize,
    first_capable: Option<PathBuf>,
    high: usize,
    first_high: Option<(PathBuf, u32)>,
}

impl Survey {
    /// Examines up to `most` files of a tree, without crossing into other file systems: in the order of their names, except in a
    /// directory that has more of them than are left to examine.
    fn of(tree: &Path, most: usize) -> Self {
        let mut survey = Self::default();
        let Ok(root) = RootDir::open(tree) else {
            return survey;
        };
        let mut device = None;
        let mut pending = vec![PathBuf::new()];
        while let Some(below) = pending.pop() {
            if survey.files == most {
                survey.more = true;
                return survey;
            }
            let Ok(Some(entry)) = root.lookup(&below) else {
                continue;
            };
            let about = entry.metadata();
            if *device.get_or_insert_with(|| about.dev()) != about.dev() {
                continue;
            }
            survey.see(&Path::new("/").join(&below), about, is_capable(&entry));
            if about.is_dir() {
                let names = entry.names().into_iter().flatten().flatten();
                let entries = names.map(|name| below.join(name));
                pending.extend(first_entries(entries, most - survey.files));
            }
        }
        survey
    }

    fn see(&mut self, below: &Path, about: &Metadata, capable: bool) {
        self.count(below, [about.uid(), about.gid()], capable);
        if about.is_file() {
            self.bytes += about.blocks() * 512;
        }
    }

    fn count(&mut self, below: &Path, ids: [u32; 2], capable: bool) {
        self.files += 1;
        if capable {
            self.capable += 1;
            self.first_capable.get_or_insert_with(|| below.to_owned());
        }
        if let Some(high) = ids.into_iter().find(|id| *id >= IDS) {
            self.high += 1;
            self.first_high
                .get_or_insert_with(|| (below.to_owned(), high));
        }
    }

    fn result(&self, what: Option<&str>) -> Vec<String> {
        const REMEDY: &str = "To keep the image as it is, put it on ext4, xfs or btrfs and leave config.private_users_ownership unset, \
             or set config.user_namespacing = false";
        let least = if self.more { "at least " } else { "" };
        let (files, mib) = (self.files, self.bytes.div_ceil(1 << 20));
        let what = what.map(|what| format!("{what}: {least}{files} files, {mib} MiB. {REMEDY}"));
        let capable = self.first_capable.as_ref().map(|first| {
            format!(
                "changing the owners removes the file capabilities of {least}{} files, the first is {}. {REMEDY}",
                self.capable,
                first.display()
            )
        });
        let high = self.first_high.as_ref().map(|(first, id)| {
            format!(
                "changing the owners truncates ids above {} to 16 bits in {least}{} files: {} belongs to {id}, which becomes {}. {REMEDY}",
                IDS - 1,
                self.high,
                first.display(),
                id % IDS
            )
        });
        what.into_iter().chain(capable).chain(high).collect()
    }
}

/// The entries of a directory, the last name first. Of more than `most` entries, `most` and one more in any order of names, which
/// shows that there are more: a directory can have millions, and reading and sorting all of them would take long.
fn first_entries(entries: impl Iterator<Item = PathBuf>, most: usize) -> Vec<PathBuf> {
    let mut first: Vec<_> = entries.take(most.saturating_add(1)).collect();
    first.sort_by(|one, other| other.cmp(one));
    first
}

/// Whether a program has file capabilities.
fn is_capable(entry: &Entry) -> bool {
    let about = entry.metadata();
    let program = about.is_file() && about.mode() & 0o111 != 0;
    let read = |path| rustix::fs::getxattr(path, "security.capability", &mut [0_u8; 64]);
    program && read(entry.by_descriptor()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_reported_with_the_first_path_and_the_count() {
        let mut survey = Survey::default();
        survey.count(Path::new("/etc/a"), [0, 0], false);
        survey.count(Path::new("/etc/b"), [1_516_583_083, 0], false);
        survey.count(Path::new("/etc/c"), [0, 70_000], false);
        survey.count(Path::new("/usr/bin/ping"), [0, 0], true);
        let result = survey.result(None);
        assert_eq!(result.len(), 2, "{result:?}");
        assert!(
            result[0].contains("of 1 files, the first is /usr/bin/ping."),
            "{result:?}"
        );
        assert!(
            result[1].contains("in 2 files: /etc/b belongs to 1516583083, which becomes 14507."),
            "{result:?}"
        );
        survey.more = true;
        let result = survey.result(Some("copied"));
        assert!(
            result[0].starts_with("copied: at least 4 files, 0 MiB."),
            "{result:?}"
        );
        assert!(result[1].contains("of at least 1 files"), "{result:?}");
    }

    #[test]
    fn an_image_without_losses_has_no_event() {
        let mut survey = Survey::default();
        survey.count(Path::new("/etc"), [65_535, 65_535], false);
        assert_eq!(survey.result(None), Vec::<String>::new());
    }

    #[test]
    fn a_walk_is_bounded_and_in_the_order_of_names() {
        let tree = tempfile::tempdir().unwrap();
        for name in ["b/2", "b/1", "a/1"] {
            let path = tree.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        std::os::unix::fs::symlink("/", tree.path().join("c")).unwrap();
        let whole = Survey::of(tree.path(), 100);
        assert_eq!((whole.files, whole.more), (7, false));
        let exactly = Survey::of(tree.path(), 7);
        assert_eq!((exactly.files, exactly.more), (7, false));
        let part = Survey::of(tree.path(), 3);
        assert_eq!((part.files, part.more), (3, true));
    }

    #[test]
    fn a_directory_is_read_no_further_than_the_bound() {
        let mut number = 0;
        let endless = std::iter::repeat_with(|| {
            number += 1;
            assert!(number <= 4, "read beyond the bound");
            PathBuf::from(format!("/{number}"))
        });
        assert_eq!(first_entries(endless, 3).len(), 4);
        let few = ["a", "c", "b"].map(PathBuf::from).into_iter();
        assert_eq!(first_entries(few, 3), ["c", "b", "a"].map(PathBuf::from));
    }

    /// The tree in a test belongs to the user that runs the tests, whatever that id is.
    #[test]
    fn a_tree_that_belongs_to_the_range_is_left_alone() {
        let tree = tempfile::tempdir().unwrap();
        let top = fs::metadata(tree.path()).unwrap();
        let base = top.uid() - top.uid() % IDS;
        assert_eq!(
            belongs_to(&top, &format!("{base}:65536")),
            top.gid() - top.gid() % IDS == base
        );
        assert!(!belongs_to(&top, &(base + IDS).to_string()));
        assert!(base != 0 || !belongs_to(&top, "pick"));
    }
}
