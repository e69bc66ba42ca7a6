//! Signals to a container, graceful stop and kill. Runs in the supervisor process. Decides which process gets a signal and when;
//! the resulting exit is handled in `exit`.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::output::Output;
use super::{LeaderState, NSPAWN_CLEANUP_TIMEOUT, State, Supervisor};
use crate::cgroup::{Group, freezer};
use crate::cleanup;
use crate::container::Mode;
use crate::failpoint::{self, Failpoint};
use crate::signal::Signal;
use crate::sys::process::{
    ProcessHandle, blocks_or_handles_signal, first_child, handles_signal, ignores_signal,
};

/// How long an image's init may need before it handles signals. A signal that it does not handle by then it never will.
const INIT_STARTUP_WINDOW: Duration = Duration::from_secs(60);

/// How many units that have not stopped are named.
const MAX_UNITS: usize = 10;
/// How long an exit is taken for the consequence of a signal.
const ASKED_WINDOW: Duration = Duration::from_secs(1800);

impl Supervisor {
    /// Whether a plugin has probably caused the exit. Any signal can be the one that ends an init.
    pub(super) fn is_asked_to_end(&self) -> bool {
        self.asked_at
            .is_some_and(|asked| asked.elapsed() < ASKED_WINDOW)
    }

    /// The process that receives signals; none once it has exited. With `process_two` the command is known from the init's report
    /// and is never searched for: once it has exited, the init's children are orphans that the init has adopted.
    fn payload_pid(&self) -> Option<&ProcessHandle> {
        let State::Running { leader, .. } = &self.state else {
            return None;
        };
        match self.launch_spec.mode {
            Mode::Boot | Mode::Plain => leader.as_deref(),
            Mode::ProcessTwo if self.exit.command_status.is_some() => None,
            Mode::ProcessTwo => self.command.as_ref().or(leader.as_deref()),
        }
    }

    /// The signal that asks this payload to exit. systemd has one of its own. A command gets SIGTERM if it has a handler for it, or
    /// if it ignores SIGINT; otherwise it gets Nomad's default, SIGINT. The kernel discards signals for which PID 1 of a container
    /// has no handler. A handler for SIGINT proves nothing, because shells have one too.
    pub(super) fn stop_signal(&self) -> Option<Signal> {
        if self.launch_spec.mode == Mode::Boot {
            return Some(Signal::POWER_OFF);
        }
        let payload = self.payload_pid()?.process().pid;
        // The init reports a command a moment after it has forked it. Until then the payload is the init, which forwards signals,
        // and the command is its first child; that is good enough to choose a signal.
        let init = self.init_channel.as_ref();
        let init = init.and_then(|channel| channel.peer_pid());
        let pid = match self.launch_spec.mode {
            Mode::ProcessTwo if init == Some(payload) => first_child(payload).unwrap_or(payload),
            _ => payload,
        };
        let term = handles_signal(pid, Signal::TERM) || ignores_signal(pid, Signal::INT);
        Some(if term { Signal::TERM } else { Signal::INT })
    }

    pub(super) fn signal(&mut self, signal: Option<Signal>) -> io::Result<()> {
        self.sigcont_nspawn();
        failpoint::hit(&self.task_dir, Failpoint::Signalling);
        let (Some(signal), Some(payload)) = (signal, self.payload_pid()) else {
            return Ok(());
        };
        if !self.init_not_ready_for(payload, signal) {
            return payload.signal(signal);
        }
        // Once is enough: the kernel too keeps a pending signal only once.
        if !self.pending_signals.contains(&signal) {
            self.pending_signals.push(signal);
        }
        Ok(())
    }

    /// Whether an image's init would lose a signal that it may handle later. systemd-nspawn reports the start while PID 1 is still
    /// systemd-nspawn's own program, and an init needs a moment to install its handlers as well.
    fn init_not_ready_for(&self, payload: &ProcessHandle, signal: Signal) -> bool {
        let State::Running { since, .. } = self.state else {
            return false;
        };
        // These work without a handler.
        let works = [Signal::NULL, Signal::CONT, Signal::STOP].contains(&signal);
        let young = self.launch_spec.mode == Mode::Boot && since.elapsed() < INIT_STARTUP_WINDOW;
        young && !works && blocks_or_handles_signal(payload.process().pid, signal) == Some(false)
    }

    pub(super) fn flush_pending_signals(&mut self) {
        if self.pending_signals.is_empty() {
            return;
        }
        let pending_signals = std::mem::take(&mut self.pending_signals);
        let Some(payload) = self.payload_pid() else {
            return;
        };
        let (early, due): (Vec<_>, Vec<_>) = pending_signals
            .into_iter()
            .partition(|signal| self.init_not_ready_for(payload, *signal));
        for signal in due {
            if let Err(error) = payload.signal(signal) {
                let _ = writeln!(
                    io::stderr(),
                    "{signal} can't be sent to the container: {error}"
                );
            }
        }
        self.pending_signals = early;
    }

    /// Says in a note why the system has not stopped yet.
    pub(super) fn explain_stop(&mut self) {
        if self.exit.leader != LeaderState::Alive {
            return;
        }
        self.copy_output(Output::read_journal);
        let units = self.output.as_ref().map(Output::stopping_units);
        let units = units.unwrap_or_default();
        let shown = &units[..units.len().min(MAX_UNITS)];
        let more = match units.len() - shown.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        let units = match shown {
            [] => String::new(),
            shown => format!(". Units that have not stopped: {}{more}", shown.join(", ")),
        };
        let status = self.said.last_status();
        let note =
            format!("half of kill_timeout is over, and the system has not stopped{units}{status}");
        self.notes.add(note);
    }

    /// Kills the container, and lets systemd-nspawn notice it and clean up.
    pub(super) fn kill(&mut self) {
        if self.nspawn_has_exited() {
            return;
        }
        failpoint::hit(&self.task_dir, Failpoint::Killing);
        self.pending_signals.clear();
        let State::Running { leader, .. } = &self.state else {
            self.exit.killed = true;
            self.kill_nspawn();
            return;
        };
        // A leader that had already exited was not killed: its own exit status counts.
        let lives = |leader: &ProcessHandle| !leader.wait(Duration::ZERO);
        self.exit.killed |= leader.as_deref().is_some_and(lives);
        if let Some(group) = self.launch_spec.cgroup() {
            Group::new(group).child("payload").kill();
        }
        if let Some(leader) = leader {
            let _ = leader.signal(Signal::KILL);
            freezer::release(leader.process().pid);
        }
        // Frozen processes can't clean up.
        if let Some(group) = self.launch_spec.cgroup() {
            Group::new(group).thaw();
        }
        self.sigcont_nspawn();
        self.exit
            .kill_deadline
            .get_or_insert_with(|| Instant::now() + NSPAWN_CLEANUP_TIMEOUT);
    }

    /// A systemd-nspawn that was stopped would not notice the exit of its container.
    pub(super) fn sigcont_nspawn(&self) {
        if let Ok(nspawn) = ProcessHandle::open_checked(self.nspawn) {
            let _ = nspawn.signal(Signal::CONT);
        }
    }

    /// Kills everything at once, including systemd-nspawn, which must not have been waited for: its pid could mean another process.
    pub(super) fn kill_nspawn(&mut self) {
        self.exit.nspawn_killed = true;
        // kill(2) needs no descriptor.
        let pid = nix::unistd::Pid::from_raw(self.nspawn.pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        if let Some(group) = self.launch_spec.cgroup() {
            Group::new(group).kill();
        }
    }

    /// Kills what has outlived systemd-nspawn: a container outlives one that was killed, and no process is left to report its exit.
    /// Returns whether something is left to wait for before the exit is reported: the leader, or without a cgroup any descendant.
    pub(super) fn kill_remaining(&self) -> bool {
        let leader_lives = self.leader_handle().is_some_and(|leader| {
            let _ = leader.signal(Signal::KILL);
            !leader.wait(Duration::ZERO)
        });
        let Some(group) = self.launch_spec.cgroup() else {
            return cleanup::kill_descendants(nix::unistd::getpid().as_raw());
        };
        let group = Group::new(group);
        if !group.processes().is_empty() {
            group.kill();
        }
        leader_lives
    }
}
