//! Networks of a container's own: addresses from the driver's pool, a link to the host, routes, and host ports that are forwarded. No
//! DHCP client, no systemd-networkd and no systemd-nspawn takes part, on either side. The plugin plans a network ([`NetworkPlan`], part of
//! the launch spec), the supervisor makes it, and a lease releases it. Knows nothing of jobs and of systemd-nspawn.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::container::Cause;

/// The network of one start, as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlan {
    /// `<allocation id>/<task name>`: tags what is made on the host, for people and never as a name.
    pub owner: String,
    /// The name of the host's end of the link: of the driver, and of this start only.
    pub link: String,
    /// The hardware address of the container's end.
    pub mac: [u8; 6],
    /// The container's address.
    pub address: Ipv4Addr,
    /// The container's IPv6 address.
    pub address6: Ipv6Addr,
    /// The ports of the host that are forwarded to it, over TCP and UDP.
    pub ports: Vec<Mapping>,
}

/// A port of the host that is forwarded to one of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The label of the port in the job.
    pub label: String,
    /// The host's only address on which it is forwarded; `None` is every address of the host, loopback ones too.
    pub address: Option<IpAddr>,
    /// The port on the host.
    pub host: u16,
    /// The port in the container.
    pub container: u16,
}

/// Why a network can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NetworkError {
    /// Whether another attempt may succeed.
    pub cause: Cause,
    /// The step and the reason.
    pub reason: String,
}

impl NetworkError {
    /// A step that the kernel, or a program of the host, refused.
    pub fn new(step: &str, error: &io::Error) -> Self {
        Self {
            cause: crate::nspawn::refusal::cause_of_host_error(error),
            reason: format!("{step}: {error}"),
        }
    }
}
