//! What a root file system must contain for systemd-nspawn to accept it, looked up inside the tree. Reports what is
//! missing and leaves the decision to the caller.

use std::path::Path;

use crate::container::Mode;
use crate::rootfs_path::RootDir;

/// Where systemd-nspawn looks for the init to boot.
const INITS: [&str; 3] = [
    "usr/lib/systemd/systemd",
    "lib/systemd/systemd",
    "sbin/init",
];
const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];

/// The first thing that the tree lacks to be started in this mode.
pub(super) fn missing_os_files(root: &RootDir, mode: Mode) -> Option<&'static str> {
    let entry = |path: &str| root.entry(Path::new(path));
    let file = |path: &&str| entry(path).is_some_and(|found| found.metadata().is_file());
    match mode {
        Mode::Plain | Mode::ProcessTwo => {
            let usr = entry("usr").is_some_and(|found| found.metadata().is_dir());
            (!usr).then_some("the directory usr")
        }
        Mode::Boot if !OS_RELEASE.iter().any(file) => Some("etc/os-release and usr/lib/os-release"),
        Mode::Boot if !INITS.iter().any(file) => {
            Some("an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init)")
        }
        Mode::Boot => None,
    }
}
