//! The copy of an ephemeral root. systemd-nspawn creates it, and leaves it behind when it is killed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::remove_tree::remove_tree;
use super::{Context, Lease, nspawn_lock};
use crate::sys::procfs;

/// A copy whose name systemd-nspawn makes up. The name is known once the container has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EphemeralCopy {
    /// The directory in which it is created.
    pub directory: PathBuf,
    /// The name of the tree or image, which the copy's name contains; empty for one that is copied into itself. Older drivers do not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
}

impl Lease for EphemeralCopy {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        match context.copy.filter(|copy| self.is_copy(copy)) {
            Some(copy) => remove(copy),
            None => self.remove_nameless(context.ordered_at),
        }
    }
}

impl EphemeralCopy {
    /// The copy of this tree or image in this directory.
    pub fn of(tree: &Path, directory: PathBuf) -> Self {
        let name = tree.file_name().filter(|_| directory != tree);
        // systemd-nspawn does not start with another name.
        let name = name.unwrap_or_default().to_str();
        Self {
            tree: name.map(str::to_owned),
            directory,
        }
    }

    /// Whether a path has a name that systemd-nspawn gives to copies and is in the directory of this start's copies.
    fn is_copy(&self, path: &Path) -> bool {
        let named = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(".#"));
        named && path.parent() == Some(&self.directory)
    }

    /// Removes the copy of a systemd-nspawn that was killed before it reported the copy's name. systemd-nspawn locks the name
    /// before it copies anything, and the lock ends with it. So a copy of this tree that was begun after the launch spec was
    /// written, and whose lock no process holds, is a leftover, unless a container has survived its systemd-nspawn.
    fn remove_nameless(&self, ordered_at: Option<SystemTime>) -> io::Result<()> {
        let dead = nspawn_lock::dead(ordered_at, &self.directory, |name| {
            let copy = name.strip_prefix(".#")?.strip_suffix(".lck")?;
            let tree = tree_of(copy)?;
            let is_own = self.tree.as_ref().is_none_or(|own| own == tree);
            is_own.then(|| copy.to_owned())
        })?;
        dead.into_iter()
            .map(|(held, _, copy)| (held, self.directory.join(copy)))
            .filter(|(_, copy)| !is_root_of_a_process(copy))
            .map(|(_held, copy)| remove(&copy))
            .fold(Ok(()), io::Result::and)
    }
}

/// The path of a container's ephemeral root, found through its leader: the kernel shows which directory of the file system is
/// mounted at its root.
pub fn ephemeral_root_of(leader: i32, copies: &Path) -> Option<PathBuf> {
    let mounts = procfs::mounts_of(leader).ok()?;
    let root = mounts
        .iter()
        .filter(|mount| mount.target == Path::new("/"))
        .find_map(|mount| mount.root.file_name())
        .map(|name| copies.join(name))?;
    let name = root.file_name()?.to_str()?;
    (name.starts_with(".#") && root.is_dir()).then_some(root)
}

/// What systemd-nspawn puts in front of the name of a tree or image. Version 262 gives the second to copies of trees.
const PREFIXES: [&str; 2] = [".#machine.", ".#snapshot."];

/// The name of the tree or image that a copy with this name was made of; `None` if systemd-nspawn does not make up such a name.
fn tree_of(copy: &str) -> Option<&str> {
    let rest = PREFIXES.iter().find_map(|start| copy.strip_prefix(start))?;
    let (tree, random) = rest.split_at_checked(rest.len().checked_sub(16)?)?;
    let is_random = random.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_random.then_some(tree)
}

/// Whether a process has this directory as its root.
fn is_root_of_a_process(directory: &Path) -> bool {
    let identity = |about: fs::Metadata| (about.dev(), about.ino());
    let Ok(directory) = directory.symlink_metadata().map(identity) else {
        return false;
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut roots = entries.map(|entry| entry.path().join("root").metadata());
    roots.any(|root| root.is_ok_and(|root| identity(root) == directory))
}

/// Removes the copy of a tree or an image.
fn remove(path: &Path) -> io::Result<()> {
    let is_tree = path.symlink_metadata().is_ok_and(|about| about.is_dir());
    let removed = if is_tree {
        remove_tree(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // After the copy: without its lock file the copy would not be found again.
    if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
        let _ = fs::remove_file(path.with_file_name(format!(".#{name}.lck")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::nspawn_lock;
    use super::super::tests::Start;
    use super::*;

    #[test]
    fn without_the_directory_of_the_copies_nothing_is_removed() {
        let start = Start::new();
        let directory = start.temp.path().join("gone");
        EphemeralCopy::of(Path::new("tree"), directory)
            .release(&start.context())
            .unwrap();
    }

    #[test]
    fn unrecorded_copies_are_removed_if_unlocked_and_newer_than_the_launch_spec() {
        let start = Start::new();
        let copies = start.directory("images");
        let lease = EphemeralCopy::of(&copies.join("tree"), copies.clone());
        let of_image = EphemeralCopy::of(&copies.join("disk.raw"), copies.clone());
        let make = |name: &str| {
            let copy = copies.join(name);
            fs::create_dir(&copy).unwrap();
            fs::write(copy.join("file"), "").unwrap();
            fs::write(copies.join(format!(".#{name}.lck")), "").unwrap();
            copy
        };
        let lock = |copy: &Path| {
            let name = copy.file_name().unwrap().to_str().unwrap();
            copies.join(format!(".#{name}.lck"))
        };
        let early = make(".#machine.tree00000000000000aa");
        let before = SystemTime::UNIX_EPOCH;
        let file = fs::File::options().write(true).open(lock(&early)).unwrap();
        file.set_modified(before).unwrap();
        let dead = make(".#machine.tree00000000000000bb");
        let image = copies.join(".#machine.disk.raw00000000000000dd");
        for file in [&image, &lock(&image)] {
            fs::write(file, "").unwrap();
        }
        let alive = make(".#machine.tree00000000000000cc");
        let others = [
            ".#machine.backup",
            ".#machine.tre00000000000000ee",
            ".#machine.tree200000000000000ff",
            ".#snapshot.00000000000000aa",
            ".#other.tree00000000000000aa",
        ]
        .map(make);
        let snapshot = make(".#snapshot.tree00000000000000bb");
        let held = nspawn_lock::take(&lock(&alive)).unwrap();
        lease.release(&start.context()).unwrap();
        for copy in [&early, &alive, &image].into_iter().chain(&others) {
            assert!(copy.exists() && lock(copy).exists(), "{}", copy.display());
        }
        of_image.release(&start.context()).unwrap();
        for copy in [&dead, &snapshot, &image] {
            assert!(!copy.exists() && !lock(copy).exists(), "{}", copy.display());
        }
        drop(held);
        lease.release(&start.context()).unwrap();
        assert!(!alive.exists());
    }

    #[test]
    fn the_name_of_the_tree_is_part_of_the_name() {
        assert_eq!(tree_of(".#machine.0123456789abcdef"), Some(""));
        assert_eq!(tree_of(".#snapshot.a.b0123456789abcdef"), Some("a.b"));
        for name in [
            ".#machine.0123456789abcde",
            ".#machine.tree0123456789abcdeg",
            ".#tree0123456789abcdef",
            "machine.tree0123456789abcdef",
            ".#machine.ä23456789abcdefg",
        ] {
            assert_eq!(tree_of(name), None, "{name}");
        }
        let tree = Path::new("/srv/tree");
        let inside = EphemeralCopy::of(tree, tree.to_owned());
        assert_eq!(inside.tree.as_deref(), Some(""));
        let beside = EphemeralCopy::of(tree, "/srv".into());
        assert_eq!(beside.tree.as_deref(), Some("tree"));
    }

    #[test]
    fn the_root_of_a_process_is_in_use() {
        assert!(is_root_of_a_process(Path::new("/")));
        let temp = tempfile::tempdir().unwrap();
        assert!(!is_root_of_a_process(temp.path()));
    }
}
