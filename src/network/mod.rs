//! Networks of a container's own: addresses from the driver's pool, a link to the host, routes, and host ports that are forwarded. No
//! DHCP client, no systemd-networkd and no systemd-nspawn takes part, on either side. The plugin plans a network ([`NetworkPlan`], part of
//! the launch spec), the supervisor makes it, and a lease releases it. Knows nothing of jobs and of systemd-nspawn.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use self::dhcp::DhcpResponder;
use self::pool::Reserved;
use self::relay::Relay;
use crate::container::Cause;

mod bridge;
pub mod conntrack;
pub mod dhcp;
mod exchange;
pub mod firewall;
mod forwarding;
pub mod host_addresses;
pub mod host_ports;
mod link;
mod lock;
mod netlink;
pub mod orphans;
pub mod pool;
mod ports;
pub mod relay;
#[cfg(test)]
mod testing;
mod unprivileged;
pub mod watch;

pub use link::{GATEWAY, INSIDE, new_links_have_ipv6};
pub use unprivileged::open_network;

/// How the name of the host's end of a container's link begins.
pub const LINK_PREFIX: &str = "nd-";

/// How the name of the bridge of a zone begins.
pub const ZONE_PREFIX: &str = "nz-";

/// Whether an interface of the host is one that the driver has made.
fn is_of_containers(interface: &str) -> bool {
    [LINK_PREFIX, ZONE_PREFIX]
        .iter()
        .any(|prefix| interface.starts_with(prefix))
}

/// The network of one start, as it is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlan {
    /// `<allocation id>/<task name>`: tags what is made on the host, for people and never as a name.
    pub owner: String,
    /// The name of the host's end of the link: of the driver, and of this start only.
    pub link: String,
    /// What the host's end is connected to.
    #[serde(default)]
    pub attachment: Attachment,
    /// The hardware address of the container's end.
    pub mac: [u8; 6],
    /// The container's address.
    pub address: Ipv4Addr,
    /// The container's IPv6 address.
    pub address6: Ipv6Addr,
    /// The ports of the host that are forwarded to it, over TCP and UDP.
    pub ports: Vec<Mapping>,
}

/// What the host's end of a link is connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attachment {
    /// The host alone.
    #[default]
    Host,
    /// The bridge of a zone, which the driver makes with the first container of the zone and removes with the last.
    Zone(String),
    /// A bridge of the host.
    Bridge(String),
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

impl fmt::Display for Mapping {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(text, "port {:?} ({})", self.label, self.host)?;
        match self.address {
            Some(address) => write!(text, " on {address}"),
            None => Ok(()),
        }
    }
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

impl NetworkPlan {
    /// The plan for the start with this task directory, whose name no other start has.
    pub fn new(
        owner: String,
        task_dir: &str,
        attachment: Attachment,
        reserved: Reserved,
        ports: Vec<Mapping>,
    ) -> Self {
        let hash = Sha256::digest(format!("mac {owner}"));
        Self {
            link: link_name(task_dir),
            attachment,
            // Locally administered, and of one interface.
            mac: [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]],
            address: reserved.address,
            address6: reserved.address6,
            owner,
            ports,
        }
    }
}

impl NetworkPlan {
    /// The interface of the host on which packets of the container arrive, if they are only those of containers of the driver.
    fn arrives_on(&self) -> Option<String> {
        match &self.attachment {
            Attachment::Host => Some(self.link.clone()),
            Attachment::Zone(_) => bridge::name(&self.attachment),
            Attachment::Bridge(_) => None,
        }
    }
}

/// The name of the host's end of the link of a start: it follows from the name of its task directory, so a record can't name another link.
pub fn link_name(task_dir: &str) -> String {
    let hash = Sha256::digest(task_dir);
    let digits = hash[..6].iter().map(|byte| format!("{byte:02x}"));
    [LINK_PREFIX.to_owned()].into_iter().chain(digits).collect()
}

/// What makes the networks that the plugin has planned. Runs in the supervisor, and in the plugin where that has to repair something.
pub trait NetworkBackend: fmt::Debug + Send + Sync {
    /// Does what needs no container, while systemd-nspawn starts. Returns what the user should know.
    fn prepare(&self, plan: &NetworkPlan) -> Result<Vec<String>, NetworkError>;

    /// Connects the network namespace of a container in which nothing of the job runs yet. `None` is a container that has none of its own.
    fn connect(
        &self,
        plan: &NetworkPlan,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Connected, NetworkError>;

    /// Makes again what others have removed from the host's firewall. Returns whether they have.
    fn restore(&self, plan: &NetworkPlan) -> Result<bool, NetworkError>;

    /// Undoes it all, as far as it was done. May be repeated.
    fn release(&self, plan: &NetworkPlan) -> io::Result<()>;
}

/// What serves a container that is connected, as long as it runs.
#[derive(Debug, Default)]
pub struct Connected {
    /// Answers its DHCP client.
    pub dhcp: Option<DhcpResponder>,
    /// Forwards what arrives on `::1`.
    pub relay: Option<Relay>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// The backend for this process.
pub fn backend() -> &'static dyn NetworkBackend {
    match nix::unistd::geteuid().is_root() {
        true => &HostNetwork,
        false => &NoNetwork,
    }
}

/// The real one: netlink, nftables and kernel settings.
#[derive(Debug)]
struct HostNetwork;

impl NetworkBackend for HostNetwork {
    fn prepare(&self, plan: &NetworkPlan) -> Result<Vec<String>, NetworkError> {
        let bridge = bridge::check(plan)?;
        host_ports::check_free(&plan.ports)?;
        let mut notes = forwarding::of_host(plan)?;
        notes.extend(bridge);
        notes.extend(ports::open(plan)?);
        Ok(notes)
    }

    fn connect(
        &self,
        plan: &NetworkPlan,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Connected, NetworkError> {
        let namespace = namespace.ok_or_else(|| NetworkError {
            cause: Cause::Unknown,
            reason: "the container has no network namespace of its own".to_owned(),
        })?;
        link::connect(plan, namespace)?;
        let (relay, notes) = Relay::bind(plan);
        Ok(Connected {
            dhcp: dhcp::of_container(plan)?,
            relay: Some(relay),
            notes,
        })
    }

    fn restore(&self, plan: &NetworkPlan) -> Result<bool, NetworkError> {
        ports::restore(plan)
    }

    fn release(&self, plan: &NetworkPlan) -> io::Result<()> {
        let closed = ports::close(plan);
        link::disconnect(plan).and(closed)
    }
}

/// That of a driver without privileges, which can make no network. Its containers start all the same, as they do without cgroups.
#[derive(Debug)]
struct NoNetwork;

impl NetworkBackend for NoNetwork {
    fn prepare(&self, _: &NetworkPlan) -> Result<Vec<String>, NetworkError> {
        let note = "the network of this task has no link to the host, no address and no ports, because the driver does not run as root";
        Ok(vec![note.to_owned()])
    }

    fn connect(
        &self,
        _: &NetworkPlan,
        _: Option<BorrowedFd<'_>>,
    ) -> Result<Connected, NetworkError> {
        Ok(Connected::default())
    }

    fn restore(&self, _: &NetworkPlan) -> Result<bool, NetworkError> {
        Ok(false)
    }

    fn release(&self, _: &NetworkPlan) -> io::Result<()> {
        Ok(())
    }
}
