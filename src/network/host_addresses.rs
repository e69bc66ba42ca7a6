//! The addresses of this host, and on which of them a port is forwarded. Nomad allocates every port on one address: without a
//! `host_network` on the host's default one, and then it is forwarded on every address, as it always was with systemd-nspawn; otherwise only
//! on that one. Addresses on interfaces that lead only to containers of this host do not count as the host's.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;

use super::{LINK_PREFIX, Mapping, NetworkError};
use crate::container::{Cause, PortForward};
use crate::nspawn::refusal::cause_of_host_error;

/// How the names of the host's ends of containers' veth pairs begin: those of the driver, of systemd-nspawn, and those of
/// Docker and CNI, Nomad's group networks included.
const CONTAINER_LINKS: [&str; 4] = [LINK_PREFIX, "ve-", "vb-", "veth"];

/// The addresses of the host on which a forwarded port can be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// All addresses, without loopback and link-local ones and without those in `container`.
    pub all: Vec<IpAddr>,
    /// Addresses on interfaces that lead only to containers of this host.
    pub container: Vec<IpAddr>,
    /// The source addresses of the host's default routes, at most one of each family.
    pub default: Vec<IpAddr>,
}

impl Addresses {
    /// The addresses of this host. Sends no packets. Fails if the host is short of memory or descriptors.
    pub fn of_this_host() -> io::Result<Self> {
        let mut found = Self::default();
        for interface in nix::ifaddrs::getifaddrs()? {
            let Some(address) = interface.address.as_ref().and_then(ip) else {
                continue;
            };
            if address.is_loopback() || is_link_local(address) {
                continue;
            }
            let list = match is_for_containers(&interface.interface_name, "/sys/class/net".as_ref())
            {
                true => &mut found.container,
                false => &mut found.all,
            };
            list.push(address);
        }
        for list in [&mut found.all, &mut found.container] {
            list.sort();
            list.dedup();
        }
        // Addresses reserved for documentation, which only a default route leads to. Connecting a datagram socket
        // queries the routing table and sends nothing.
        let outside = [
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        ];
        for destination in outside {
            found
                .default
                .extend(none_without_route(source_for(destination))?);
        }
        Ok(found)
    }
}

/// Whether an interface leads only to containers of this host: a container's veth pair, or a bridge without any other
/// member. `interfaces` is `/sys/class/net`.
fn is_for_containers(interface: &str, interfaces: &Path) -> bool {
    let is_link = |name: &str| CONTAINER_LINKS.iter().any(|begin| name.starts_with(begin));
    // Only a bridge has this directory.
    let Ok(members) = fs::read_dir(interfaces.join(interface).join("brif")) else {
        return is_link(interface);
    };
    members
        .map(|member| member.map(|member| member.file_name()))
        .all(|name| name.is_ok_and(|name| name.to_str().is_some_and(is_link)))
}

fn ip(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = || Some(IpAddr::V4(address.as_sockaddr_in()?.ip()));
    let v6 = || Some(IpAddr::V6(address.as_sockaddr_in6()?.ip()));
    v4().or_else(v6)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// The source address that this host would use for a destination.
fn source_for(destination: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match destination {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(SocketAddr::new(destination, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// `None` if the error says that there is no route or no such address family, in one of the several ways in which the
/// kernel says so. An error for lack of memory or descriptors says nothing about routes.
fn none_without_route(source: io::Result<IpAddr>) -> io::Result<Option<IpAddr>> {
    match source {
        Ok(address) => Ok(Some(address)),
        Err(error) if cause_of_host_error(&error) == Cause::Unknown => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where these ports are forwarded, with notes for the user; or why one of them can't be.
pub fn place(
    ports: &[PortForward],
    host: &Addresses,
) -> Result<(Vec<Mapping>, Vec<String>), NetworkError> {
    let mut notes = Vec::new();
    let placed = ports.iter().map(|port| {
        let address = only_address(port, host, &mut notes)?;
        Ok(Mapping {
            label: port.label.clone(),
            address,
            host: port.host,
            container: port.container,
        })
    });
    let mappings = placed.collect::<Result<Vec<_>, _>>()?;
    Ok((mappings, notes))
}

/// The only address on which a port is forwarded; `None` is every one.
fn only_address(
    port: &PortForward,
    host: &Addresses,
    notes: &mut Vec<String>,
) -> Result<Option<IpAddr>, NetworkError> {
    let Some(address) = port.address else {
        return Ok(None);
    };
    if address.is_loopback() {
        return Ok(Some(address));
    }
    if !host.all.contains(&address) && !host.container.contains(&address) {
        return Err(NetworkError {
            // An interface that is missing may come back.
            cause: Cause::Resources,
            reason: format!(
                "port {:?} is allocated on {address}, which this host does not have at the moment. Check the host's interfaces; if they are \
                 correct, correct network_interface or host_network in the agent's client block",
                port.label
            ),
        });
    }
    if !host.default.is_empty() && !host.default.contains(&address) {
        return Ok(Some(address));
    }
    let others: Vec<&IpAddr> = host.all.iter().filter(|other| **other != address).collect();
    if !others.is_empty() {
        notes.push(note(port, address, &others));
    }
    Ok(None)
}

fn note(port: &PortForward, address: IpAddr, others: &[&IpAddr]) -> String {
    let (label, number) = (&port.label, port.host);
    let shown: Vec<String> = others.iter().take(3).map(ToString::to_string).collect();
    let more = match others.len().saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "port {label:?} ({number}) can be reached on all addresses of this host, also on {}{more}, because it is allocated on the default one, \
         {address}. To restrict it to one address, set host_network in the port block",
        shown.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use rstest::rstest;

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Where a port on `address` is forwarded, on a host with these addresses and these default ones, and the notes.
    fn placed(
        address: Option<&str>,
        all: &[&str],
        default: &[&str],
    ) -> Result<(Option<IpAddr>, Vec<String>), NetworkError> {
        let port = PortForward {
            label: "http".to_owned(),
            address: address.map(|text| text.parse().unwrap()),
            host: 25000,
            container: 80,
        };
        let host = Addresses {
            all: addresses(all),
            container: addresses(&["172.17.0.1"]),
            default: addresses(default),
        };
        let (mappings, notes) = place(&[port], &host)?;
        Ok((mappings[0].address, notes))
    }

    #[rstest]
    #[case::no_address(None, &["192.0.2.2", "10.0.0.5"], &["192.0.2.2"])]
    #[case::the_only_one(Some("192.0.2.2"), &["192.0.2.2"], &["192.0.2.2"])]
    #[case::the_only_one_without_a_route(Some("10.0.0.5"), &["10.0.0.5"], &[])]
    fn a_port_without_host_network_is_on_every_address(
        #[case] address: Option<&str>,
        #[case] all: &[&str],
        #[case] default: &[&str],
    ) {
        assert_eq!(placed(address, all, default).unwrap(), (None, Vec::new()));
    }

    #[rstest]
    #[case::a_private_interface("10.0.0.5", &["10.0.0.5", "192.0.2.2"], &["192.0.2.2"])]
    #[case::a_private_address_of_the_default_interface("10.0.0.5", &["10.0.0.5", "192.0.2.2", "fd00::2"], &["192.0.2.2", "fd00::2"])]
    #[case::another_family("192.0.2.2", &["192.0.2.2", "fd00::2"], &["fd00::2"])]
    #[case::a_bridge_of_containers("172.17.0.1", &["192.0.2.2"], &["192.0.2.2"])]
    #[case::loopback("127.0.0.1", &["192.0.2.2"], &["192.0.2.2"])]
    #[case::loopback_alone("::1", &[], &[])]
    fn a_port_on_another_address_is_on_that_one_only(
        #[case] address: &str,
        #[case] all: &[&str],
        #[case] default: &[&str],
    ) {
        let want = Some(address.parse().unwrap());
        let found = placed(Some(address), all, default).unwrap();
        assert_eq!(found, (want, Vec::new()));
    }

    #[rstest]
    #[case::not_of_this_host("203.0.113.7", &["192.0.2.2"], &["192.0.2.2"])]
    #[case::no_address_at_all("192.0.2.2", &[], &[])]
    fn a_missing_address_is_recoverable(
        #[case] address: &str,
        #[case] all: &[&str],
        #[case] default: &[&str],
    ) {
        let NetworkError { cause, reason } = placed(Some(address), all, default).unwrap_err();
        assert!(cause.is_recoverable(), "{cause:?}");
        for part in ["\"http\"", address, "network_interface", "host_network"] {
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[rstest]
    #[case::the_default_one(&["10.0.0.5", "10.0.1.5", "192.0.2.2", "fd00::2", "fd00::3"], &["192.0.2.2"], "also on 10.0.0.5, 10.0.1.5, fd00::2 and 1 more,")]
    #[case::without_a_route(&["10.0.0.5", "192.0.2.2"], &[], "also on 10.0.0.5,")]
    fn an_event_lists_the_other_addresses(
        #[case] all: &[&str],
        #[case] default: &[&str],
        #[case] want: &str,
    ) {
        let (address, notes) = placed(Some("192.0.2.2"), all, default).unwrap();
        assert_eq!(address, None);
        let [note] = notes.as_slice() else {
            panic!("{notes:?}")
        };
        for part in ["\"http\" (25000)", "the default one, 192.0.2.2", want] {
            assert!(note.contains(part), "{note}");
        }
    }

    #[rstest]
    #[case::descriptors(Errno::EMFILE, false)]
    #[case::memory(Errno::ENOMEM, false)]
    #[case::no_route(Errno::ENETUNREACH, true)]
    #[case::a_route_that_rejects(Errno::EHOSTUNREACH, true)]
    #[case::no_such_family(Errno::EAFNOSUPPORT, true)]
    #[case::no_address(Errno::EADDRNOTAVAIL, true)]
    fn an_error_is_not_taken_for_a_missing_route(#[case] errno: Errno, #[case] no_route: bool) {
        let result = none_without_route(Err(errno.into()));
        assert_eq!(result.ok(), no_route.then_some(None));
    }

    #[rstest]
    #[case::systemd_nspawn("ve-web", false, &[], true)]
    #[case::a_zone("vz-web", true, &["vb-a", "vb-b"], true)]
    #[case::without_containers("docker0", true, &[], true)]
    #[case::of_containers("nomad", true, &["veth1a2b"], true)]
    #[case::with_an_uplink("br0", true, &["veth1a2b", "eth0"], false)]
    #[case::a_network_card("eth0", false, &[], false)]
    fn interfaces_for_containers_are_recognized(
        #[case] name: &str,
        #[case] is_bridge: bool,
        #[case] members: &[&str],
        #[case] expected: bool,
    ) {
        let interfaces = tempfile::tempdir().unwrap();
        let members_of = interfaces.path().join(name).join("brif");
        if is_bridge {
            fs::create_dir_all(&members_of).unwrap();
        }
        for member in members {
            fs::create_dir(members_of.join(member)).unwrap();
        }
        assert_eq!(is_for_containers(name, interfaces.path()), expected);
    }

    #[test]
    fn the_default_address_is_one_of_the_host_s() {
        let host = Addresses::of_this_host().unwrap();
        for address in &host.default {
            assert!(host.all.contains(address), "{host:?}");
        }
        assert!(!host.all.iter().any(IpAddr::is_loopback), "{host:?}");
    }
}
