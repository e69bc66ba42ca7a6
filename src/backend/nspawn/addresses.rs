//! Finds the addresses of a container, and of the network of a group.

use std::fs;
use std::net::IpAddr;

use crate::backend::BackendError;
use crate::container::{Cause, ContainerSpec, NetworkNamespace, Process};
use crate::sys::netns::{Netns, NetnsError};
use crate::sys::process::is_alive;
use crate::sys::procfs::parse_addresses;

/// The addresses in the network namespace that a container is to join, without loopback ones; empty if it joins none. Fails if the
/// namespace does not exist or is the host's: the container would otherwise be in the host's.
pub(super) fn of_joined(spec: &ContainerSpec) -> Result<Vec<IpAddr>, BackendError> {
    let (step, whose, opened) = match &spec.network.namespace {
        NetworkNamespace::Join(path) => {
            let whose = format!("the network namespace {}", path.display());
            (
                "checking the network of its group",
                whose,
                Netns::open(path),
            )
        }
        NetworkNamespace::OfTask { task, leader } => {
            let opened = leader
                .ok_or(NetnsError::Missing)
                .and_then(Netns::of_process);
            let whose = format!("the network of the task {task:?}");
            ("checking the network of another task", whose, opened)
        }
        NetworkNamespace::Host | NetworkNamespace::Private { .. } => return Ok(Vec::new()),
    };
    let found = opened.and_then(|namespace| namespace.addresses());
    found.map_err(|error| BackendError::Start {
        machine: spec.identity.machine.clone(),
        step,
        reason: format!("{whose}: {error}"),
        cause: match error {
            NetnsError::OfHost => Cause::Config,
            // Nomad makes the namespace again after a reboot, and starts the other task again.
            _ => Cause::Resources,
        },
    })
}

/// The addresses in the network namespace of a container with this first process, without loopback ones. Empty in the host's network, and
/// once the process has exited.
pub(super) fn of_container(leader: Process) -> Vec<IpAddr> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let own = namespace(&leader.pid.to_string());
    if own.is_none() || own == namespace("self") {
        return Vec::new();
    }
    let text = |file: &str| {
        let path = format!("/proc/{}/net/{file}", leader.pid);
        fs::read_to_string(path).unwrap_or_default()
    };
    let found = parse_addresses(&text("fib_trie"), &text("if_inet6"));
    // Checked last: then everything before was read from this process and not from a later one with its pid.
    match is_alive(leader) {
        true => found,
        false => Vec::new(),
    }
}
