//! An exec session: runs a command in a container that is already up. Four processes, each forked by the one before it:
//!
//! | process | where | what it does |
//! |---|---|---|
//! | `outside` | on the host, privileged | watches the plugin and the session, and ends the session |
//! | `entrance` | in the container's namespaces, but not visible in its pid namespace | gives up every privilege that the container does not have; ends when it has forked the next one |
//! | `reaper` | in the container | parent of the command and of all processes that the command leaves |
//! | command | in the container | |
//!
//! A process becomes visible in the container only when it has no more privileges than the container, so a container that may trace
//! processes gains nothing. None of them can be traced or dumps core before the command is executed.

mod account;
mod command;
mod confine;
mod entrance;
mod outside;
mod reaper;

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use nspawn_init::session_spec::{SessionEvent, SessionSpec};
use nspawn_init::{StartError, Step};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::command::start_error;

pub(crate) fn main() -> ExitCode {
    outside::run()
}

/// The streams of the command.
enum Streams {
    Pipes {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// The slave side of a terminal.
    Terminal(OwnedFd),
}

/// Where a process of the session reports to.
struct Reports(OwnedFd);

impl Reports {
    /// If `outside` is gone, so is the session; that is noticed elsewhere.
    fn send(&self, event: &SessionEvent) {
        self.send_with(event, &[]);
    }

    fn send_with(&self, event: &SessionEvent, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let message = packets::encode(event);
        let _ = packets::send(&self.0, &message, descriptors);
    }
}

/// A [`StartError`] of a system call.
fn failed<E: Into<std::io::Error>>(step: Step, file: &str) -> impl FnOnce(E) -> StartError {
    move |error| start_error(step, file, &error.into())
}

/// Waits until one of the descriptors is readable or closed by its peer, or until `limit` milliseconds have passed. Returns for each
/// whether it is.
fn wait<const N: usize>(descriptors: [&OwnedFd; N], limit: Option<i64>) -> [bool; N] {
    let mut polled = descriptors.map(|descriptor| {
        PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN | PollFlags::RDHUP)
    });
    let limit = limit.map(|milliseconds| Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    });
    while let Err(Errno::INTR) = poll(&mut polled, limit.as_ref()) {}
    polled.map(|descriptor| !descriptor.revents().is_empty())
}

/// What a session begins with.
struct Begin {
    spec: SessionSpec,
    /// The container's first process.
    leader: OwnedFd,
    /// Without a terminal.
    pipes: Option<[OwnedFd; 3]>,
}
