//! What systemd-nspawn mounts for a machine below `/run/systemd/nspawn`. It leaves the mounts behind when it is killed, and from
//! version 256 on they make the next start of the same machine name fail.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::{Context, Lease};

const BASE: &str = "/run/systemd/nspawn";

/// The mounts and directories named after the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NspawnMounts {}

impl Lease for NspawnMounts {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        remove_leaked_mounts(context.machine);
        // Left behind where `/run` is not a tmpfs. Only an empty directory is removed.
        let _ = fs::remove_dir(Path::new(BASE).join("propagate").join(context.machine));
        Ok(())
    }
}

/// Removes the mounts of this machine that would block its start.
pub fn remove_leaked_mounts(machine: &str) {
    for path in mounts_of(machine) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&path);
    }
    // The directory around it, which is new in version 262. Only an empty one is removed.
    let _ = fs::remove_dir(Path::new(BASE).join(machine));
}

fn mounts_of(machine: &str) -> [PathBuf; 2] {
    let base = Path::new(BASE);
    [
        base.join("unix-export").join(machine),
        base.join(machine).join("unix-export"),
    ]
}
