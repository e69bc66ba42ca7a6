//! Plans the network that the driver makes for a container: reserves its addresses, and decides where its ports are forwarded. Finds the
//! interfaces of the host that the container uses.

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::Settings;
use crate::backend::BackendError;
use crate::container::{Cause, ContainerSpec, HostInterface, Link, NetworkNamespace, PortForward};
use crate::network::host_addresses::{self, Addresses};
use crate::network::{Attachment, Mapping, NetworkError, NetworkPlan, pool};
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::TaskDir;

/// The network of a start, and what the user should know about it.
#[derive(Debug, Default)]
pub(super) struct OwnNetwork {
    /// `None` if the driver makes none.
    pub(super) plan: Option<NetworkPlan>,
    pub(super) notes: Vec<String>,
}

/// Plans the network of the start in this task directory.
pub(super) fn plan(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    settings: &Settings,
) -> Result<OwnNetwork, BackendError> {
    let NetworkNamespace::Private {
        link,
        ports,
        interfaces,
    } = &spec.network.namespace
    else {
        return Ok(OwnNetwork::default());
    };
    let failed = |error: NetworkError| BackendError::Start {
        machine: spec.identity.machine.clone(),
        step: "planning its network",
        reason: error.reason,
        cause: error.cause,
    };
    interfaces.iter().try_for_each(find).map_err(failed)?;
    let (ports, notes) = place(ports).map_err(failed)?;
    let attachment = match link {
        Link::None => return Ok(OwnNetwork::default()),
        Link::Routed => Attachment::Host,
        Link::Zone(zone) => Attachment::Zone(zone.clone()),
        Link::Bridge(bridge) => Attachment::Bridge(bridge.clone()),
    };
    let path = task_dir.path();
    let leaf = path.file_name().unwrap_or_default().to_string_lossy();
    // Without the number of the start: a task keeps its addresses when it is restarted.
    let owner = spec.identity.owner();
    let pool = &settings.network_pool;
    let reserved = pool::reserve(pool, &settings.state_dir, path, owner).map_err(failed)?;
    let plan = NetworkPlan::new(owner.to_owned(), &leaf, attachment, reserved, ports);
    Ok(OwnNetwork {
        plan: Some(plan),
        notes,
    })
}

/// Checks that the host has this interface. systemd-nspawn would notice it when it has moved others already, and its message has no option.
fn find(interface: &HostInterface) -> Result<(), NetworkError> {
    let option = interface.mode.option();
    match if_nametoindex(&*interface.name) {
        Ok(_) => Ok(()),
        Err(Errno::ENODEV) => Err(NetworkError {
            // It may be made later, or another container has it to itself.
            cause: Cause::Resources,
            reason: format!("{option}: the host has no interface {:?}", interface.name),
        }),
        Err(error) => {
            let step = format!("{option}: finding the interface {:?}", interface.name);
            Err(NetworkError::new(&step, &error.into()))
        }
    }
}

fn place(ports: &[PortForward]) -> Result<(Vec<Mapping>, Vec<String>), NetworkError> {
    // Without addresses there is nothing to look up that could fail.
    if ports.iter().all(|port| port.address.is_none()) {
        return host_addresses::place(ports, &Addresses::default());
    }
    let host = Addresses::of_this_host().map_err(|error| NetworkError {
        cause: cause_of_host_error(&error),
        reason: format!("the addresses of this host can't be read: {error}"),
    })?;
    host_addresses::place(ports, &host)
}
