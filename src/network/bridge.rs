//! The bridges that links are connected to: those of zones, which the driver makes and removes, and those of the host, which it only
//! uses. The bridge of a zone is the gateway of its containers; a bridge of the host is, if it has an address.

use std::fs::File;
use std::io;
use std::net::IpAddr;

use nix::fcntl::Flock;
use nix::ifaddrs::getifaddrs;

use super::link::{GATEWAY, GATEWAY6, index_of};
use super::netlink::Netlink;
use super::{Attachment, NetworkError, NetworkPlan, ZONE_PREFIX, forwarding, lock};
use crate::container::Cause;

/// A bridge to which the container's link is connected.
#[derive(Debug)]
pub(super) struct Bridge {
    pub(super) index: u32,
    /// The addresses that the container's default routes lead to.
    pub(super) gateways: Vec<IpAddr>,
    /// Keeps the bridge of a zone from being removed until the link is connected.
    _lock: Option<Flock<File>>,
}

/// What the user should know about the bridge of the host, or why it can't be used.
pub(super) fn check(plan: &NetworkPlan) -> Result<Option<String>, NetworkError> {
    let Attachment::Bridge(name) = &plan.attachment else {
        return Ok(None);
    };
    index_of(name).map_err(|_| NetworkError {
        // It may be made later.
        cause: Cause::Resources,
        reason: format!("config.network_bridge: the host has no bridge {name:?}"),
    })?;
    let has_ipv4 = addresses(name)?.iter().any(IpAddr::is_ipv4);
    Ok((!has_ipv4).then(|| {
        format!(
            "the bridge {name:?} of the host has no IPv4 address, so the container reaches only what is on the bridge, unless it gets a route from there"
        )
    }))
}

/// The bridge of this plan, made if it is that of a zone; `None` if the link is connected to the host alone.
pub(super) fn find(netlink: &Netlink, plan: &NetworkPlan) -> Result<Option<Bridge>, NetworkError> {
    let step = |what: &'static str| move |error: io::Error| NetworkError::new(what, &error);
    match &plan.attachment {
        Attachment::Host => Ok(None),
        Attachment::Bridge(name) => Ok(Some(Bridge {
            index: index_of(name)?,
            gateways: addresses(name)?,
            _lock: None,
        })),
        Attachment::Zone(zone) => {
            let lock = lock::exclusive().map_err(step("locking the zones"))?;
            let name = zone_name(zone);
            let made = existing_or(netlink.add_bridge(&name));
            made.map_err(step("creating the bridge of the zone"))?;
            let index = index_of(&name)?;
            forwarding::of_container(&name, !plan.ports.is_empty())?;
            let configured = netlink
                .set_up(index)
                .and_then(|()| existing_or(netlink.add_address(index, GATEWAY.into(), 32)))
                .and_then(|()| existing_or(netlink.add_address(index, GATEWAY6.into(), 64)));
            configured.map_err(step("configuring the bridge of the zone"))?;
            Ok(Some(Bridge {
                index,
                gateways: vec![GATEWAY.into(), GATEWAY6.into()],
                _lock: Some(lock),
            }))
        }
    }
}

/// Removes the bridge of a zone, if nothing is connected to it any more.
pub(super) fn remove_unused(netlink: &Netlink, attachment: &Attachment) -> io::Result<()> {
    let Attachment::Zone(zone) = attachment else {
        return Ok(());
    };
    let name = zone_name(zone);
    let _lock = lock::exclusive()?;
    let Ok(index) = index_of(&name) else {
        return Ok(());
    };
    match netlink.has_members(index)? {
        true => Ok(()),
        false => netlink.remove_link(&name),
    }
}

/// The name of the bridge, if there is one.
pub(super) fn name(attachment: &Attachment) -> Option<String> {
    match attachment {
        Attachment::Host => None,
        Attachment::Bridge(name) => Some(name.clone()),
        Attachment::Zone(zone) => Some(zone_name(zone)),
    }
}

fn zone_name(zone: &str) -> String {
    format!("{ZONE_PREFIX}{zone}")
}

/// The first address of each family that others can reach on this interface; of IPv6 the link-local one if there is no other.
fn addresses(interface: &str) -> Result<Vec<IpAddr>, NetworkError> {
    let all =
        getifaddrs().map_err(|error| NetworkError::new("listing addresses", &error.into()))?;
    let mut found: Vec<IpAddr> = all
        .filter(|entry| entry.interface_name == interface)
        .filter_map(|entry| {
            let address = entry.address?;
            let v4 = || Some(IpAddr::V4(address.as_sockaddr_in()?.ip()));
            let v6 = || Some(IpAddr::V6(address.as_sockaddr_in6()?.ip()));
            v4().or_else(v6)
        })
        .collect();
    let is_link_local = |address: &IpAddr| match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    found.sort_by_key(is_link_local);
    let of_family = |wanted: fn(&IpAddr) -> bool| found.iter().copied().find(wanted);
    let first = [of_family(IpAddr::is_ipv4), of_family(IpAddr::is_ipv6)];
    Ok(first.into_iter().flatten().collect())
}

fn existing_or(added: io::Result<()>) -> io::Result<()> {
    match added {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        added => added,
    }
}
