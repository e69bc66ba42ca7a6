//! The parent of a session's command, inside the container. Adopts every process that the command leaves, so that none becomes a zombie
//! of a first process that does not wait for it, and kills all of them when the session ends.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nspawn_init::session_spec::{SessionEvent, SessionSpec};
use nspawn_init::{StartError, Step};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process};

use super::account::Account;
use super::{Reports, Streams, command, failed, wait};
use crate::raw;

/// Runs the command, reports, and kills what it has left when the session ends; never returns.
pub(super) fn run(spec: &SessionSpec, account: &Account, streams: Streams, reports: &Reports) -> ! {
    let status = match start(spec, account, streams) {
        Ok((command, signals)) => {
            reports.send(&SessionEvent::Running);
            watch(command, &signals, reports);
            kill_all();
            0
        }
        Err(start_error) => {
            let status = start_error.status();
            reports.send(&SessionEvent::Failed(start_error));
            status
        }
    };
    raw::exit(status)
}

/// Starts the command and returns when it has been executed.
fn start(
    spec: &SessionSpec,
    account: &Account,
    streams: Streams,
) -> Result<(Pid, OwnedFd), StartError> {
    let fork = |error: nix::Error| failed(Step::Fork, "")(error);
    prctl::set_name(c"nspawn-exec").map_err(fork)?;
    prctl::set_child_subreaper(true).map_err(fork)?;
    let mut children = SigSet::empty();
    children.add(nix::sys::signal::Signal::SIGCHLD);
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&children, flags).map_err(fork)?;
    let signals = signals
        .as_fd()
        .try_clone_to_owned()
        .map_err(failed(Step::Fork, ""))?;
    // Closed by the execution of the command.
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(failed(Step::Fork, ""))?;
    let child = raw::fork().map_err(failed(Step::Fork, ""))?;
    let Some(child) = child else {
        drop(read);
        let Err(start_error) = command::run(spec, account, streams);
        let message = packets::encode(&start_error);
        let _ = rustix::io::write(&write, &message);
        raw::exit(start_error.status());
    };
    // Copies in this process would keep the other side from seeing the end of the streams.
    drop((streams, write));
    let mut error = Vec::new();
    let _ = fs::File::from(read).read_to_end(&mut error);
    if error.is_empty() {
        return Ok((child, signals));
    }
    let unreadable = |_| failed(Step::Execute, "")(Errno::BADMSG);
    Err(packets::decode(&error).unwrap_or_else(unreadable))
}

/// Until the session is to end.
fn watch(command: Pid, signals: &OwnedFd, reports: &Reports) {
    let mut buffer = [0; 1024];
    loop {
        let [signalled, end] = wait([signals, &reports.0], None);
        if signalled {
            let _ = rustix::io::read(signals, &mut buffer);
            reap(command, reports);
        }
        if end {
            return;
        }
    }
}

/// Waits for all children that have exited, and reports the command if it is among them.
fn reap(command: Pid, reports: &Reports) {
    while let Some((pid, status)) = wait_for_child(WaitOptions::NOHANG) {
        if pid == command {
            let status = status.as_raw();
            reports.send(&SessionEvent::Ended { status });
        }
    }
}

fn wait_for_child(options: WaitOptions) -> Option<(Pid, WaitStatus)> {
    loop {
        match rustix::process::wait(options) {
            Err(Errno::INTR) => {}
            other => return other.ok().flatten(),
        }
    }
}

/// Kills all processes that the command has left. They can't run away: each whose parent ends becomes a child of this process. A child's
/// pid can't be reused before this process has waited for it.
fn kill_all() {
    loop {
        while wait_for_child(WaitOptions::NOHANG).is_some() {}
        let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        let mut children = children.split_whitespace();
        let mut any = false;
        for pid in children.by_ref().filter_map(|word| word.parse().ok()) {
            if let Some(pid) = Pid::from_raw(pid) {
                any = true;
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if !any || wait_for_child(WaitOptions::empty()).is_none() {
            return;
        }
    }
}
