//! The link of a container to the host: a veth pair, with addresses and routes on both ends, and the settings of the host's end. All of it
//! ends with the network namespace of the container.
//!
//! ```text
//!   container                                    host
//!   host0  ADDRESS/32, ADDRESS6/128  ─────────  nd-…  169.254.1.1/32, fe80::1/64
//!   default via 169.254.1.1, fe80::1             ADDRESS dev nd-…, ADDRESS6 dev nd-…
//! ```
//!
//! Each address is routed by itself, so no two containers share a network segment, and no subnet has to be shared out.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};

use super::netlink::{Netlink, Peer};
use super::{Attachment, NetworkError, NetworkPlan, bridge, forwarding, unprivileged};
use crate::container::Cause;

/// The name of the container's end, as systemd-nspawn names it.
pub const INSIDE: &str = "host0";

/// The host's address on every link. Nothing outside the link ever sees it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same of IPv6.
pub(super) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The metric of a default route that leads to a bridge of the host: one that the container gets there has a lower one.
const LAST_METRIC: u32 = 4096;

/// Makes the link between the host and this network namespace, in which nothing of it exists yet.
pub(super) fn connect(plan: &NetworkPlan, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    let netlink = Netlink::open().map_err(step("opening a netlink socket"))?;
    let bridge = bridge::find(&netlink, plan)?;
    let peer = Peer {
        name: INSIDE,
        mac: plan.mac,
        namespace,
    };
    let index = bridge.as_ref().map(|bridge| bridge.index);
    let made = netlink.add_veth(&plan.link, index, &peer);
    made.map_err(step("creating the link of the container"))?;
    let link = index_of(&plan.link)?;
    netlink
        .set_up(link)
        .map_err(step("setting the link of the container up"))?;
    let has_ipv6 = has_ipv6(&plan.link);
    let gateways = match &bridge {
        Some(bridge) => bridge.gateways.clone(),
        None => {
            forwarding::of_container(&plan.link, !plan.ports.is_empty())?;
            let gateways = vec![GATEWAY.into(), GATEWAY6.into()];
            add_gateways(&netlink, link, &gateways, has_ipv6)
                .map_err(step("adding the gateway's address"))?;
            gateways
        }
    };
    let metric = match plan.attachment {
        Attachment::Bridge(_) => LAST_METRIC,
        Attachment::Host | Attachment::Zone(_) => 0,
    };
    inside(plan, namespace, has_ipv6, (&gateways, metric))?;
    for to in addresses(plan, has_ipv6) {
        netlink
            .add_host_route(index.unwrap_or(link), to)
            .map_err(|error| refused_route(to, &error))?;
    }
    Ok(())
}

/// Removes the link, and what it has left on a bridge. What does not exist is success.
pub(super) fn disconnect(plan: &NetworkPlan) -> io::Result<()> {
    let netlink = Netlink::open()?;
    netlink.remove_link(&plan.link)?;
    // Other routes go with the link.
    if let Some(name) = bridge::name(&plan.attachment)
        && let Ok(index) = index_of(&name)
    {
        for to in addresses(plan, true) {
            netlink.remove_host_route(index, to)?;
        }
    }
    bridge::remove_unused(&netlink, &plan.attachment)
}

/// The addresses of the container.
fn addresses(plan: &NetworkPlan, has_ipv6: bool) -> impl Iterator<Item = IpAddr> {
    let address6 = has_ipv6.then_some(IpAddr::from(plan.address6));
    [IpAddr::from(plan.address)].into_iter().chain(address6)
}

fn add_gateways(
    netlink: &Netlink,
    index: u32,
    gateways: &[IpAddr],
    has_ipv6: bool,
) -> io::Result<()> {
    gateways
        .iter()
        .filter(|gateway| gateway.is_ipv4() || has_ipv6)
        .try_for_each(|gateway| {
            netlink.add_address(index, *gateway, if gateway.is_ipv4() { 32 } else { 64 })
        })
}

fn refused_route(to: IpAddr, error: &io::Error) -> NetworkError {
    if error.kind() == io::ErrorKind::AlreadyExists {
        return NetworkError {
            cause: Cause::Busy,
            reason: format!("the host has a route to {to} already"),
        };
    }
    NetworkError::new(&format!("adding the route to {to}"), error)
}

/// Configures the container's end, from a thread in its network namespace.
fn inside(
    plan: &NetworkPlan,
    namespace: BorrowedFd<'_>,
    has_ipv6: bool,
    (gateways, metric): (&[IpAddr], u32),
) -> Result<(), NetworkError> {
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    let configure = || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|error| step("entering the network of the container")(error.into()))?;
        unprivileged::open_network(|_| false);
        let netlink =
            Netlink::open().map_err(step("opening a netlink socket in the container's network"))?;
        let index = index_of(INSIDE)?;
        let configured = addresses(plan, has_ipv6)
            .try_for_each(|address| {
                let prefix = if address.is_ipv4() { 32 } else { 128 };
                netlink.add_address(index, address, prefix)
            })
            .and_then(|()| netlink.set_up(index))
            .and_then(|()| {
                let mut usable = gateways
                    .iter()
                    .filter(|gateway| gateway.is_ipv4() || has_ipv6);
                usable.try_for_each(|gateway| add_gateway(&netlink, index, *gateway, metric))
            });
        configured.map_err(step("configuring the container's end of its link"))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, configure);
        let thread = thread.map_err(step("starting a thread"))?;
        thread.join().unwrap_or_else(|_| {
            let error = io::Error::other("the thread has panicked");
            Err(NetworkError::new("configuring the container's end", &error))
        })
    })
}

/// Adds a default route, and one to its gateway, without which some programs do not accept it.
fn add_gateway(netlink: &Netlink, index: u32, gateway: IpAddr, metric: u32) -> io::Result<()> {
    if gateway.is_ipv4() {
        netlink.add_host_route(index, gateway)?;
    }
    netlink.add_default_route(index, gateway, metric)
}

/// Whether new links of the host have IPv6.
pub fn new_links_have_ipv6() -> bool {
    has_ipv6("default")
}

/// Whether the host has IPv6, and has not switched it off for new links.
fn has_ipv6(link: &str) -> bool {
    let file = Path::new("/proc/sys/net/ipv6/conf")
        .join(link)
        .join("disable_ipv6");
    fs::read_to_string(file).is_ok_and(|text| text.trim() == "0")
}

/// The index of an interface of this thread's network namespace.
pub(super) fn index_of(link: &str) -> Result<u32, NetworkError> {
    let step = format!("finding the interface {link}");
    if_nametoindex(link).map_err(|error| NetworkError::new(&step, &error.into()))
}
