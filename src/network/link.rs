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
use super::{NetworkError, NetworkPlan, forwarding, unprivileged};
use crate::container::Cause;

/// The name of the container's end, as systemd-nspawn names it.
pub const INSIDE: &str = "host0";

/// The host's address on every link. Nothing outside the link ever sees it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same of IPv6.
pub(super) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Makes the link between the host and this network namespace, in which nothing of it exists yet.
pub(super) fn connect(plan: &NetworkPlan, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let link = &*plan.link;
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    let netlink = Netlink::open().map_err(step("opening a netlink socket"))?;
    let peer = Peer {
        name: INSIDE,
        mac: plan.mac,
        namespace,
    };
    let made = netlink.add_veth(link, &peer);
    made.map_err(step("creating the link of the container"))?;
    let has_ipv6 = has_ipv6(link);
    inside(plan, namespace, has_ipv6)?;
    host_end(&netlink, plan, has_ipv6)
}

/// Removes the link. One that does not exist is success.
pub(super) fn disconnect(plan: &NetworkPlan) -> io::Result<()> {
    Netlink::open()?.remove_link(&plan.link)
}

fn host_end(netlink: &Netlink, plan: &NetworkPlan, has_ipv6: bool) -> Result<(), NetworkError> {
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    let index = index_of(&plan.link)?;
    forwarding::of_container(&plan.link)?;
    let mut addresses = vec![(IpAddr::from(GATEWAY), 32, IpAddr::from(plan.address))];
    if has_ipv6 {
        addresses.push((GATEWAY6.into(), 64, plan.address6.into()));
    }
    netlink
        .set_up(index)
        .map_err(step("setting the link of the container up"))?;
    for (gateway, prefix, container) in addresses {
        netlink
            .add_address(index, gateway, prefix)
            .map_err(step("adding the gateway's address"))?;
        netlink
            .add_host_route(index, container)
            .map_err(|error| refused_route(container, &error))?;
    }
    Ok(())
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
) -> Result<(), NetworkError> {
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    let configure = || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|error| step("entering the network of the container")(error.into()))?;
        unprivileged::open_network(|_| false);
        let netlink =
            Netlink::open().map_err(step("opening a netlink socket in the container's network"))?;
        let index = index_of(INSIDE)?;
        let configured = configure_inside(&netlink, index, plan, has_ipv6);
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

fn configure_inside(
    netlink: &Netlink,
    index: u32,
    plan: &NetworkPlan,
    has_ipv6: bool,
) -> io::Result<()> {
    netlink.add_address(index, plan.address.into(), 32)?;
    netlink.set_up(index)?;
    netlink.add_host_route(index, GATEWAY.into())?;
    netlink.add_default_route(index, GATEWAY.into())?;
    if has_ipv6 {
        netlink.add_address(index, plan.address6.into(), 128)?;
        netlink.add_default_route(index, GATEWAY6.into())?;
    }
    Ok(())
}

/// Whether the host has IPv6, and has not switched it off for new links.
fn has_ipv6(link: &str) -> bool {
    let file = Path::new("/proc/sys/net/ipv6/conf")
        .join(link)
        .join("disable_ipv6");
    fs::read_to_string(file).is_ok_and(|text| text.trim() == "0")
}

fn index_of(link: &str) -> Result<u32, NetworkError> {
    let step = format!("finding the interface {link}");
    if_nametoindex(link).map_err(|error| NetworkError::new(&step, &error.into()))
}
