//! Checks ports that Nomad allocated on one address of the host. systemd-nspawn's `--port=` takes no address: it
//! forwards what arrives at any address of the host except loopback ones. So a port of one address is forwarded only
//! where that address is the only one, or is the host's default address, on which Nomad allocates every port without a
//! `host_network`; all others are rejected.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::container::PortForward;

/// The addresses of the host on which a forwarded port can be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// All addresses, without loopback and link-local ones.
    pub all: Vec<IpAddr>,
    /// The source addresses of the host's default routes, at most one of each family.
    pub default: Vec<IpAddr>,
}

impl Addresses {
    /// The addresses of this host. Sends no packets.
    pub fn of_this_host() -> Self {
        let mut all: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
            .into_iter()
            .flatten()
            .filter_map(|interface| ip(interface.address.as_ref()?))
            .filter(|address| !address.is_loopback() && !is_link_local(*address))
            .collect();
        all.sort();
        all.dedup();
        // Addresses reserved for documentation, which only a default route leads to. Connecting a datagram socket
        // queries the routing table and sends nothing.
        let outside = [
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        ];
        Self {
            all,
            default: outside.into_iter().filter_map(source_for).collect(),
        }
    }
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
fn source_for(destination: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match destination {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(destination, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Notes for the user about these ports, one sentence each, or why one of them can't be forwarded.
pub fn check(ports: &[PortForward], host: &Addresses) -> Result<Vec<String>, String> {
    let result = ports.iter().map(|port| check_one(port, host));
    Ok(result
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

fn check_one(port: &PortForward, host: &Addresses) -> Result<Option<String>, String> {
    let Some(address) = port.address else {
        return Ok(None);
    };
    let (label, number) = (&port.label, port.host);
    let others: Vec<&IpAddr> = host.all.iter().filter(|other| **other != address).collect();
    let alone = others.is_empty() && host.all.contains(&address);
    if address.is_loopback() || !(alone || host.default.contains(&address)) {
        let reach = match address.is_loopback() {
            true => "any address of this host except loopback ones",
            false => "any address of this host, of which this is not the default one",
        };
        return Err(format!(
            "port {label:?} is allotted on {address}, and systemd-nspawn can't forward a port on one address: it would be reached on {reach}. \
             Use a group network in mode \"bridge\", in which Nomad forwards it; or leave it out of config.ports and config.port_map and let the \
             task listen on that address in the host's network; or remove host_network from the port"
        ));
    }
    if alone {
        return Ok(None);
    }
    let shown: Vec<String> = others.iter().take(3).map(ToString::to_string).collect();
    let more = match others.len().saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Ok(Some(format!(
        "port {label:?} ({number}) is allotted on {address}, but it can be reached on every address of this host, also on {}{more}: \
         systemd-nspawn can't forward a port on one address. To restrict it, use a group network in mode \"bridge\" or a firewall",
        shown.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The result for a port on `address`, on a host with these addresses and these default ones.
    fn checked(
        address: Option<&str>,
        all: &[&str],
        default: &[&str],
    ) -> Result<Vec<String>, String> {
        let port = PortForward {
            label: "http".to_owned(),
            address: address.map(|text| text.parse().unwrap()),
            host: 25000,
            container: 80,
        };
        let host = Addresses {
            all: addresses(all),
            default: addresses(default),
        };
        check(&[port], &host)
    }

    #[rstest]
    #[case::no_address(None, &["192.0.2.2", "10.0.0.5"], &["192.0.2.2"])]
    #[case::the_only_one(Some("192.0.2.2"), &["192.0.2.2"], &["192.0.2.2"])]
    #[case::the_only_one_without_a_route(Some("10.0.0.5"), &["10.0.0.5"], &[])]
    fn a_port_that_is_forwarded_as_it_was_allotted_needs_no_event(
        #[case] address: Option<&str>,
        #[case] all: &[&str],
        #[case] default: &[&str],
    ) {
        assert_eq!(checked(address, all, default), Ok(Vec::new()));
    }

    #[rstest]
    #[case::a_private_interface("10.0.0.5", &["10.0.0.5", "192.0.2.2"], &["192.0.2.2"])]
    #[case::a_private_address_of_the_default_interface("10.0.0.5", &["10.0.0.5", "192.0.2.2", "fd00::2"], &["192.0.2.2", "fd00::2"])]
    #[case::no_default("10.0.0.5", &["10.0.0.5", "192.0.2.2"], &[])]
    #[case::not_of_this_host("203.0.113.7", &["192.0.2.2"], &["192.0.2.2"])]
    #[case::loopback("127.0.0.1", &["192.0.2.2"], &["192.0.2.2"])]
    #[case::loopback_alone("::1", &[], &[])]
    fn a_port_that_more_could_reach_is_refused(
        #[case] address: &str,
        #[case] all: &[&str],
        #[case] default: &[&str],
    ) {
        let refusal = checked(Some(address), all, default).unwrap_err();
        for part in ["\"http\"", address, "bridge", "host_network"] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[test]
    fn a_port_on_the_default_address_is_forwarded_and_the_event_names_who_else_reaches_it() {
        let all = ["10.0.0.5", "172.17.0.1", "192.0.2.2", "fd00::2", "fd00::3"];
        let result = checked(Some("192.0.2.2"), &all, &["192.0.2.2"]).unwrap();
        let [result] = result.as_slice() else {
            panic!("{result:?}")
        };
        for part in [
            "\"http\" (25000)",
            "allotted on 192.0.2.2",
            "also on 10.0.0.5, 172.17.0.1, fd00::2 and 1 more",
        ] {
            assert!(result.contains(part), "{result}");
        }
    }

    #[test]
    fn the_default_address_is_one_of_the_host_s() {
        let host = Addresses::of_this_host();
        for address in &host.default {
            assert!(host.all.contains(address), "{host:?}");
        }
        assert!(!host.all.iter().any(IpAddr::is_loopback), "{host:?}");
    }
}
