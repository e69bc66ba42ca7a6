//! The copy of an ephemeral root. systemd-nspawn creates it, and leaves it behind when it is killed.

use std::fs;
use std::io;
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
    /// Whether a path has a name that systemd-nspawn gives to copies and is in the directory of this start's copies.
    fn is_copy(&self, path: &Path) -> bool {
        let named = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(".#"));
        named && path.parent() == Some(&self.directory)
    }

    /// Removes the copy of a systemd-nspawn that was killed before it reported the copy's name. systemd-nspawn locks the name
    /// before it copies anything, and the lock ends with it. So a copy in this directory that was begun after the launch spec was
    /// written, and whose lock no process holds, is a leftover.
    fn remove_nameless(&self, ordered_at: Option<SystemTime>) -> io::Result<()> {
        let dead = nspawn_lock::dead(ordered_at, &self.directory, |name| {
            let copy = name.strip_prefix(".#")?.strip_suffix(".lck")?;
            is_random(copy).then(|| copy.to_owned())
        })?;
        dead.into_iter()
            .map(|(_held, _, copy)| remove(&self.directory.join(copy)))
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

/// Whether systemd-nspawn makes up such a name for a copy.
fn is_random(copy: &str) -> bool {
    let random = copy
        .strip_prefix(".#machine.")
        .and_then(|rest| rest.get(rest.len().checked_sub(16)?..));
    random.is_some_and(|random| random.bytes().all(|byte| byte.is_ascii_hexdigit()))
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
        EphemeralCopy { directory }
            .release(&start.context())
            .unwrap();
    }

    #[test]
    fn unrecorded_copies_are_removed_if_unlocked_and_newer_than_the_launch_spec() {
        let start = Start::new();
        let copies = start.directory("images");
        let lease = EphemeralCopy {
            directory: copies.clone(),
        };
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
        let other = make(".#machine.backup");
        let held = nspawn_lock::take(&lock(&alive)).unwrap();
        lease.release(&start.context()).unwrap();
        for copy in [&early, &alive, &other] {
            assert!(copy.exists() && lock(copy).exists(), "{}", copy.display());
        }
        for copy in [&dead, &image] {
            assert!(!copy.exists() && !lock(copy).exists(), "{}", copy.display());
        }
        drop(held);
        lease.release(&start.context()).unwrap();
        assert!(!alive.exists());
    }
}
