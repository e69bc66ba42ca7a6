//! What a root file system must contain for systemd-nspawn to accept it, looked up inside the tree. Reports what is
//! missing and leaves the decision to the caller.

use std::io;
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

/// The first thing that the tree lacks to be started in this mode. Fails if that can't be found out.
pub(super) fn missing_os_files(root: &RootDir, mode: Mode) -> io::Result<Option<&'static str>> {
    Ok(match mode {
        Mode::Plain | Mode::ProcessTwo => {
            let usr = root.entry(Path::new("usr"))?;
            let exists = usr.is_some_and(|found| found.metadata().is_dir());
            (!exists).then_some("the directory usr")
        }
        Mode::Boot if !has_one_of(root, &OS_RELEASE)? => {
            Some("etc/os-release and usr/lib/os-release")
        }
        Mode::Boot if !has_one_of(root, &INITS)? => {
            Some("an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init)")
        }
        Mode::Boot => None,
    })
}

/// Whether at least one of these regular files exists.
fn has_one_of(root: &RootDir, files: &[&str]) -> io::Result<bool> {
    for file in files {
        let found = root.entry(Path::new(file))?;
        if found.is_some_and(|found| found.metadata().is_file()) {
            return Ok(true);
        }
    }
    Ok(false)
}
