//! How the ids of files are mapped on a mount: a user namespace that no process is in, of which only the mapping is used.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::ffi;

/// A range of ids on the file system, and the ids as which they appear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first id on the file system.
    pub stored: u32,
    /// The first id as which it appears, in the user namespace of the host.
    pub shown: u32,
    /// How many ids.
    pub count: u32,
}

/// The mapping of users and that of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// Of users.
    pub users: Vec<Extent>,
    /// Of groups.
    pub groups: Vec<Extent>,
}

impl IdMap {
    /// A user namespace with this mapping. Needs CAP_SYS_ADMIN on the host.
    pub fn user_namespace(&self) -> io::Result<OwnedFd> {
        let pid = ffi::start_in_user_namespace()?;
        let made = self.write_for(pid);
        // Until it has been waited for, the pid is that of no other process.
        let process = Pid::from_raw(pid);
        let _ = kill(process, Signal::SIGKILL);
        let _ = waitpid(process, None);
        made
    }

    fn write_for(&self, pid: i32) -> io::Result<OwnedFd> {
        let namespace = File::open(format!("/proc/{pid}/ns/user"))?;
        fs::write(format!("/proc/{pid}/uid_map"), lines(&self.users))?;
        fs::write(format!("/proc/{pid}/gid_map"), lines(&self.groups))?;
        Ok(namespace.into())
    }
}

/// As the kernel takes them: the first id within, the first outside, how many.
fn lines(extents: &[Extent]) -> String {
    let mut text = String::new();
    for Extent {
        stored,
        shown,
        count,
    } in extents
    {
        let _ = writeln!(text, "{stored} {shown} {count}");
    }
    text
}
