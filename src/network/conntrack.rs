//! Makes the kernel forget UDP flows to ports of the host. A flow keeps the translation, or the lack of one, that it had with its first
//! packet, so one that is as old as the last owner of a port goes on to reach that owner. Speaks ctnetlink. TCP needs none of this: its
//! connections end with the container.

use std::fs;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Emitable, NLM_F_ACK, NLM_F_DUMP, Nla as _};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, ConntrackMessageType, IPTuple, ProtoTuple, Protocol,
    Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    NetfilterSubsystem,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use super::Mapping;
use super::exchange::Kernel;

/// Attributes of `linux/netfilter/nfnetlink_conntrack.h`: addresses and ports, what tells apart flows that have the same, and the filter of a
/// dump.
const ORIGINAL: u16 = 1;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
/// `CTA_FILTER_ORIG_FLAGS`, and the flags for the protocol and the destination port.
const ORIGINAL_FLAGS: u16 = 1;
const BY_PROTOCOL: u32 = 1 << 3;
const BY_PORT: u32 = 1 << 5;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// Up to how many flows all are read at once. The kernel walks through its whole table for each request, which takes milliseconds, and a
/// filter takes one request for each address family.
const FEW: usize = 4096;

/// Deletes the tracked UDP flows to these ports on addresses of this host, or on the one address that a port has. Repeatable. A kernel
/// without connection tracking has none.
pub fn forget_udp(ports: &[Mapping]) -> io::Result<()> {
    forget_udp_of(ports, FEW)
}

/// The same with the number of flows up to which they are read without a filter.
pub(super) fn forget_udp_of(ports: &[Mapping], few: usize) -> io::Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let host = addresses_of_this_host()?;
    let kernel = match Kernel::connect(NETLINK_NETFILTER) {
        Err(error) if is_missing(&error) => return Ok(()),
        connected => connected?,
    };
    for flow in flows(&kernel, ports, few)? {
        if is_meant(&flow, ports, &host) {
            forget(&kernel, &flow)?;
        }
    }
    Ok(())
}

/// Whether the error says that this kernel has no connection tracking. `EINVAL` says that there is no such subsystem, if the request
/// is valid.
fn is_missing(error: &io::Error) -> bool {
    let missing = [
        Errno::EPROTONOSUPPORT,
        Errno::EAFNOSUPPORT,
        Errno::EOPNOTSUPP,
        Errno::EINVAL,
    ];
    missing
        .map(|errno| Some(errno as i32))
        .contains(&error.raw_os_error())
}

fn addresses_of_this_host() -> io::Result<Vec<IpAddr>> {
    let all = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = || Some(IpAddr::V4(address.as_sockaddr_in()?.ip()));
        let v6 = || Some(IpAddr::V6(address.as_sockaddr_in6()?.ip()));
        v4().or_else(v6)
    });
    Ok(all.collect())
}

/// Whether a flow is one of UDP to one of the ports. Its destination has to be the host's: a port of this number on other hosts, such as
/// that of a name server, is not mapped.
fn is_meant(flow: &[ConntrackAttribute], ports: &[Mapping], host: &[IpAddr]) -> bool {
    let Some((protocol, to, number)) = destination(flow) else {
        return false;
    };
    let is_local = to.is_loopback() || host.contains(&to);
    let meant = |port: &Mapping| {
        port.host == number && port.address.map_or(is_local, |address| address == to)
    };
    protocol == Protocol::Udp && ports.iter().any(meant)
}

/// Where the first packet of a flow was sent to.
fn destination(flow: &[ConntrackAttribute]) -> Option<(Protocol, IpAddr, u16)> {
    let (mut protocol, mut address, mut port) = (None, None, None);
    let original = flow.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
        _ => None,
    });
    for part in original? {
        match part {
            Tuple::Ip(parts) => parts.iter().for_each(|part| {
                if let IPTuple::DestinationAddress(to) = part {
                    address = Some(*to);
                }
            }),
            Tuple::Proto(parts) => parts.iter().for_each(|part| match part {
                ProtoTuple::Protocol(is) => protocol = Some(*is),
                ProtoTuple::DestinationPort(to) => port = Some(*to),
                _ => {}
            }),
            _ => {}
        }
    }
    Some((protocol?, address?, port?))
}

/// The request for the UDP flows, or for those to the port if it is one only. Not a [`ConntrackMessage`], which loses the mark of nesting
/// that the kernel requires of a filter.
fn filtered(ports: &[Mapping]) -> NetfilterMessageInner {
    let (mut flags, mut parts) = (BY_PROTOCOL, vec![ProtoTuple::Protocol(Protocol::Udp)]);
    if let [port] = ports {
        flags |= BY_PORT;
        parts.push(ProtoTuple::DestinationPort(port.host));
    }
    let tuple = Tuple::Proto(parts);
    let flags = DefaultNla::new(ORIGINAL_FLAGS, flags.to_ne_bytes().to_vec());
    NetfilterMessageInner::Other {
        subsys: NetfilterSubsystem::Conntrack,
        message_type: ConntrackMessageType::Get.into(),
        attributes: vec![
            DefaultNla::new(ORIGINAL | NESTED, bytes(&tuple)),
            DefaultNla::new(FILTER | NESTED, bytes(&flags)),
        ],
    }
}

fn bytes(attribute: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

/// The tracked UDP flows to these ports, and perhaps others.
fn flows(
    kernel: &Kernel,
    ports: &[Mapping],
    few: usize,
) -> io::Result<Vec<Vec<ConntrackAttribute>>> {
    let all = |message: NetfilterMessageInner, families: &[NetfilterProtoFamily]| {
        let mut flows = Vec::new();
        for &family in families {
            flows.extend(request(kernel, family, NLM_F_DUMP, message.clone())?);
        }
        Ok(flows)
    };
    let tracked = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").ok();
    let tracked = tracked.and_then(|text| text.trim().parse::<usize>().ok());
    if tracked == Some(0) {
        return Ok(Vec::new());
    }
    if tracked.is_none_or(|tracked| tracked > few) {
        // A kernel before 5.8 ignores the filter.
        let families = [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6];
        match all(filtered(ports), &families) {
            Err(error) if is_missing(&error) => {}
            flows => return flows,
        }
    }
    let everything = ConntrackMessage::Get(Vec::new());
    match all(everything.into(), &[NetfilterProtoFamily::Unspec]) {
        Err(error) if is_missing(&error) => Ok(Vec::new()),
        flows => flows,
    }
}

/// Deletes a flow. One that is gone is success.
fn forget(kernel: &Kernel, flow: &[ConntrackAttribute]) -> io::Result<()> {
    let identifies = |attribute: &&ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(_) => true,
        ConntrackAttribute::Other(other) => [ID, ZONE].contains(&other.kind()),
        _ => false,
    };
    let family = match destination(flow) {
        Some((_, IpAddr::V6(_), _)) => NetfilterProtoFamily::IPv6,
        _ => NetfilterProtoFamily::IPv4,
    };
    let message = ConntrackMessage::Delete(flow.iter().filter(identifies).cloned().collect());
    match request(kernel, family, NLM_F_ACK, message) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
        outcome => outcome.map(drop),
    }
}

fn request(
    kernel: &Kernel,
    family: NetfilterProtoFamily,
    flags: u16,
    message: impl Into<NetfilterMessageInner>,
) -> io::Result<Vec<Vec<ConntrackAttribute>>> {
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    let answer = kernel.request(flags, message)?;
    let flows = answer
        .into_iter()
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::Conntrack(ConntrackMessage::New(flow)) => Some(flow),
            _ => None,
        });
    Ok(flows.collect())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::network::testing::port;

    fn flow(protocol: Protocol, to: &str, number: u16) -> Vec<ConntrackAttribute> {
        vec![
            ConntrackAttribute::CtaTimeout(30),
            ConntrackAttribute::CtaTupleOrig(vec![
                Tuple::Ip(vec![
                    IPTuple::SourceAddress("198.51.100.1".parse().unwrap()),
                    IPTuple::DestinationAddress(to.parse().unwrap()),
                ]),
                Tuple::Proto(vec![
                    ProtoTuple::Protocol(protocol),
                    ProtoTuple::SourcePort(8080),
                    ProtoTuple::DestinationPort(number),
                ]),
            ]),
        ]
    }

    #[rstest]
    #[case::to_the_host(Protocol::Udp, "192.0.2.1", 8080, true)]
    #[case::to_its_loopback(Protocol::Udp, "127.0.0.9", 8080, true)]
    #[case::to_another_host(Protocol::Udp, "203.0.113.1", 8080, false)]
    #[case::from_the_port(Protocol::Udp, "192.0.2.1", 9000, false)]
    #[case::tcp(Protocol::Tcp, "192.0.2.1", 8080, false)]
    #[case::to_the_address_of_the_port(Protocol::Udp, "192.0.2.1", 53, true)]
    #[case::to_another_address(Protocol::Udp, "127.0.0.1", 53, false)]
    fn flows_to_mapped_ports_are_meant(
        #[case] protocol: Protocol,
        #[case] to: &str,
        #[case] number: u16,
        #[case] meant: bool,
    ) {
        let ports = [
            port("http", None, 8080, 80),
            port("dns", Some("192.0.2.1"), 53, 53),
        ];
        let host = ["192.0.2.1".parse().unwrap()];
        assert_eq!(is_meant(&flow(protocol, to, number), &ports, &host), meant);
        assert!(!is_meant(
            &[ConntrackAttribute::CtaTimeout(1)],
            &ports,
            &host
        ));
    }

    #[test]
    fn the_filter_is_marked_as_nested() {
        let NetfilterMessageInner::Other { attributes, .. } =
            filtered(&[port("http", None, 8080, 80)])
        else {
            panic!()
        };
        // Tuple, its part for the protocol, number 17 and port 0x1f90; then the filter with its flags.
        let want = [
            &[
                24, 0, 1, 0x80, 20, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0, 6, 0, 3, 0, 0x1f, 0x90, 0,
                0,
            ][..],
            &[12, 0, 25, 0x80, 8, 0, 1, 0, 0x28, 0, 0, 0],
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(bytes(&attributes.as_slice()), want.concat());
        }
    }

    #[test]
    fn nothing_is_asked_for_no_ports() {
        forget_udp(&[]).unwrap();
    }
}
