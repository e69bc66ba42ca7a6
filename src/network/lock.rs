//! A lock for what all containers of a host share: the bridges of zones and the firewall's table, which are removed when nobody uses them any
//! more. It is on the network namespace itself: it leaves no file, no two namespaces share it, and it ends with the process.

use std::fs::File;
use std::io;

use nix::fcntl::{Flock, FlockArg};

/// Keeps everybody else from using and from removing what is shared.
pub(super) fn exclusive() -> io::Result<Flock<File>> {
    lock(FlockArg::LockExclusive)
}

/// Keeps everybody else from removing what is shared.
pub(super) fn shared() -> io::Result<Flock<File>> {
    lock(FlockArg::LockShared)
}

fn lock(kind: FlockArg) -> io::Result<Flock<File>> {
    // That of this thread, which may have entered another one.
    let namespace = File::open("/proc/thread-self/ns/net")?;
    Flock::lock(namespace, kind).map_err(|(_, error)| error.into())
}
