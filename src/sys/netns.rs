//! Network namespaces that another program has made, by the path of their file: whether the path is one, its addresses, and entering it.
//! The host's own network namespace is refused, so that nothing here ever acts on it.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::process::is_alive;
use super::procfs::parse_addresses;
use crate::container::Process;

/// A network namespace other than the host's.
#[derive(Debug)]
pub struct Netns(File);

/// Why a path is not such a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The path does not exist.
    #[error("it does not exist (any more)")]
    Missing,
    /// Another kind of file: `ip netns` and Nomad mount a namespace over a plain file, which a reboot uncovers.
    #[error("it is not a network namespace but a file of another kind")]
    OtherFile,
    /// The namespace of the host, or of this process.
    #[error("it is the network namespace of the host")]
    OfHost,
    /// Something else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Netns {
    /// The network namespace that this path represents.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let opened = fs::OpenOptions::new()
            .read(true)
            // A FIFO would block.
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => NetnsError::Missing,
            _ => NetnsError::Io(error),
        })?;
        let system = fstatfs(&file).map_err(io::Error::from)?;
        if system.filesystem_type() != NSFS_MAGIC {
            return Err(NetnsError::OtherFile);
        }
        let its = number(&file.metadata()?);
        let of = |process: &str| fs::metadata(format!("/proc/{process}/ns/net"));
        if its == number(&of("thread-self")?) {
            return Err(NetnsError::OfHost);
        }
        // Not readable without privileges, and a process that can't read it can't enter a namespace either.
        match of("1") {
            Ok(of_init) if its == number(&of_init) => Err(NetnsError::OfHost),
            _ => Ok(Self(file)),
        }
    }

    /// That of a process, which is missing once the process has exited.
    pub fn of_process(process: Process) -> Result<Self, NetnsError> {
        let namespace = Self::open(Path::new(&format!("/proc/{}/ns/net", process.pid)));
        // Checked last: then it was opened before a later process could have the pid.
        match is_alive(process) {
            true => namespace,
            false => Err(NetnsError::Missing),
        }
    }

    /// Moves this thread into it.
    pub fn enter(&self) -> Result<(), NetnsError> {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|error| match error {
            // A namespace of another kind.
            nix::Error::EINVAL => NetnsError::OtherFile,
            error => NetnsError::Io(error.into()),
        })
    }

    /// Its addresses, without loopback ones.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, NetnsError> {
        // This thread stays where it is.
        let read = || {
            self.enter()?;
            let text = |file: &str| {
                let path = format!("/proc/thread-self/net/{file}");
                match fs::read_to_string(path) {
                    // A kernel without IPv6 does not have the file.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
                    other => other,
                }
            };
            Ok(parse_addresses(&text("fib_trie")?, &text("if_inet6")?))
        };
        thread::scope(|scope| {
            let reader = thread::Builder::new().spawn_scoped(scope, read)?;
            reader.join().unwrap_or_else(|_| {
                let text = "the thread that reads its addresses has panicked";
                Err(io::Error::other(text).into())
            })
        })
    }
}

fn number(about: &fs::Metadata) -> (u64, u64) {
    (about.dev(), about.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &str) -> NetnsError {
        Netns::open(Path::new(path)).unwrap_err()
    }

    #[test]
    fn what_is_no_namespace_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let plain = temp.path().join("plain");
        fs::write(&plain, "").unwrap();
        let fifo = temp.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&plain, &fifo, temp.path()] {
            let error = refusal(path.to_str().unwrap());
            assert!(matches!(error, NetnsError::OtherFile), "{path:?}: {error}");
        }
        let none = temp.path().join("none");
        assert!(matches!(
            refusal(none.to_str().unwrap()),
            NetnsError::Missing
        ));
    }

    #[test]
    fn the_hosts_own_namespace_is_refused() {
        for process in ["self", "thread-self"] {
            let error = refusal(&format!("/proc/{process}/ns/net"));
            assert!(matches!(error, NetnsError::OfHost), "{error}");
        }
    }

    #[test]
    fn a_namespace_of_another_kind_is_refused() {
        let other = Netns::open(Path::new("/proc/self/ns/uts")).unwrap();
        for error in [other.enter().unwrap_err(), other.addresses().unwrap_err()] {
            assert!(matches!(error, NetnsError::OtherFile), "{error}");
        }
    }
}
