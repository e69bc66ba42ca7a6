//! The loop of the supervisor: waits for events and handles them until everything has been released. What an event means is in
//! `state`, `requests`, `signals` and `exit`.
//!
//! What can still make the loop wait, and why that is acceptable: writing a record or reading one in the task directory, which is
//! on the host's own `/run` unless the operator has configured another file system, and without which a start or an exit can't be
//! reported; and killing a cgroup without `cgroup.kill` (before Linux 5.14, and with cgroup v1), which takes at most 10 seconds and only
//! as long as its members fork; reading the journal of a booted container, which is refused on network file systems and FUSE; and the log collector, for at most
//! 2 seconds at the end of a booted container. Clients, the exit of systemd-nspawn and of everything that outlives it, and the release of
//! resources are never waited for here.

use std::io::{self, Write};
use std::time::Instant;

use super::event_loop::{Ready, Token};
use super::output::Output;
use super::{Ending, MAX_WAIT_ERRORS, POLL_INTERVAL, RETRY_DELAY, Supervisor};
use crate::failpoint;

impl Supervisor {
    /// Waits for events and handles them until everything has been released.
    pub(super) fn run(&mut self) {
        let mut errors = 0;
        while !matches!(self.ending, Ending::Released) {
            self.set_timers();
            let ready = match self.wait() {
                Ok(ready) => {
                    errors = 0;
                    ready
                }
                Err(error) => {
                    errors += 1;
                    self.on_wait_error(errors, &error);
                    self.events.all()
                }
            };
            for ready in ready {
                self.handle(ready);
            }
            self.end_turn();
        }
    }

    /// One event. Events of one turn arrive in the order of [`Token`].
    fn handle(&mut self, ready: Ready) {
        match ready.token {
            Token::Notify | Token::InitChannel => self.read_reports(),
            Token::ControlSocket => self.accept_clients(),
            Token::AcceptPause => self.resume_accepting(),
            Token::Client(id) => self.handle_requests(id),
            Token::Dhcp => self.answer_dhcp(),
            Token::DhcpPause => self.resume_dhcp(),
            Token::Relay => self.start_relay(),
            Token::Ready => self.read_ready_socket(),
            Token::ReadyStep => self.on_ready_step(),
            Token::Console => self.copy_output(Output::read_console),
            Token::Journal | Token::JournalAgain => self.copy_output(Output::read_journal),
            Token::LogWritable => self.copy_output(Output::resume),
            Token::MountTable => self.see_mount_table(),
            Token::MountPause => self.resume_mounts(),
            Token::MountsChanged => self.see_mounts_changed(),
            Token::Leader => self.see_leader(ready.hung_up),
            Token::Signals => self.see_children(),
            Token::Oom => self.see_oom(),
            Token::OomReport => self.report_oom(),
            Token::ExitTimeout => self.on_exit_timeout(),
            Token::Released => self.see_release(ready.hung_up),
            // What they are for is done at the end of every turn.
            Token::UnregisteredClients | Token::PendingSignals => {}
        }
    }

    /// What depends on more than one event.
    fn end_turn(&mut self) {
        for id in self.clients.register_again() {
            self.handle_requests(id);
        }
        self.flush_pending_signals();
        self.send_notes();
        self.report_early();
        self.conclude();
        self.drop_disconnected();
    }

    fn set_timers(&mut self) {
        let after = |wanted: bool, delay| wanted.then(|| Instant::now() + delay);
        let unregistered = after(self.clients.has_unregistered(), RETRY_DELAY);
        self.events
            .set_timer(Token::UnregisteredClients, unregistered);
        let pending = after(!self.pending_signals.is_empty(), POLL_INTERVAL);
        self.events.set_timer(Token::PendingSignals, pending);
        let oom_report = self.oom_report_time();
        self.events.set_timer(Token::OomReport, oom_report);
        let ready = self.next_ready_step();
        self.events.set_timer(Token::ReadyStep, ready);
        let journal = self.output.as_ref().and_then(Output::next_look);
        self.events.set_timer(Token::JournalAgain, journal);
        let exit = self.exit_deadline();
        self.events.set_timer(Token::ExitTimeout, exit);
    }

    fn wait(&mut self) -> io::Result<Vec<Ready>> {
        if failpoint::waits_fail(self.task_dir.path()) {
            return Err(nix::Error::EINVAL.into());
        }
        self.events.wait()
    }

    /// The wait failed, for which the kernel documents no reason that could apply here. For a while everything is checked every
    /// 100 ms instead; if it keeps failing, the container is killed, because a container that can't be supervised must not run.
    fn on_wait_error(&mut self, times: u32, error: &io::Error) {
        match times {
            1 => drop(writeln!(
                io::stderr(),
                "epoll_wait failed, so events are checked for every 100 ms: {error}"
            )),
            MAX_WAIT_ERRORS => {
                let _ = writeln!(
                    io::stderr(),
                    "epoll_wait still fails, so the container is killed: {error}"
                );
                self.kill();
            }
            _ => {}
        }
        std::thread::sleep(RETRY_DELAY);
    }
}
