//! Failpoints: steps at which a test can pause a process of this program and kill it. They exist in debug builds only; a release
//! build contains none. A process that reaches a step looks for a socket of that name in the directory `<state_dir>.pause`. If a
//! test listens there, the process sends its subcommand and pid, and continues when the connection is closed. Uses no environment
//! variable and no clock: supervisors have no environment, and a test needs no clock.

use std::path::Path;

/// Where this program can be paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failpoint {
    /// Plugin: the directory of the start has been created, the launch spec has not been written.
    BeforeOrder,
    /// Plugin: the launch spec has been written, the supervisor has not been started.
    OrderWritten,
    /// Supervisor: it has done nothing yet.
    Supervising,
    /// Supervisor: the cgroup has been created, if there is one.
    CgroupMade,
    /// Exec shim (`enter`): the first mount has been made in its own mount namespace, if it makes any.
    Mounting,
    /// Exec shim (`enter`): about to become systemd-nspawn.
    Entered,
    /// Supervisor: systemd-nspawn has been started, nothing has been received from it.
    Spawned,
    /// Supervisor: what needs no container of its network has been made.
    NetworkPrepared,
    /// Supervisor: the container has been connected to its network.
    NetworkConnected,
    /// Supervisor: systemd-nspawn has reported the leader, nothing about it has been recorded.
    Heard,
    /// Supervisor: the start has been recorded, but not reported.
    Recorded,
    /// Supervisor: a signal is about to be sent.
    Signalling,
    /// Supervisor: a signal has been sent, the request has not been answered.
    Signalled,
    /// Supervisor: about to kill the container.
    Killing,
    /// Supervisor: the container's PID 1 has exited, and nothing of that is recorded.
    Exited,
    /// Supervisor: the exit has been recorded, but not reported.
    EndRecorded,
    /// Supervisor: the exit has been reported, nothing has been released.
    EndTold,
    /// Supervisor: about to release the resources of a container that has exited.
    Releasing,
    /// Supervisor: about to wait, because another process holds an exclusive lock on the tree that it may share.
    TreeBusy,
    /// Supervisor or plugin: the lock that a killed systemd-nspawn has left behind is held, its file has not been removed.
    TreeLocked,
    /// Plugin: a removal is about to wait for a supervisor that is releasing resources.
    AwaitingRelease,
    /// Plugin: the leftovers of a start are about to be removed.
    Removing,
    /// Plugin: a container's record has been read, its supervisor has not been contacted.
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
            Self::Mounting => "mounting",
            Self::Entered => "entered",
            Self::Spawned => "spawned",
            Self::NetworkPrepared => "network_prepared",
            Self::NetworkConnected => "network_connected",
            Self::Heard => "heard",
            Self::Recorded => "recorded",
            Self::Signalling => "signalling",
            Self::Signalled => "signalled",
            Self::Killing => "killing",
            Self::Exited => "exited",
            Self::EndRecorded => "end_recorded",
            Self::EndTold => "end_told",
            Self::Releasing => "releasing",
            Self::TreeBusy => "tree_busy",
            Self::TreeLocked => "tree_locked",
            Self::AwaitingRelease => "awaiting_release",
            Self::Removing => "removing",
            Self::Recovering => "recovering",
        }
    }
}

/// The file in the same directory with which a test simulates an older kernel.
pub const OLD_KERNEL: &str = "old_kernel";

/// Whether to behave as on a kernel that reports an exit status only to the parent.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn kernel_is_old(_: &Path) -> bool {
    false
}

/// Whether to behave as on a kernel that reports an exit status only to the parent.
#[cfg(debug_assertions)]
pub fn kernel_is_old(task_dir: &Path) -> bool {
    directory(task_dir).is_some_and(|directory| directory.join(OLD_KERNEL).exists())
}

/// The file in the same directory with which a test makes the supervisors' waits for events fail.
pub const WAITS_FAIL: &str = "waits_fail";

/// Whether to behave as if waiting for events failed.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn waits_fail(_: &Path) -> bool {
    false
}

/// Whether to behave as if waiting for events failed.
#[cfg(debug_assertions)]
pub fn waits_fail(task_dir: &Path) -> bool {
    directory(task_dir).is_some_and(|directory| directory.join(WAITS_FAIL).exists())
}

/// Pauses the process here if a test listens.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hit(_: impl AsRef<Path>, _: Failpoint) {}

/// Pauses the process here if a test listens. Blocks the thread, as the step that it stands for would.
#[cfg(debug_assertions)]
pub fn hit(task_dir: impl AsRef<Path>, failpoint: Failpoint) {
    let stream = directory(task_dir.as_ref()).and_then(|directory| {
        std::os::unix::net::UnixStream::connect(directory.join(failpoint.name())).ok()
    });
    if let Some(stream) = stream {
        hold(stream);
    }
}

#[cfg(debug_assertions)]
fn directory(task_dir: &Path) -> Option<std::path::PathBuf> {
    let state = task_dir.parent()?;
    let mut name = state.file_name()?.to_owned();
    name.push(".pause");
    Some(state.with_file_name(name))
}

/// Sends the subcommand and the pid of the process, and waits until the connection is closed.
#[cfg(debug_assertions)]
fn hold(mut stream: std::os::unix::net::UnixStream) {
    use std::io::{Read as _, Write as _};
    let expected = std::env::args_os().nth(1).unwrap_or_default();
    let written = writeln!(stream, "{} {}", expected.display(), std::process::id());
    // Any error on the connection means that the test has ended.
    if written.is_ok() {
        let _ = stream.read(&mut [0]);
    }
}
