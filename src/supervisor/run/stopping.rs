//! What is sent to a container: signals, the polite end and the end by force. Decides who gets a signal and when; what came of it
//! is told elsewhere.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::super::first::Channel;
use super::super::pause::{self, Point};
use super::super::process::{Held, catches, first_child, ignores, takes};
use super::super::remains;
use super::{CLEAR_UP, State, Watch};
use crate::cgroup::{Group, freezer};
use crate::container::Mode;
use crate::signal::Signal;

/// How long an image's init may need before it takes signals. What it does not take then, it never will.
const YOUTH: Duration = Duration::from_secs(60);

impl Watch {
    /// The process that signals are for; none once it has ended. A second process is known from what its init says, and never
    /// looked for: when it has ended, the children of the init are orphans that the init has adopted.
    fn payload(&self) -> Option<&Held> {
        let State::Running { leader, .. } = &self.state else {
            return None;
        };
        match self.order.mode {
            Mode::Boot | Mode::Plain => leader.as_ref(),
            Mode::ProcessTwo if self.status.is_some() => None,
            Mode::ProcessTwo => self.command.as_ref().or(leader.as_ref()),
        }
    }

    /// The signal that asks this payload to end. systemd has one of its own. A command gets SIGTERM if it has a handler for
    /// it, and else Nomad's default, SIGINT: the first process of a container is deaf to what it has no handler for, and shells
    /// have one for SIGINT that means nothing.
    pub(super) fn polite(&self) -> Option<Signal> {
        if self.order.mode == Mode::Boot {
            return Some(Signal::POWER_OFF);
        }
        let payload = self.payload()?.process().pid;
        // The init reports a command a moment after it has forked it. Until then the payload is the init, which passes signals on, and the
        // command its first child; that is good enough to choose a signal by.
        let init = self.first.as_ref().and_then(Channel::speaker);
        let pid = match self.order.mode {
            Mode::ProcessTwo if init == Some(payload) => first_child(payload).unwrap_or(payload),
            _ => payload,
        };
        let term = catches(pid, Signal::TERM) || ignores(pid, Signal::INT);
        Some(if term { Signal::TERM } else { Signal::INT })
    }

    pub(super) fn signal(&mut self, signal: Option<Signal>) -> io::Result<()> {
        self.rouse_nspawn();
        pause::at(&self.records, Point::Signalling);
        let (Some(signal), Some(payload)) = (signal, self.payload()) else {
            return Ok(());
        };
        if !self.comes_too_early(payload, signal) {
            return payload.signal(signal);
        }
        // One is as good as many: the kernel too keeps a signal once.
        if !self.kept.contains(&signal) {
            self.kept.push(signal);
        }
        Ok(())
    }

    /// Whether an image's init would lose a signal that it may take later. systemd-nspawn tells of the start while the first
    /// process is still its own program, and an init needs a moment as well.
    fn comes_too_early(&self, payload: &Held, signal: Signal) -> bool {
        let State::Running { since, .. } = self.state else {
            return false;
        };
        // These work without being taken.
        let works = [Signal::NULL, Signal::CONT, Signal::STOP].contains(&signal);
        let young = self.order.mode == Mode::Boot && since.elapsed() < YOUTH;
        young && !works && takes(payload.process().pid, signal) == Some(false)
    }

    pub(super) fn send_what_was_kept(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let kept = std::mem::take(&mut self.kept);
        let Some(payload) = self.payload() else {
            return;
        };
        let (early, due): (Vec<_>, Vec<_>) = kept
            .into_iter()
            .partition(|signal| self.comes_too_early(payload, *signal));
        for signal in due {
            if let Err(error) = payload.signal(signal) {
                let _ = writeln!(io::stderr(), "{signal} can't be sent: {error}");
            }
        }
        self.kept = early;
    }

    /// Ends the container by force, and lets systemd-nspawn see it and clear up.
    pub(super) fn kill(&mut self) {
        pause::at(&self.records, Point::Killing);
        self.kept.clear();
        let State::Running { leader, .. } = &self.state else {
            self.forced = true;
            self.kill_nspawn();
            return;
        };
        // One that has ended by itself has its own truth.
        let lives = |leader: &Held| !leader.wait(Duration::ZERO);
        self.forced |= leader.as_ref().is_some_and(lives);
        if let Some(group) = self.order.cgroup() {
            Group::new(group).child("payload").kill();
        }
        if let Some(leader) = leader {
            let _ = leader.signal(Signal::KILL);
            freezer::release(leader.process().pid);
        }
        // What is frozen can't clear up.
        if let Some(group) = self.order.cgroup() {
            Group::new(group).thaw();
        }
        self.rouse_nspawn();
        self.patience
            .get_or_insert_with(|| Instant::now() + CLEAR_UP);
    }

    /// A systemd-nspawn that somebody has stopped would not notice the end of its container.
    pub(super) fn rouse_nspawn(&self) {
        if let Ok(nspawn) = Held::again(self.nspawn) {
            let _ = nspawn.signal(Signal::CONT);
        }
    }

    /// Ends everything at once, systemd-nspawn too.
    pub(super) fn kill_nspawn(&mut self) {
        self.put_down = true;
        // Its own parent has not waited for it yet, so the pid is its own. No descriptor is needed for that.
        let pid = nix::unistd::Pid::from_raw(self.nspawn.pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        if let Some(group) = self.order.cgroup() {
            Group::new(group).kill();
        }
    }

    /// After a systemd-nspawn that was killed the container lives on, without anybody to tell its end.
    pub(super) fn kill_the_rest(&mut self) {
        if let State::Running {
            leader: Some(leader),
            ..
        } = &self.state
        {
            let _ = leader.signal(Signal::KILL);
            leader.wait(CLEAR_UP);
            self.reap();
        }
        if let Some(group) = self.order.cgroup() {
            let group = Group::new(group);
            if !group.processes().is_empty() {
                group.kill();
            }
        } else {
            remains::kill_descendants(nix::unistd::getpid().as_raw(), || {
                self.reap();
            });
        }
    }
}
