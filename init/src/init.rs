//! The init mode: runs as the container's PID 1 with the command as its child. Forwards every signal to the command, reaps all children,
//! and exits when the command does. Reports wait statuses unchanged and does not interpret them.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nspawn_init::{InitEvent, StartError, Step};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, fchdir, kill_process, wait};
use rustix_libc_wrappers::process::SignalExt;

use crate::channel::Channel;
use crate::command::{execute, start_error};
use crate::{Command as Task, wait_for_start};

/// The container's PID 1 while its command runs.
pub(crate) struct Init {
    channel: Channel,
    signals: SignalFd,
    command: Pid,
}

/// Starts the command and reports that it runs. On an error nothing has been reported; the caller gets the channel back to do so.
pub(crate) fn start(mut channel: Channel, task: Task) -> Result<Init, (Channel, StartError)> {
    let home = open(
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok();
    match start_command(&task, &mut channel, home.as_ref()) {
        Ok((signals, command)) => {
            let pid = command.as_raw_pid();
            channel.send(&InitEvent::Running { pid });
            Ok(Init {
                channel,
                signals,
                command,
            })
        }
        Err(start_error) => Err((channel, start_error)),
    }
}

fn start_command(
    task: &Task,
    channel: &mut Channel,
    home: Option<&OwnedFd>,
) -> Result<(SignalFd, Pid), StartError> {
    let fork = |error: nix::Error| start_error(Step::Fork, "", &error.into());
    prctl::set_name(c"nspawn-init").map_err(fork)?;
    // The kernel reparents orphans to PID 1; a process that is not PID 1, as in a test, has to become a subreaper.
    prctl::set_child_subreaper(true).map_err(fork)?;
    let signals = SignalFd::with_flags(
        &SigSet::all(),
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )
    .map_err(fork)?;
    task.prepare()?;
    wait_for_start(channel)?;
    let command = execute(&task.words, &task.environment, |command| {
        let child = command.process_group(0).spawn()?;
        Ok(Pid::from_child(&child))
    })?;
    // Staying in the command's directory would keep that one busy.
    let _ = home.map(fchdir);
    Ok((signals, command))
}

impl Init {
    /// Runs until the command has exited, reports its wait status and returns it.
    pub(crate) fn run(mut self) -> WaitStatus {
        loop {
            let channel = self.poll();
            self.pass_signals_on();
            if let Some(status) = self.reap() {
                self.channel.send(&InitEvent::Ended {
                    status: status.as_raw(),
                });
                self.channel.finish();
                return status;
            }
            if channel.contains(PollFlags::OUT) {
                self.channel.flush();
            } else if !channel.is_empty() {
                // Nothing is requested any more.
                drop(self.channel.next());
            }
        }
    }

    /// Waits for signals and the channel. Returns the poll events of the channel.
    fn poll(&self) -> PollFlags {
        let mut descriptors = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some((socket, flags)) = self.channel.interest() {
            descriptors.push(PollFd::from_borrowed_fd(socket, flags));
        }
        match poll(&mut descriptors, None) {
            Ok(_) => descriptors
                .get(1)
                .map_or(PollFlags::empty(), PollFd::revents),
            // All signals are blocked, so only a debugger can interrupt the poll.
            Err(_) => PollFlags::empty(),
        }
    }

    /// Forwards all pending signals to the command. The command has not been reaped yet, so its pid can't have been reused.
    fn pass_signals_on(&self) {
        while let Ok(Some(information)) = self.signals.read_signal() {
            let number = i32::try_from(information.ssi_signo).unwrap_or_default();
            if number != libc::SIGCHLD {
                send(self.command, number);
            }
        }
    }

    /// Reaps all exited children. Returns the command's wait status if it is among them.
    fn reap(&self) -> Option<WaitStatus> {
        let mut ended = None;
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => ended = Some(status),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return ended,
            }
        }
    }
}

/// Sends a signal to a child that has not been reaped; it may be a zombie. Invalid signal numbers are ignored.
fn send(pid: Pid, number: i32) {
    if let Some(signal) = Signal::from_raw(number) {
        // The only remaining error is EPERM: the program changed its user and the init is not privileged.
        let _ = kill_process(pid, signal);
    }
}
