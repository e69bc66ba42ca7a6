//! Mount namespaces of other processes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// A mount namespace other than that of this process. As long as it is open, it exists, and what is mounted in it is in use.
#[derive(Debug)]
pub struct MountNamespace(File);

impl MountNamespace {
    /// That of a process, which must not have been waited for. That of this process is refused, so that nothing is ever mounted there.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let of = |process: &str| File::open(format!("/proc/{process}/ns/mnt"));
        let number = |file: &File| file.metadata().map(|about| (about.dev(), about.ino()));
        let its = of(&pid.to_string())?;
        if number(&its)? == number(&of("self")?)? {
            return Err(io::Error::other("it is the mount namespace of the host"));
        }
        Ok(Self(its))
    }

    /// Does something in the namespace, in a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let entered = || {
            // A namespace can be entered only by a thread that shares root and working directory with no other.
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNS)?;
            work()
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().spawn_scoped(scope, entered)?;
            thread.join().unwrap_or_else(|_| {
                Err(io::Error::other(
                    "the thread in the mount namespace has panicked",
                ))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_namespace_is_refused() {
        let me = nix::unistd::getpid().as_raw();
        let error = MountNamespace::of_process(me).unwrap_err();
        assert!(error.to_string().contains("of the host"), "{error}");
    }
}
