//! Removes a directory tree that a container has made. Its depth is not limited, so nothing here recurses: the standard library's
//! `remove_dir_all` needs stack and a descriptor for every level, and an overflow would abort the whole process. Follows no link.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Removes the tree at this path, which is not in use any more. Every directory is moved to the top of the tree before it is
/// emptied, so the tree gets flatter and two descriptors are enough. Fails at the first thing that can't be removed.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let mut top = Dir::open(path, DIRECTORY, Mode::empty())?;
    let mut number = 0_u64;
    loop {
        let mut pending = remove_files(&mut top)?;
        if pending.is_empty() {
            return fs::remove_dir(path);
        }
        while let Some(name) = pending.pop() {
            let mut directory = match Dir::openat(&top, &*name, DIRECTORY, Mode::empty()) {
                Ok(directory) => directory,
                // An empty directory that was replaced when another got its name.
                Err(Errno::ENOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            for inner in remove_files(&mut directory)? {
                pending.push(move_up(&directory, &inner, &top, &mut number)?);
            }
            unlinkat(&top, &*name, UnlinkatFlags::RemoveDir)?;
        }
    }
}

/// Removes everything in a directory but directories, and returns the names of those.
fn remove_files(directory: &mut Dir) -> io::Result<Vec<CString>> {
    // A stream of its own, because names are removed while it is read.
    let names = openat(directory.as_fd(), ".", DIRECTORY, Mode::empty())?;
    let mut directories = Vec::new();
    for entry in Dir::from_fd(names)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        match unlinkat(directory.as_fd(), name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(Errno::EISDIR) => directories.push(name.to_owned()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(directories)
}

/// Moves a directory to the top under a new name, and returns that.
fn move_up(from: &Dir, name: &CStr, top: &Dir, number: &mut u64) -> io::Result<CString> {
    loop {
        let new = CString::new(format!(".removed.{number}"))?;
        *number += 1;
        match renameat(from, name, top, &*new) {
            Ok(()) => return Ok(new),
            // The container has used this name, and what has it is removed later.
            Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::mkdirat;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_is_removed_and_nothing_outside() {
        let temp = tempfile::tempdir().unwrap();
        let outside = temp.path().join("outside");
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        let tree = temp.path().join("tree");
        for directory in ["a/b/c", "a/d", ".removed.0/x", ".removed.1"] {
            fs::create_dir_all(tree.join(directory)).unwrap();
        }
        fs::write(tree.join(".removed.2"), "").unwrap();
        fs::write(tree.join("a/b/file"), "").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
    }

    #[test]
    fn a_link_in_place_of_the_tree_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("other")).unwrap();
        symlink("other", temp.path().join("tree")).unwrap();
        remove_tree(&temp.path().join("tree")).unwrap_err();
        assert!(temp.path().join("other").exists());
    }

    #[test]
    fn a_tree_deeper_than_the_stack_is_removed() {
        const DEPTH: usize = 3_000;
        let temp = tempfile::tempdir().unwrap();
        let tree = temp.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at = Dir::open(&tree, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..DEPTH {
            mkdirat(&at, "d", Mode::from_bits_truncate(0o755)).unwrap();
            at = Dir::openat(&at, "d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        let removed = tree.clone();
        let thread = std::thread::Builder::new().stack_size(64 * 1024);
        let thread = thread.spawn(move || remove_tree(&removed)).unwrap();
        thread.join().unwrap().unwrap();
        assert!(!tree.exists());
    }
}
