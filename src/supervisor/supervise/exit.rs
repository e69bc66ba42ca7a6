//! The exit of a container: detected, recorded, reported, and its resources released, in this order. Runs in the supervisor
//! process. Does not interpret the evidence; `exit_status` does.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use rustix::process::{WaitOptions, wait};

use super::exit_status::{ExitEvidence, describe, exit_of, predict_nspawn_status};
use super::{LeaderState, NSPAWN_ANNOUNCED_TIMEOUT, NSPAWN_CLEANUP_TIMEOUT, State, Supervisor};
use crate::cgroup::Group;
use crate::cleanup;
use crate::failpoint::{self, Failpoint};
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_messages};
use crate::signal::Signal;
use crate::supervisor::protocol::{Event, StartFailure, StartStep};
use crate::sys::process::ProcessHandle;

impl Supervisor {
    /// The leader to poll, as long as there is something left to learn about its exit. Polled because a systemd-nspawn that was
    /// stopped would not report the exit.
    pub(super) fn leader_poll_fd(&self) -> Option<PollFd<'_>> {
        let leader = self.leader_handle()?;
        let flags = match self.leader {
            LeaderState::Alive => PollFlags::POLLIN,
            // The kernel reports POLLHUP unrequested once the leader has been waited for, and nothing else until then.
            LeaderState::Ended if self.may_end_early() => PollFlags::empty(),
            LeaderState::Ended | LeaderState::Reaped => return None,
        };
        Some(PollFd::new(leader.as_fd(), flags))
    }

    /// Whether the leader's exit is reported before systemd-nspawn exits: systemd-nspawn may take minutes to delete an ephemeral
    /// root. Any other root stays locked until systemd-nspawn has exited.
    fn may_end_early(&self) -> bool {
        !self.exit_reported && self.launch_spec.copies().is_some()
    }

    /// The leader has exited. systemd-nspawn normally exits a few milliseconds later. One that was stopped gets SIGCONT, and one
    /// that still does not exit is killed at [`nspawn_deadline`](Self::nspawn_deadline), unless it may be deleting an ephemeral root.
    pub(super) fn see_leader(&mut self, seen: LeaderState) {
        let ends_now = std::mem::replace(&mut self.leader, seen) == LeaderState::Alive;
        if !ends_now {
            return;
        }
        self.sigcont_nspawn();
        if self.launch_spec.copies().is_none() {
            self.leader_exited_at = Some(Instant::now());
        }
    }

    /// When systemd-nspawn is killed because its container is gone and it has not exited.
    pub(super) fn nspawn_deadline(&self) -> Option<Instant> {
        let limit = match self.nspawn_status {
            None => NSPAWN_CLEANUP_TIMEOUT,
            Some(_) => NSPAWN_ANNOUNCED_TIMEOUT,
        };
        let after_exit = self.leader_exited_at.map(|exited| exited + limit);
        [self.kill_deadline, after_exit].into_iter().flatten().min()
    }

    /// The exit status to assume for systemd-nspawn, once the leader has exited and nothing that systemd-nspawn could add would
    /// change the reported exit.
    pub(super) fn early_exit_status(&self) -> Option<ExitStatus> {
        if !self.may_end_early() || self.leader == LeaderState::Alive {
            return None;
        }
        let by_force = ExitStatus::from_raw(Signal::KILL.number());
        if self.killed || self.command_status.is_some() || self.start_error.is_some() {
            return Some(by_force);
        }
        predict_nspawn_status(self.raw_status()?, self.nspawn_status)
    }

    fn leader_handle(&self) -> Option<&ProcessHandle> {
        match &self.state {
            State::Running { leader, .. } => leader.as_ref(),
            State::Starting { .. } | State::Failing(_) => None,
        }
    }

    /// The leader's raw wait status, if the kernel reports it to processes other than the parent.
    fn raw_status(&self) -> Option<i32> {
        let leader = self.leader_handle()?;
        leader
            .raw_status()
            .filter(|_| !failpoint::kernel_is_old(self.task_dir.path()))
    }

    /// Records the exit and reports it to all clients, once.
    pub(super) fn report_exit(&mut self, status: ExitStatus) {
        if std::mem::replace(&mut self.exit_reported, true) {
            return;
        }
        let group = self.launch_spec.cgroup();
        let exit = exit_of(&ExitEvidence {
            start_error: self.start_error.as_ref(),
            command: self.command_status,
            leader: self.raw_status(),
            reaped: self.reaped,
            nspawn_stderr: &self.task_dir.nspawn_stderr_tail(),
            nspawn: status,
            killed: self.killed,
            nspawn_killed: self.nspawn_killed,
            oom: group.is_some_and(|group| Group::new(group).oom_kills() > 0),
        });
        if let Err(error) = self.task_dir.write_exit(&exit) {
            let _ = writeln!(io::stderr(), "the end can't be recorded: {error}");
        }
        failpoint::hit(&self.task_dir, Failpoint::EndRecorded);
        self.clients.broadcast(&Event::Exited(exit));
        failpoint::hit(&self.task_dir, Failpoint::EndTold);
    }

    /// Reaps every child that has exited; returns the status of systemd-nspawn if it is among them. The leader becomes a child only
    /// after a systemd-nspawn that exited without having waited for it.
    pub(super) fn reap(&mut self) -> Option<ExitStatus> {
        failpoint::hit(&self.task_dir, Failpoint::Exited);
        while let Ok(Some(_)) = self.sockets.signals.read_signal() {}
        let leader = self.leader_handle().map(|leader| leader.process().pid);
        let mut found = None;
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            if pid == self.nspawn.pid {
                found = Some(ExitStatus::from_raw(status.as_raw()));
            } else if Some(pid) == leader {
                self.reaped = Some(status.as_raw());
            }
        }
        found
    }

    /// systemd-nspawn has exited: so has the container, or it is killed now.
    pub(super) fn finish(&mut self, status: ExitStatus) {
        // The last messages may still be queued in the sockets: a short command exits before they have been read.
        self.read_notify_socket();
        self.read_init_channel();
        self.start_if_ready();
        self.task_dir.discard_secrets();
        self.kill_remaining();
        let group = self.launch_spec.cgroup().map(Group::new);
        let running = match &self.state {
            State::Starting { .. } => {
                let failure = self.failed(status);
                self.clients.broadcast(&Event::Failed(failure));
                None
            }
            State::Failing(failure) => {
                self.clients.broadcast(&Event::Failed(failure.clone()));
                None
            }
            State::Running { running, .. } => {
                let running = running.clone();
                self.report_exit(status);
                Some(running)
            }
        };
        if let Some(group) = group {
            group.wait_empty(NSPAWN_CLEANUP_TIMEOUT);
        }
        // Only after systemd-nspawn has exited, so that the last of the two to hold the locks removes the files.
        self.tree = None;
        if !self.nspawn_killed
            && status.signal().is_none()
            && let Err(error) = self.task_dir.write_released()
        {
            let _ = writeln!(
                io::stderr(),
                "the end of systemd-nspawn can't be recorded: {error}"
            );
        }
        if let Err(error) = cleanup::release(&self.task_dir, &self.launch_spec, running.as_deref())
        {
            let _ = writeln!(io::stderr(), "not everything could be freed: {error}");
        }
    }

    /// Why the container did not come up, according to the process that got furthest: systemd-nspawn may never have been executed,
    /// or its own messages give the reason.
    fn failed(&self, status: ExitStatus) -> StartFailure {
        if let Some(refusal) = self.task_dir.failure() {
            return StartFailure::new(StartStep::Nspawn, refusal.cause, refusal.reason);
        }
        if let Some(start_error) = &self.start_error {
            let error = io::Error::from_raw_os_error(start_error.errno);
            let cause = cause_of_exec_error(&error);
            return StartFailure::new(StartStep::Nspawn, cause, start_error.to_string());
        }
        let messages = self.task_dir.nspawn_stderr_tail();
        let what = match in_one_line(&messages) {
            none if none.is_empty() => "; what it said is in the task's stderr log".to_owned(),
            messages => format!(": {messages}"),
        };
        let reason = format!("{} before the container was up{what}", describe(status));
        StartFailure::new(StartStep::Nspawn, cause_of_messages(&messages), reason)
    }
}

fn in_one_line(words: &str) -> String {
    let lines: Vec<&str> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
}
