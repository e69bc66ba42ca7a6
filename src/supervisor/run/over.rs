//! The end of a container: seen, recorded, told, and what it held freed, in this order. How the signs of an end are read is
//! `supervisor::ending`'s to know.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use rustix::process::{WaitOptions, wait};

use super::super::ending::{Signs, exit_of, foreseen, told};
use super::super::line::{Failure, News, Step};
use super::super::pause::{self, Point};
use super::super::process::Held;
use super::super::remains;
use super::{CLEAR_UP, Leader, State, Watch};
use crate::cgroup::Group;
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_messages};
use crate::signal::Signal;

impl Watch {
    /// The leader, as long as its end is news. systemd-nspawn may have been stopped, and then it would not report it.
    pub(super) fn leader_to_watch(&self) -> Option<PollFd<'_>> {
        let leader = self.held_leader()?;
        let flags = match self.leader {
            Leader::Lives => PollFlags::POLLIN,
            // The kernel says so unasked when it is waited for, and until then has no other news.
            Leader::Ended if self.may_end_early() => PollFlags::empty(),
            Leader::Ended | Leader::Reaped => return None,
        };
        Some(PollFd::new(leader.as_fd(), flags))
    }

    /// Whether the leader's end is told before that of systemd-nspawn: throwing away an ephemeral root may take that minutes. Any
    /// other root stays locked until systemd-nspawn has ended.
    fn may_end_early(&self) -> bool {
        !self.told && self.order.copies().is_some()
    }

    /// The leader has ended. systemd-nspawn normally ends a few milliseconds later; one that was stopped continues, and one that
    /// still does not end is killed after [`CLEAR_UP`], unless it may be throwing away an ephemeral root.
    pub(super) fn see_leader(&mut self, seen: Leader) {
        let ends_now = std::mem::replace(&mut self.leader, seen) == Leader::Lives;
        if !ends_now {
            return;
        }
        self.rouse_nspawn();
        if self.order.copies().is_none() {
            self.patience
                .get_or_insert_with(|| Instant::now() + CLEAR_UP);
        }
    }

    /// How systemd-nspawn may be taken to have ended, once the leader has and nothing that it could add would change what is told.
    pub(super) fn end_known_early(&self) -> Option<ExitStatus> {
        if !self.may_end_early() || self.leader == Leader::Lives {
            return None;
        }
        let by_force = ExitStatus::from_raw(Signal::KILL.number());
        if self.forced || self.status.is_some() || self.trouble.is_some() {
            return Some(by_force);
        }
        foreseen(self.raw_status()?, self.farewell)
    }

    fn held_leader(&self) -> Option<&Held> {
        match &self.state {
            State::Running { leader, .. } => leader.as_ref(),
            State::Starting { .. } | State::Failing(_) => None,
        }
    }

    /// The leader's raw wait status, where the kernel tells it to others than the parent.
    fn raw_status(&self) -> Option<i32> {
        let leader = self.held_leader()?;
        leader
            .raw_status()
            .filter(|_| !pause::kernel_is_old(&self.records))
    }

    /// Records how it ended and tells everybody, once.
    pub(super) fn tell_end(&mut self, status: ExitStatus) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let group = self.order.cgroup();
        let exit = exit_of(&Signs {
            mode: self.order.mode,
            trouble: self.trouble.as_ref(),
            command: self.status,
            leader: self.raw_status(),
            reaped: self.reaped,
            words: &self.records.words(),
            nspawn: status,
            forced: self.forced,
            put_down: self.put_down,
            oom: group.is_some_and(|group| Group::new(group).oom_kills() > 0),
        });
        if let Err(error) = self.records.write_exit(&exit) {
            let _ = writeln!(io::stderr(), "the end can't be recorded: {error}");
        }
        pause::at(&self.records, Point::EndRecorded);
        self.listeners.tell(&News::Exited(exit));
        pause::at(&self.records, Point::EndTold);
    }

    /// Reaps every child that has ended; the status of systemd-nspawn if it is among them. The leader is one only after a
    /// systemd-nspawn that ended without having waited for it.
    pub(super) fn reap(&mut self) -> Option<ExitStatus> {
        pause::at(&self.records, Point::Exited);
        while let Ok(Some(_)) = self.sockets.signals.read_signal() {}
        let leader = self.held_leader().map(|leader| leader.process().pid);
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
    pub(super) fn end(&mut self, status: ExitStatus) {
        // What was said last may still lie in the sockets: a short command is over before anybody has looked.
        self.hear_nspawn();
        self.hear_first();
        self.start_if_ready();
        self.records.discard_secrets();
        self.kill_the_rest();
        let group = self.order.cgroup().map(Group::new);
        let running = match &self.state {
            State::Starting { .. } => {
                let failure = self.failed(status);
                self.listeners.tell(&News::Failed(failure));
                None
            }
            State::Failing(failure) => {
                self.listeners.tell(&News::Failed(failure.clone()));
                None
            }
            State::Running { running, .. } => {
                let running = running.clone();
                self.tell_end(status);
                Some(running)
            }
        };
        if let Some(group) = group {
            group.wait_empty(CLEAR_UP);
        }
        // After systemd-nspawn's own end, so that of the two the last removes the files.
        self.tree = None;
        if !self.put_down
            && status.signal().is_none()
            && let Err(error) = self.records.write_released()
        {
            let _ = writeln!(
                io::stderr(),
                "the end of systemd-nspawn can't be recorded: {error}"
            );
        }
        if let Err(error) = remains::free(&self.records, &self.order, running.as_deref()) {
            let _ = writeln!(io::stderr(), "not everything could be freed: {error}");
        }
    }

    /// Why it did not come up, from the one who was furthest: systemd-nspawn may not have been reached, or its own messages tell.
    fn failed(&self, status: ExitStatus) -> Failure {
        if let Some(refusal) = self.records.failure() {
            return Failure::new(Step::Nspawn, refusal.cause, refusal.reason);
        }
        if let Some(trouble) = &self.trouble {
            let error = io::Error::from_raw_os_error(trouble.errno);
            let cause = cause_of_exec_error(&error);
            return Failure::new(Step::Nspawn, cause, trouble.to_string());
        }
        let messages = self.records.words();
        let what = match in_one_line(&messages) {
            none if none.is_empty() => "; what it said is in the task's stderr log".to_owned(),
            messages => format!(": {messages}"),
        };
        let reason = format!("{} before the container was up{what}", told(status));
        Failure::new(Step::Nspawn, cause_of_messages(&messages), reason)
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
