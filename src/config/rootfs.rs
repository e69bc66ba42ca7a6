//! What a root file system must contain for systemd-nspawn to accept it, looked up inside the tree. Reports what is
//! missing and leaves the decision to the caller.

use std::path::Path;

use crate::container::Mode;
use crate::rootfs_path::existing_path;

/// Where systemd-nspawn looks for the init to boot.
const INITS: [&str; 3] = [
    "usr/lib/systemd/systemd",
    "lib/systemd/systemd",
    "sbin/init",
];
const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];

/// The first thing that the tree at `root` lacks to be started in this mode.
pub(super) fn missing_os_files(root: &Path, mode: Mode) -> Option<&'static str> {
    let file =
        |path: &&str| existing_path(root, Path::new(path)).is_some_and(|found| found.is_file());
    match mode {
        Mode::Plain | Mode::ProcessTwo => {
            let usr = existing_path(root, Path::new("usr")).is_some_and(|found| found.is_dir());
            (!usr).then_some("the directory usr")
        }
        Mode::Boot if !OS_RELEASE.iter().any(file) => Some("etc/os-release and usr/lib/os-release"),
        Mode::Boot if !INITS.iter().any(file) => {
            Some("an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init)")
        }
        Mode::Boot => None,
    }
}
