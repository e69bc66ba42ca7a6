//! What a root file system has to hold before systemd-nspawn takes it, looked up inside the tree: a link there that begins
//! with `/` leads to the tree's own root, as it will in the container. Says what is missing; decides nothing.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use crate::container::Mode;

/// As many links as the kernel follows.
const MAX_LINKS: usize = 40;

/// Where systemd-nspawn looks for the init to boot.
const INITS: [&str; 3] = [
    "usr/lib/systemd/systemd",
    "lib/systemd/systemd",
    "sbin/init",
];
const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];

/// What the tree at `root` lacks to be started in this mode.
pub(super) fn lacks(root: &Path, mode: Mode) -> Option<&'static str> {
    let file = |path: &&str| resolve(root, Path::new(path)).is_some_and(|found| found.is_file());
    match mode {
        Mode::Plain | Mode::ProcessTwo => {
            let usr = resolve(root, Path::new("usr")).is_some_and(|found| found.is_dir());
            (!usr).then_some("the directory usr")
        }
        Mode::Boot if !OS_RELEASE.iter().any(file) => Some("etc/os-release and usr/lib/os-release"),
        Mode::Boot if !INITS.iter().any(file) => {
            Some("an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init)")
        }
        Mode::Boot => None,
    }
}

/// The host path of `path` inside the tree, if it exists.
pub(super) fn resolve(root: &Path, path: &Path) -> Option<PathBuf> {
    let mut found = root.to_owned();
    let mut depth = 0_usize;
    let mut links = 0;
    let mut ahead: VecDeque<OsString> = parts(path);
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            if depth > 0 {
                found.pop();
                depth -= 1;
            }
            continue;
        }
        let next = found.join(&part);
        if !next.symlink_metadata().ok()?.is_symlink() {
            found = next;
            depth += 1;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = next.read_link().ok()?;
        if target.is_absolute() {
            found = root.to_owned();
            depth = 0;
        }
        let mut before = parts(&target);
        before.append(&mut ahead);
        ahead = before;
    }
    Some(found)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
            _ => None,
        })
        .collect()
}
