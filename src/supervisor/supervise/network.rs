//! The network that the driver makes for the container: prepared while systemd-nspawn starts, connected when there is a network namespace
//! and before anything of the job runs in it. Runs in the supervisor process.

use std::io;
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use super::inside::{has_exited, own_namespace};
use super::{Supervisor, failure};
use crate::container::{Cause, StartedNetwork};
use crate::failpoint::{self, Failpoint};
use crate::network::{self, NetworkError, NetworkPlan};
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
        let notes = prepared.map_err(refused)?;
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
            connected => connected?,
        }
        failpoint::hit(&self.task_dir, Failpoint::NetworkConnected);
        Ok(notes)
    }
}

fn refused(error: NetworkError) -> StartFailure {
    StartFailure::new(StartStep::Network, error.cause, error.reason)
}
