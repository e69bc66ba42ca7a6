//! Clients of the control sockets: accepting them, sending them the state, carrying out their requests. How messages travel is in
//! `clients`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use super::event_loop::{Interest, Token};
use super::{RETRY_DELAY, State, Supervisor};
use crate::failpoint::{self, Failpoint};
use crate::signal::Signal;
use crate::supervisor::protocol::{Action, Event};

impl Supervisor {
    /// Accepts all clients that wait, and sends each the state. If accept(2) fails, for example because no descriptors are left,
    /// the others stay in the backlog for a moment, where they do not wake up the supervisor.
    pub(super) fn accept_clients(&mut self) {
        loop {
            let id = match self.sockets.control.accept() {
                Ok((socket, framing)) => self.clients.add(socket, framing, &self.events),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.pause_accepting(),
            };
            if let State::Running { running, .. } = &self.state
                && !self.is_awaited()
            {
                let started = Event::Started(running.started.clone());
                self.clients.send_to_last(&started);
            }
            if let Some(end) = &self.exit.reported {
                self.clients.send_to_last(end);
            }
            // OOM kills that happened while no plugin was connected.
            self.report_oom();
            // A client that has sent a request and closed its connection would be dropped before its first event.
            self.handle_requests(id);
        }
    }

    fn pause_accepting(&mut self) {
        // Registered already, so this needs no memory.
        let _ = self.sockets.control.watch(Interest::HangUp);
        let end = Instant::now() + RETRY_DELAY;
        self.events.set_timer(Token::AcceptPause, Some(end));
    }

    pub(super) fn resume_accepting(&mut self) {
        let _ = self.sockets.control.watch(Interest::Readable);
    }

    /// Carries out the requests that a client has sent.
    pub(super) fn handle_requests(&mut self, client: u32) {
        for request in self.clients.requests(client) {
            let done = self.carry_out(request.verb);
            failpoint::hit(&self.task_dir, Failpoint::Signalled);
            self.clients.answer(client, request.request, done);
        }
    }

    /// Returns the descriptor that the answer carries, if it carries one.
    fn carry_out(&mut self, action: Action) -> io::Result<Option<OwnedFd>> {
        if matches!(action, Action::Signal(1..) | Action::Stop | Action::Kill) {
            self.asked_at = Some(Instant::now());
            self.said.forget_status();
        }
        let has_ended = self.exit.reported.is_some() || self.nspawn_has_exited();
        match action {
            // That is what a stop was to achieve; a signal has no process to go to.
            Action::Signal(_) | Action::Stop | Action::ExplainStop if has_ended => {}
            Action::ExecDefaults if has_ended => {
                return Err(io::Error::other("the container has ended"));
            }
            // Sent like any other signal, SIGKILL would end the container too, but systemd-nspawn would report a different exit.
            Action::Signal(number) if number == Signal::KILL.number() => self.kill(),
            Action::Signal(number) => self.signal(Signal::from_number(number))?,
            Action::Stop => {
                let stop_signal = self.stop_signal();
                self.signal(stop_signal)?;
            }
            Action::ExplainStop => {
                self.asked_at = Some(Instant::now());
                self.explain_stop();
            }
            Action::Kill => self.kill(),
            Action::ExecDefaults => return self.exec_defaults().map(Some),
        }
        Ok(None)
    }

    /// Opened again, because all who read from one descriptor share its offset.
    fn exec_defaults(&self) -> io::Result<OwnedFd> {
        let kept = self.exec_defaults.as_raw_fd();
        Ok(File::open(format!("/proc/self/fd/{kept}"))?.into())
    }

    /// Drops the clients that have closed their connection or do not read their events.
    pub(super) fn drop_disconnected(&mut self) {
        let owner_is_gone = self.clients.drop_disconnected();
        let is_starting = matches!(self.state, State::Starting { .. }) || self.is_awaited();
        if owner_is_gone && is_starting {
            // The client that requested the start is gone and will request it again; the same container must not run twice.
            self.kill();
        }
    }
}
