//! Resolves a path inside a root file system as it resolves in the container: a link that begins with `/` starts at the
//! root of the tree, and `..` does not go above it. Images are untrusted, so no path in one may be looked up on the
//! host in any other way. Resolves links by reading them; opens and changes nothing.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// The directory in which systemd-nspawn makes the temporary copy of an ephemeral root: the parent of the root, or the
/// root itself where it is a mount point.
pub fn copy_place(root: &Path) -> PathBuf {
    let parent = root.parent().unwrap_or(root);
    let device = |path: &Path| path.metadata().map(|about| about.dev()).ok();
    match root.is_dir() && device(root) != device(parent) {
        true => root.to_owned(),
        false => parent.to_owned(),
    }
}

/// The number of links that the kernel follows.
const MAX_LINKS: usize = 40;

/// The result of resolving a path inside a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The path below the root, without links.
    pub below: PathBuf,
    /// Whether it exists.
    pub exists: bool,
}

/// Resolves `path` inside the tree at `root`, whether it exists or not. `None` where links form a loop.
pub fn resolve_in_root(root: &Path, path: &Path) -> Option<Resolved> {
    let mut below = PathBuf::new();
    // How many components at the end of `below` do not exist.
    let mut missing = 0_usize;
    let mut links = 0;
    let mut pending: VecDeque<OsString> = parts(path);
    while let Some(part) = pending.pop_front() {
        if part == ".." {
            below.pop();
            missing = missing.saturating_sub(1);
            continue;
        }
        let next = below.join(&part);
        let here = root.join(&next);
        let about = match missing {
            0 => here.symlink_metadata().ok(),
            _ => None,
        };
        if !about.as_ref().is_some_and(|about| about.is_symlink()) {
            missing += usize::from(about.is_none());
            below = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = here.read_link().ok()?;
        if target.is_absolute() {
            below = PathBuf::new();
        }
        let mut before = parts(&target);
        before.append(&mut pending);
        pending = before;
    }
    Some(Resolved {
        below,
        exists: missing == 0,
    })
}

/// The host path of `path` inside the tree at `root`, if it exists.
pub fn existing_path(root: &Path, path: &Path) -> Option<PathBuf> {
    resolve_in_root(root, path)
        .filter(|resolved| resolved.exists)
        .map(|resolved| root.join(resolved.below))
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::plain("/srv/data", "srv/data", true)]
    #[case::missing("/srv/more/deep", "srv/more/deep", false)]
    #[case::absolute_link("/abs/data", "srv/data", true)]
    #[case::relative_link("/lib", "usr/lib", true)]
    #[case::dangling("/gone/x", "elsewhere/y/x", false)]
    #[case::dangling_itself("/gone", "elsewhere/y", false)]
    #[case::above_the_root("/../../up/srv", "srv", true)]
    #[case::parent_of_a_missing_directory("/no/../srv", "srv", true)]
    #[case::below_a_file("/file/x", "file/x", false)]
    #[case::the_root("/", "", true)]
    fn a_path_stays_in_its_tree(#[case] path: &str, #[case] below: &str, #[case] exists: bool) {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        fs::create_dir_all(root.join("srv/data")).unwrap();
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        symlink("/srv", root.join("abs")).unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("/elsewhere/y", root.join("gone")).unwrap();
        symlink("../../../..", root.join("up")).unwrap();
        let found = resolve_in_root(root, Path::new(path)).unwrap();
        assert_eq!(
            (found.below.as_path(), found.exists),
            (Path::new(below), exists)
        );
        assert_eq!(
            existing_path(root, Path::new(path)),
            exists.then(|| root.join(below))
        );
    }

    #[test]
    fn circular_links_do_not_resolve() {
        let temp = tempfile::tempdir().unwrap();
        symlink("b", temp.path().join("a")).unwrap();
        symlink("a", temp.path().join("b")).unwrap();
        assert_eq!(resolve_in_root(temp.path(), Path::new("/a/x")), None);
    }
}
