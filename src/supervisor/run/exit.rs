//! The exit of a container: detected, recorded, reported, and its resources released, in this order. How the signs of an end are read is
//! `supervisor::ending`'s to know.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use rustix::process::{WaitOptions, wait};

use super::super::cleanup;
use super::super::exit_status::{ExitEvidence, describe, exit_of, predict_nspawn_status};
use super::super::failpoint::{self, Failpoint};
use super::super::process::ProcessHandle;
use super::super::protocol::{Event, StartFailure, StartStep};
use super::{LeaderState, NSPAWN_CLEANUP_TIMEOUT, State, Supervisor};
use crate::cgroup::Group;
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_messages};
use crate::signal::Signal;

impl Supervisor {
    /// The leader, as long as its end is news. systemd-nspawn may have been stopped, and then it would not report it.
    pub(super) fn leader_poll_fd(&self) -> Option<PollFd<'_>> {
        let leader = self.leader_handle()?;
        let flags = match self.leader {
            LeaderState::Alive => PollFlags::POLLIN,
            // The kernel says so unasked when it is waited for, and until then has no other news.
            LeaderState::Ended if self.may_end_early() => PollFlags::empty(),
            LeaderState::Ended | LeaderState::Reaped => return None,
        };
        Some(PollFd::new(leader.as_fd(), flags))
    }

    /// Whether the leader's end is told before that of systemd-nspawn: throwing away an ephemeral root may take that minutes. Any
    /// other root stays locked until systemd-nspawn has ended.
    fn may_end_early(&self) -> bool {
        !self.exit_reported && self.launch_spec.copies().is_some()
    }

    /// The leader has ended. systemd-nspawn normally ends a few milliseconds later; one that was stopped continues, and one that
    /// still does not end is killed after [`NSPAWN_CLEANUP_TIMEOUT`], unless it may be throwing away an ephemeral root.
    pub(super) fn see_leader(&mut self, seen: LeaderState) {
        let ends_now = std::mem::replace(&mut self.leader, seen) == LeaderState::Alive;
        if !ends_now {
            return;
        }
        self.sigcont_nspawn();
        if self.launch_spec.copies().is_none() {
            self.nspawn_deadline
                .get_or_insert_with(|| Instant::now() + NSPAWN_CLEANUP_TIMEOUT);
        }
    }

    /// How systemd-nspawn may be taken to have ended, once the leader has and nothing that it could add would change what is told.
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

    /// The leader's raw wait status, where the kernel tells it to others than the parent.
    fn raw_status(&self) -> Option<i32> {
        let leader = self.leader_handle()?;
        leader
            .raw_status()
            .filter(|_| !failpoint::kernel_is_old(&self.task_dir))
    }

    /// Records how it ended and tells everybody, once.
    pub(super) fn report_exit(&mut self, status: ExitStatus) {
        if std::mem::replace(&mut self.exit_reported, true) {
            return;
        }
        let group = self.launch_spec.cgroup();
        let exit = exit_of(&ExitEvidence {
            mode: self.launch_spec.mode,
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

    /// Reaps every child that has ended; the status of systemd-nspawn if it is among them. The leader is one only after a
    /// systemd-nspawn that ended without having waited for it.
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

    /// systemd-nspawn has ended: so has the container, or it does now.
    pub(super) fn finish(&mut self, status: ExitStatus) {
        // What was said last may still lie in the sockets: a short command is over before anybody has looked.
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
        // After systemd-nspawn's own end, so that of the two the last removes the files.
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

    /// Why it did not come up, from the one who was furthest: systemd-nspawn may not have been reached, or its own messages tell.
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
