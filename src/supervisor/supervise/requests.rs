//! Clients of the control sockets: accepting them, sending them the state, carrying out their requests. How messages travel is in
//! `clients`.

use std::io;
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
            if let State::Running { running, .. } = &self.state {
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
            let error = done.err().map(|error| error.to_string());
            let request = request.request;
            self.clients.answer(client, &Event::Done { request, error });
        }
    }

    fn carry_out(&mut self, action: Action) -> io::Result<()> {
        // The container has ended, which is what a stop or a kill was to achieve; a signal has no process to go to.
        if self.nspawn_has_exited() {
            return Ok(());
        }
        match action {
            // Sent like any other signal, SIGKILL would end the container too, but systemd-nspawn would report a different exit.
            Action::Signal(number) if number == Signal::KILL.number() => self.kill(),
            Action::Signal(number) => return self.signal(Signal::from_number(number)),
            Action::Stop => {
                let stop_signal = self.stop_signal();
                return self.signal(stop_signal);
            }
            Action::Kill => self.kill(),
        }
        Ok(())
    }

    /// Drops the clients that have closed their connection or do not read their events.
    pub(super) fn drop_disconnected(&mut self) {
        let owner_is_gone = self.clients.drop_disconnected();
        if owner_is_gone && matches!(self.state, State::Starting { .. }) {
            // The client that requested the start is gone and will request it again; the same container must not run twice.
            self.kill();
        }
    }
}
