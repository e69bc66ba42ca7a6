//! The exit of a container: detected, recorded and reported, in this order, before the resources are released. Runs in the
//! supervisor process. Does not interpret the evidence; `exit_status` does.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nspawn_init::Step;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};

use super::event_loop::Interest;
use super::exit_status::{ExitEvidence, NSPAWN_FAILED, describe, exit_of, predict_nspawn_status};
use super::network::Services;
use super::release::Release;
use super::{
    Ending, LeaderState, NSPAWN_ANNOUNCED_TIMEOUT, NSPAWN_CLEANUP_TIMEOUT, State, Supervisor,
};
use crate::container::{Exit, Mode};
use crate::failpoint::{self, Failpoint};
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_messages};
use crate::signal::Signal;
use crate::state::task_dir::Pid1;
use crate::supervisor::protocol::{Event, StartFailure, StartStep};
use crate::sys::process::ProcessHandle;

impl Supervisor {
    /// Whether the leader's exit can still be reported before systemd-nspawn exits, which takes it milliseconds, and minutes if it
    /// has to delete an ephemeral root.
    fn may_report_early(&self) -> bool {
        self.exit.reported.is_none() && !self.nspawn_has_exited()
    }

    /// Whether systemd-nspawn has exited and has been waited for.
    pub(super) fn nspawn_has_exited(&self) -> bool {
        !matches!(self.ending, Ending::NspawnRuns)
    }

    /// The leader has exited, or if its pidfd has hung up, has also been waited for. systemd-nspawn normally exits a few
    /// milliseconds later. One that was stopped gets SIGCONT: it would not report the exit, which is why the leader is watched at
    /// all. One that still does not exit is killed at [`exit_deadline`](Self::exit_deadline), unless it may be deleting an
    /// ephemeral root.
    pub(super) fn see_leader(&mut self, hung_up: bool) {
        let has_exited = |leader: &ProcessHandle| hung_up || leader.wait(Duration::ZERO);
        if !self.leader_handle().is_some_and(has_exited) {
            return;
        }
        // What the init has sent last is in its channel by now.
        self.read_reports();
        let seen = match hung_up {
            true => LeaderState::Reaped,
            false => LeaderState::Ended,
        };
        let first = std::mem::replace(&mut self.exit.leader, seen) == LeaderState::Alive;
        self.exit.waited = self.exit.waited.or_else(|| self.zombie_status());
        if first {
            failpoint::hit(&self.task_dir, Failpoint::Exited);
        }
        self.report_early();
        self.watch_leader();
        if first && !self.nspawn_has_exited() {
            self.sigcont_nspawn();
            if self.launch_spec.copies().is_none() {
                self.exit.leader_exited_at = Some(Instant::now());
            }
        }
    }

    /// Watches the leader as long as there is something left to learn about its exit. Its status may be available only once it has
    /// been waited for, and then its pidfd hangs up.
    fn watch_leader(&mut self) {
        let open = self.exit.leader == LeaderState::Ended && self.may_report_early();
        if let State::Running {
            leader: Some(leader),
            ..
        } = &mut self.state
        {
            match open {
                // Registered already, so this needs no memory.
                true => drop(leader.watch(Interest::HangUp)),
                false => leader.unwatch(),
            }
        }
    }

    /// When systemd-nspawn is killed because its container is gone and it has not exited; once it has exited, when what has
    /// outlived it is waited for no longer.
    pub(super) fn exit_deadline(&self) -> Option<Instant> {
        match self.ending {
            Ending::NspawnRuns => {
                let limit = match self.exit.nspawn_status {
                    None => NSPAWN_CLEANUP_TIMEOUT,
                    Some(_) => NSPAWN_ANNOUNCED_TIMEOUT,
                };
                let after_exit = self.exit.leader_exited_at.map(|exited| exited + limit);
                [self.exit.kill_deadline, after_exit]
                    .into_iter()
                    .flatten()
                    .min()
            }
            Ending::KillingRest { until, .. } => Some(until),
            Ending::Releasing(_) | Ending::Released => None,
        }
    }

    pub(super) fn on_exit_timeout(&mut self) {
        // An announcement of systemd-nspawn that arrived together with the timer gives it more time.
        self.read_reports();
        let is_over = |deadline| Instant::now() >= deadline;
        if !self.nspawn_has_exited() && self.exit_deadline().is_some_and(is_over) {
            self.exit.kill_deadline = None;
            self.exit.leader_exited_at = None;
            self.kill_nspawn();
        }
    }

    /// The exit status to assume for systemd-nspawn, once the leader has exited and nothing that systemd-nspawn could add would
    /// change the reported exit.
    fn early_exit_status(&self) -> Option<ExitStatus> {
        // An exit before the container was ready is a failed start.
        if !self.may_report_early() || !self.has_written_all() || self.is_awaited() {
            return None;
        }
        let by_force = ExitStatus::from_raw(Signal::KILL.number());
        if self.exit.killed || self.exit.command_status.is_some() || self.exit.start_error.is_some()
        {
            return Some(by_force);
        }
        if self.exit.waited.is_some() {
            return Some(ExitStatus::from_raw(NSPAWN_FAILED));
        }
        predict_nspawn_status(self.raw_status()?, self.exit.nspawn_status)
    }

    /// Whether everything that the container has written has reached the logs. What systemd-nspawn forwards from a terminal has once
    /// systemd-nspawn has waited for the leader.
    fn has_written_all(&self) -> bool {
        let is_direct = self.launch_spec.first == Pid1::Driver { streams: true };
        match self.exit.leader {
            LeaderState::Alive => false,
            LeaderState::Ended => is_direct || self.exit.nspawn_status.is_some(),
            LeaderState::Reaped => true,
        }
    }

    /// The leader's raw wait status, if the kernel reports it to processes other than the parent.
    fn raw_status(&self) -> Option<i32> {
        let leader = self.leader_handle()?;
        leader
            .raw_status()
            .filter(|_| !failpoint::kernel_is_old(self.task_dir.path()))
    }

    /// The same before its parent has waited for it.
    fn zombie_status(&self) -> Option<i32> {
        let leader = self.leader_handle()?;
        leader
            .zombie_status()
            .filter(|_| !failpoint::kernel_is_old(self.task_dir.path()))
    }

    /// Reports an exit that is certain before systemd-nspawn has exited.
    pub(super) fn report_early(&mut self) {
        if let Some(status) = self.early_exit_status() {
            self.finish_output();
            let exit = self.exit(status);
            self.report_exit(exit);
        }
    }

    fn exit(&self, nspawn: ExitStatus) -> Exit {
        exit_of(&ExitEvidence {
            start_error: self.exit.start_error.as_ref(),
            command: self.exit.command_status,
            leader: self.raw_status(),
            waited: self.exit.waited,
            nspawn_stderr: &self.task_dir.nspawn_stderr_tail(),
            init_failure: self.exit.messages.failure.as_deref(),
            nspawn,
            killed: self.exit.killed,
            nspawn_killed: self.exit.nspawn_killed,
            oom: self.cgroups.oom_kills() > 0,
        })
    }

    /// Records the exit and reports it to all clients. Nothing needs the environment any more.
    fn report_exit(&mut self, exit: Exit) {
        self.note_own_shutdown(&exit);
        self.task_dir.discard_secrets();
        if let Err(error) = self.task_dir.write_exit(&exit) {
            let _ = writeln!(
                io::stderr(),
                "the record exit can't be written, so a plugin that starts later can't report the exit: {error}"
            );
        }
        failpoint::hit(&self.task_dir, Failpoint::EndRecorded);
        self.report(Event::Exited(exit));
        failpoint::hit(&self.task_dir, Failpoint::EndTold);
    }

    /// A system that has shut down by itself looks like one that has done its work.
    fn note_own_shutdown(&mut self, exit: &Exit) {
        let has_succeeded = (exit.code, exit.signal, &exit.error) == (0, 0, &None);
        let is_own = !self.is_asked_to_end() && has_succeeded;
        if is_own && self.launch_spec.mode == Mode::Boot {
            let how = self.exit.messages.shutdown.as_ref();
            let how = how.map_or_else(String::new, |line| {
                format!(". The last line of its console: {line}")
            });
            self.notes
                .add(format!("the system has shut down by itself{how}"));
        }
    }

    /// Sends the last event.
    fn report(&mut self, event: Event) {
        self.send_notes();
        self.clients.broadcast(&event);
        self.exit.reported = Some(event);
    }

    /// Children have exited.
    pub(super) fn see_children(&mut self) {
        // While systemd-nspawn has not been waited for: afterwards it is too late to be early.
        self.report_early();
        while let Ok(Some(_)) = self.sockets.signals.read_signal() {}
        let Some(status) = self.reap().filter(|_| !self.nspawn_has_exited()) else {
            return;
        };
        if let Some(preparation) = self.network.take() {
            // What is made after the release would stay. Its result is not needed any more.
            let _ = preparation.join();
        }
        let until = Instant::now() + NSPAWN_CLEANUP_TIMEOUT;
        self.ending = Ending::KillingRest { status, until };
        // Otherwise its process would count as one of the container's that is left.
        self.services = Services::default();
        self.follower = None;
        // The last messages may still be queued in the sockets: a short command exits before they have been read.
        self.read_reports();
        self.task_dir.discard_secrets();
    }

    /// Reaps every child that has exited; returns the status of systemd-nspawn if it is among them. The leader becomes a child only
    /// after a systemd-nspawn that exited without having waited for it. A thread that prepares the network, or releases it, or changes mounts, waits for its own
    /// children: meanwhile none but systemd-nspawn is reaped.
    fn reap(&mut self) -> Option<ExitStatus> {
        let leader = self.leader_handle().map(|leader| leader.process().pid);
        let mut found = None;
        while let Some((pid, status)) = self.reap_one() {
            if pid == self.nspawn.pid {
                found = Some(ExitStatus::from_raw(status.as_raw()));
            } else if Some(pid) == leader {
                self.exit.waited = Some(status.as_raw());
            } else {
                self.see_relay(pid);
            }
        }
        found
    }

    fn reap_one(&self) -> Option<(i32, WaitStatus)> {
        let others = self.network.is_some() || self.changes_mounts();
        let waited = match (&self.ending, others) {
            (Ending::NspawnRuns, true) => {
                waitpid(Pid::from_raw(self.nspawn.pid), WaitOptions::NOHANG)
            }
            (Ending::NspawnRuns | Ending::KillingRest { .. }, _) => wait(WaitOptions::NOHANG),
            (Ending::Releasing(_) | Ending::Released, _) => return None,
        };
        let (pid, status) = waited.ok()??;
        Some((pid.as_raw_nonzero().get(), status))
    }

    /// Once systemd-nspawn has exited: kills what has outlived it, and when that is done or takes too long, records and reports the exit and lets
    /// everything be released. Called at the end of every turn, because the exit of any process may be the last one.
    pub(super) fn conclude(&mut self) {
        let Ending::KillingRest { status, until } = self.ending else {
            return;
        };
        self.reap();
        if self.kill_remaining() && Instant::now() < until {
            return;
        }
        self.reap();
        self.finish_output();
        match &self.state {
            State::Starting { .. } => self.report(Event::Failed(self.failed(status))),
            State::Failing(failure) => self.report(Event::Failed(failure.clone())),
            State::Running { .. } if self.is_awaited() => {
                let failure = self.exited_unready(&self.exit(status));
                self.report(Event::Failed(failure));
            }
            State::Running { .. } if self.exit.reported.is_none() => {
                let exit = self.exit(status);
                self.report_exit(exit);
            }
            State::Running { .. } => {}
        }
        self.release(status);
    }

    fn release(&mut self, nspawn: ExitStatus) {
        // Only after systemd-nspawn has exited, so that the last of the two to hold the locks removes the files.
        self.tree = None;
        let release = Release {
            task_dir: self.task_dir.clone(),
            launch_spec: self.launch_spec.clone(),
            running: match &self.state {
                State::Running { running, .. } => Some((**running).clone()),
                State::Starting { .. } | State::Failing(_) => None,
            },
            uid_range: self.uid_range.take(),
            by_itself: !self.exit.nspawn_killed && nspawn.signal().is_none(),
        };
        let thread = release.start(&self.events);
        self.ending = thread.map_or(Ending::Released, Ending::Releasing);
    }

    /// The thread that releases the resources has ended, or if its pipe has not hung up, may have.
    pub(super) fn see_release(&mut self, hung_up: bool) {
        if let Ending::Releasing(thread) = &self.ending
            && (hung_up || thread.has_ended())
        {
            self.ending = Ending::Released;
        }
    }

    /// Why the container did not come up, according to the process that got furthest: systemd-nspawn may never have been executed,
    /// or its own messages give the reason.
    fn failed(&self, status: ExitStatus) -> StartFailure {
        if let Some(refusal) = self.task_dir.failure() {
            return StartFailure::new(StartStep::Nspawn, refusal.cause, refusal.reason);
        }
        if let Some(start_error) = &self.exit.start_error {
            let error = io::Error::from_raw_os_error(start_error.errno);
            let cause = cause_of_exec_error(&error);
            let step = match start_error.step {
                Step::Filters => StartStep::Filters,
                _ => StartStep::Nspawn,
            };
            return StartFailure::new(step, cause, start_error.to_string());
        }
        let messages = self.task_dir.nspawn_stderr_tail();
        let what = match in_one_line(&messages) {
            none if none.is_empty() => "; its messages are in the task's stderr log".to_owned(),
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
