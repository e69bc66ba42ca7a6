//! The network that the driver makes for the container: prepared while systemd-nspawn starts, connected when there is a network namespace
//! and before anything of the job runs in it. Runs in the supervisor process.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::event_loop::{Interest, Pollable, Source, Token};
use super::inside::{has_exited, own_namespace};
use super::{RETRY_DELAY, Supervisor, failure};
use crate::container::{Cause, StartedNetwork};
use crate::failpoint::{self, Failpoint};
use crate::network::dhcp::{Answered, DhcpResponder};
use crate::network::relay::Relay;
use crate::network::{self, Connected, NetworkError, NetworkPlan};
use crate::supervisor::protocol::{StartFailure, StartStep};
use crate::sys::process::ProcessHandle;

/// What is prepared in a thread of its own, because it takes milliseconds that systemd-nspawn needs too.
pub(super) type Preparation = JoinHandle<Result<Vec<String>, NetworkError>>;

/// Begins to prepare the network, if the launch spec has one.
pub(super) fn prepare(plan: Option<&NetworkPlan>) -> io::Result<Option<Preparation>> {
    let Some(plan) = plan.cloned() else {
        return Ok(None);
    };
    let prepare = move || network::backend().prepare(&plan);
    thread::Builder::new().spawn(prepare).map(Some)
}

/// The network of the plan, as the plugin reports it.
pub(super) fn started(plan: &NetworkPlan) -> StartedNetwork {
    StartedNetwork {
        address: plan.address.into(),
        ports: plan
            .ports
            .iter()
            .map(|port| (port.label.clone(), port.container))
            .collect(),
    }
}

/// What serves the connected container, in the loop.
#[derive(Debug, Default)]
pub(super) struct Services {
    dhcp: Option<Source<DhcpResponder>>,
    relay: Option<Source<Relay>>,
    /// The process that serves the sockets of the relay.
    relaying: Option<i32>,
}

impl Pollable for Relay {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Relay::descriptor(self)
    }
}

impl Supervisor {
    /// Connects the container. Returns false if that failed and the start is being undone. A container whose leader has exited already
    /// is left alone: its exit is all there is to report.
    pub(super) fn connect_network(&mut self, leader: Option<&ProcessHandle>) -> bool {
        match self.connect(leader) {
            Ok(notes) => {
                self.launch_spec.notes.extend(notes);
                true
            }
            Err(failure) => {
                self.fail_with(failure);
                false
            }
        }
    }

    /// Answers DHCP requests of the container. One that sends more than any client does has to wait.
    pub(super) fn answer_dhcp(&mut self) {
        let Some(dhcp) = &mut self.services.dhcp else {
            return;
        };
        match dhcp.answer() {
            Ok(Answered::All) => {}
            Ok(Answered::Flooded) | Err(_) => {
                dhcp.unwatch();
                let end = Instant::now() + RETRY_DELAY;
                self.events.set_timer(Token::DhcpPause, Some(end));
            }
        }
    }

    /// The pause of DHCP requests is over.
    pub(super) fn resume_dhcp(&mut self) {
        if let Some(dhcp) = &mut self.services.dhcp {
            let _ = dhcp.watch(Interest::Readable);
        }
    }

    /// Something has arrived on `::1`: starts the process that serves it from then on.
    pub(super) fn start_relay(&mut self) {
        let Some(relay) = &mut self.services.relay else {
            return;
        };
        relay.unwatch();
        match relay.start() {
            Ok(child) => self.services.relaying = i32::try_from(child.id()).ok(),
            Err(error) => {
                let _ = writeln!(
                    io::stderr(),
                    "what arrives on [::1] is not forwarded any more: {error}"
                );
            }
        }
    }

    /// A child has exited. If it was the relay, its sockets are watched again.
    pub(super) fn see_relay(&mut self, pid: i32) {
        if self.services.relaying != Some(pid) {
            return;
        }
        self.services.relaying = None;
        if let Some(relay) = &mut self.services.relay {
            relay.stop();
            let _ = relay.watch(Interest::Readable);
        }
    }

    fn connect(&mut self, leader: Option<&ProcessHandle>) -> Result<Vec<String>, StartFailure> {
        let (Some(plan), Some(preparation)) = (self.launch_spec.network(), self.network.take())
        else {
            return Ok(Vec::new());
        };
        let prepared = preparation.join().unwrap_or_else(|_| {
            let reason = "the thread that prepares it has panicked".to_owned();
            let cause = Cause::Unknown;
            Err(NetworkError { cause, reason })
        });
        let mut notes = prepared.map_err(refused)?;
        failpoint::hit(&self.task_dir, Failpoint::NetworkPrepared);
        let Some(leader) = leader else {
            return Ok(notes);
        };
        let connected = own_namespace(leader, "net")
            .map_err(|error| failure(StartStep::Network, &error))
            .and_then(|namespace| {
                let namespace = namespace.as_ref().map(AsFd::as_fd);
                network::backend().connect(plan, namespace).map_err(refused)
            });
        match connected {
            // What has no process any more has no namespaces either.
            Err(_) if has_exited(leader) => {}
            connected => notes.extend(self.serve(connected?)?),
        }
        failpoint::hit(&self.task_dir, Failpoint::NetworkConnected);
        Ok(notes)
    }

    /// Begins to serve the connected container. Returns what the user should know.
    fn serve(&mut self, connected: Connected) -> Result<Vec<String>, StartFailure> {
        let dhcp = connected.dhcp;
        let dhcp = dhcp.map(|dhcp| self.events.register(dhcp, Token::Dhcp));
        let relay = connected.relay;
        let relay = relay.map(|relay| self.events.register(relay, Token::Relay));
        let step = |error| failure(StartStep::Network, &error);
        self.services = Services {
            dhcp: dhcp.transpose().map_err(step)?,
            relay: relay.transpose().map_err(step)?,
            relaying: None,
        };
        Ok(connected.notes)
    }
}

fn refused(error: NetworkError) -> StartFailure {
    StartFailure::new(StartStep::Network, error.cause, error.reason)
}
