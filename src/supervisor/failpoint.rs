//! Failpoints: steps at which a test can pause this program and kill one of its processes. In debug builds alone; a release has
//! none of it. A step that is reached looks for a socket of its name in the directory `<state_dir>.pause`. If a test listens there,
//! the process tells who it is, and goes on when the connection is closed. No environment, no clock: supervisors have none of the
//! first, and a test needs none of the second.

use super::task_dir::TaskDir;

/// Where this program can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failpoint {
    /// Plugin: the directory of the start is made, the order is not written.
    BeforeOrder,
    /// Plugin: the order is written, the supervisor is not started.
    OrderWritten,
    /// Supervisor: it has done nothing yet.
    Supervising,
    /// Supervisor: the control group is made, where there are any.
    CgroupMade,
    /// `enter`: about to become systemd-nspawn.
    Entered,
    /// Supervisor: systemd-nspawn is started, nothing of it was heard.
    Spawned,
    /// Supervisor: systemd-nspawn has told the leader, nothing of it is recorded.
    Heard,
    /// Supervisor: the start is recorded, nobody knows of it.
    Recorded,
    /// Supervisor: a signal is about to be sent.
    Signalling,
    /// Supervisor: a signal has been sent, whoever asked for it does not know.
    Signalled,
    /// Supervisor: about to end the container by force.
    Killing,
    /// Supervisor: a child has ended and has not been waited for.
    Exited,
    /// Supervisor: the end is recorded, nobody knows of it.
    EndRecorded,
    /// Supervisor: the end is told, nothing is freed.
    EndTold,
    /// Supervisor: about to wait, because the tree that it may share is locked by another for itself.
    TreeBusy,
    /// Supervisor or plugin: the lock that a killed systemd-nspawn has left is taken, its file is not removed.
    TreeLocked,
    /// Plugin: what is left of a start is about to be removed.
    Removing,
    /// Plugin: a container's record was read, its supervisor was not asked.
    Recovering,
}

impl Failpoint {
    /// The name of its socket.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeOrder => "before_order",
            Self::OrderWritten => "order_written",
            Self::Supervising => "supervising",
            Self::CgroupMade => "cgroup_made",
            Self::Entered => "entered",
            Self::Spawned => "spawned",
            Self::Heard => "heard",
            Self::Recorded => "recorded",
            Self::Signalling => "signalling",
            Self::Signalled => "signalled",
            Self::Killing => "killing",
            Self::Exited => "exited",
            Self::EndRecorded => "end_recorded",
            Self::EndTold => "end_told",
            Self::TreeBusy => "tree_busy",
            Self::TreeLocked => "tree_locked",
            Self::Removing => "removing",
            Self::Recovering => "recovering",
        }
    }
}

/// The file beside those sockets by which a test asks for an older kernel.
pub const OLD_KERNEL: &str = "old_kernel";

/// Whether to know no more than on a kernel that tells a process's end to its parent alone.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn kernel_is_old(_: &TaskDir) -> bool {
    false
}

/// Whether to know no more than on a kernel that tells a process's end to its parent alone.
#[cfg(debug_assertions)]
pub fn kernel_is_old(task_dir: &TaskDir) -> bool {
    directory(task_dir).is_some_and(|directory| directory.join(OLD_KERNEL).exists())
}

/// Holds the process here if a test waits for it.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hit(_: &TaskDir, _: Failpoint) {}

/// Holds the process here if a test waits for it. Blocks the thread, as what it stands for would.
#[cfg(debug_assertions)]
pub fn hit(task_dir: &TaskDir, failpoint: Failpoint) {
    let stream = directory(task_dir).and_then(|directory| {
        std::os::unix::net::UnixStream::connect(directory.join(failpoint.name())).ok()
    });
    if let Some(stream) = stream {
        hold(stream);
    }
}

#[cfg(debug_assertions)]
fn directory(task_dir: &TaskDir) -> Option<std::path::PathBuf> {
    let state = task_dir.path().parent()?;
    let mut name = state.file_name()?.to_owned();
    name.push(".pause");
    Some(state.with_file_name(name))
}

/// Tells the process's life and pid, and waits for the end of the connection.
#[cfg(debug_assertions)]
fn hold(mut stream: std::os::unix::net::UnixStream) {
    use std::io::{Read as _, Write as _};
    let expected = std::env::args_os().nth(1).unwrap_or_default();
    let written = writeln!(stream, "{} {}", expected.display(), std::process::id());
    // Whatever goes wrong on the line is the test's end.
    if written.is_ok() {
        let _ = stream.read(&mut [0]);
    }
}
