//! What a frame of the container is answered with, as bytes. Knows no socket. The container is not trusted: whatever it sends, the work is
//! bounded by the length of one frame.

use std::net::Ipv4Addr;

use dhcproto::v4::borrowed::Message as Request;
use dhcproto::v4::{DhcpOption, HType, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Encodable as _, Name};

use super::Lease;

pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// The number of the protocol.
pub(super) const UDP: u8 = 17;
/// The bits of an IPv4 header that are set only in fragments: "more fragments" and the offset.
pub(super) const FRAGMENT: u16 = 0x3fff;

const ETHERNET_HEADER: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

const FOREVER: u32 = u32::MAX;
/// What every client accepts, and what fits in a frame.
const MESSAGE_SIZES: (u16, u16) = (576, 1500);

/// The frame that answers this one; none if it is no request, or one for somebody else.
pub(super) fn answer(lease: &Lease, from: [u8; 6], frame: &[u8]) -> Option<Vec<u8>> {
    let (to, payload) = payload(frame)?;
    // A datagram to another server that happens to be routed through this link.
    if to != Ipv4Addr::BROADCAST && to != lease.router {
        return None;
    }
    let request = Asked::read(payload)?;
    if request.mac != lease.mac {
        return None;
    }
    let kind = request.answer(lease)?;
    let (mac, to) = match request.destination(kind, lease) {
        Some(address) => (lease.mac, address),
        None => ([0xff; 6], Ipv4Addr::BROADCAST),
    };
    compose(
        (from, lease.router),
        (mac, to),
        &request.reply(kind, lease)?,
    )
}

/// The destination and the content of a UDP datagram for the server's port. Its checksum is not compared: in what comes from a container
/// on the same host it has usually not been computed.
fn payload(frame: &[u8]) -> Option<(Ipv4Addr, &[u8])> {
    let (ethernet, ip) = frame.split_at_checked(ETHERNET_HEADER)?;
    if ethernet[12..] != IPV4 {
        return None;
    }
    let header = ip.first_chunk::<IP_HEADER>()?;
    let header_length = usize::from(header[0] & 0xf) * 4;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & FRAGMENT != 0;
    if header[0] >> 4 != 4 || header_length < IP_HEADER || header[9] != UDP || fragment {
        return None;
    }
    let to = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    // What follows the packet in its frame is padding.
    let length = u16::from_be_bytes([header[2], header[3]]);
    let udp = ip.get(header_length..usize::from(length))?;
    let header = udp.first_chunk::<UDP_HEADER>()?;
    if u16::from_be_bytes([header[2], header[3]]) != SERVER_PORT {
        return None;
    }
    let length = u16::from_be_bytes([header[4], header[5]]);
    Some((to, udp.get(UDP_HEADER..usize::from(length))?))
}

/// A client's message, as far as the answer depends on it.
struct Asked {
    kind: MessageType,
    id: u32,
    mac: [u8; 6],
    flags: dhcproto::v4::Flags,
    /// The address that the client uses already; unspecified if it uses none.
    uses: Ipv4Addr,
    wants: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client: Option<Vec<u8>>,
    max_size: u16,
}

impl Asked {
    fn read(payload: &[u8]) -> Option<Self> {
        let message = Request::new(payload).ok()?;
        let mac_length = usize::from(message.hlen());
        // One with a relay's address came from another link. The length is checked before the address is read.
        let is_ours = message.opcode() == Opcode::BootRequest
            && message.htype() == HType::Eth
            && mac_length == 6
            && message.giaddr().is_unspecified();
        if !is_ours {
            return None;
        }
        let mut kind = None;
        let mut asked = Self {
            kind: MessageType::Unknown(0),
            id: message.xid(),
            mac: message.chaddr().try_into().ok()?,
            flags: message.flags(),
            uses: message.ciaddr(),
            wants: None,
            server: None,
            client: None,
            max_size: MESSAGE_SIZES.0,
        };
        for option in message.opts() {
            let data = option.data();
            let address = || Some(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?));
            match option.code() {
                OptionCode::MessageType => kind = data.first().copied().map(MessageType::from),
                OptionCode::RequestedIpAddress => asked.wants = address(),
                OptionCode::ServerIdentifier => asked.server = address(),
                OptionCode::ClientIdentifier => {
                    asked.client = Some(data.to_owned()).filter(|id| id.len() <= 255);
                }
                OptionCode::MaxMessageSize => {
                    let size = data.try_into().map(u16::from_be_bytes).unwrap_or_default();
                    asked.max_size = size.clamp(MESSAGE_SIZES.0, MESSAGE_SIZES.1);
                }
                _ => {}
            }
        }
        // Without one it is BOOTP.
        asked.kind = kind?;
        Some(asked)
    }

    /// What it is answered with, if it is. RFC 2131, 4.3.
    fn answer(&self, lease: &Lease) -> Option<MessageType> {
        match self.kind {
            MessageType::Discover => Some(MessageType::Offer),
            MessageType::Inform => Some(MessageType::Ack),
            // The client has chosen another server's offer.
            MessageType::Request if self.server.is_some_and(|server| server != lease.router) => {
                None
            }
            MessageType::Request => {
                let used = Some(self.uses).filter(|uses| !uses.is_unspecified());
                match self.wants.or(used)? == lease.address {
                    true => Some(MessageType::Ack),
                    false => Some(MessageType::Nak),
                }
            }
            // The address stays the container's: there is nothing to be released, and no other one to give.
            _ => None,
        }
    }

    /// Where the answer goes; `None` is to everybody, for a client that has no address and can't be reached otherwise.
    fn destination(&self, kind: MessageType, lease: &Lease) -> Option<Ipv4Addr> {
        match (kind, self.uses.is_unspecified()) {
            (MessageType::Nak, _) => None,
            (_, false) => Some(self.uses),
            (_, true) if self.flags.broadcast() || self.kind == MessageType::Inform => None,
            (_, true) => Some(lease.address),
        }
    }

    fn reply(&self, kind: MessageType, lease: &Lease) -> Option<Vec<u8>> {
        let none = Ipv4Addr::UNSPECIFIED;
        let (uses, gets) = match (kind, self.kind) {
            (MessageType::Nak, _) => (none, none),
            (_, MessageType::Inform) => (self.uses, none),
            _ => (self.uses, lease.address),
        };
        let mut message = Message::new_with_id(self.id, uses, gets, none, none, &self.mac);
        message.set_opcode(Opcode::BootReply).set_flags(self.flags);
        let options = message.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(lease.router));
        // RFC 6842.
        if let Some(client) = &self.client {
            options.insert(DhcpOption::ClientIdentifier(client.clone()));
        }
        if kind != MessageType::Nak {
            if self.kind != MessageType::Inform {
                options.insert(DhcpOption::AddressLeaseTime(FOREVER));
            }
            for option in parameters(lease) {
                options.insert(option);
            }
        }
        let limit = usize::from(self.max_size) - IP_HEADER - UDP_HEADER;
        let mut bytes = message.to_vec().ok()?;
        // What a container can do without is left out first.
        let dispensable = [
            OptionCode::DomainSearch,
            OptionCode::DomainName,
            OptionCode::Hostname,
            OptionCode::ClientIdentifier,
            OptionCode::DomainNameServer,
        ];
        for code in dispensable {
            if bytes.len() > limit {
                message.opts_mut().remove(code);
                bytes = message.to_vec().ok()?;
            }
        }
        Some(bytes)
    }
}

/// What a client configures besides the address. The gateway is not in the container's network, which has no address but its own. So the
/// routes say that it is on link, for clients that know this option; the others get the plain one, and find that out by themselves.
fn parameters(lease: &Lease) -> Vec<DhcpOption> {
    let router = lease.router;
    let on_link = Ipv4Addr::UNSPECIFIED;
    let mut options = vec![
        DhcpOption::SubnetMask(Ipv4Addr::BROADCAST),
        DhcpOption::Router(vec![router]),
    ];
    let host = ipnet::Ipv4Net::from(router);
    let routes = vec![(host, on_link), (ipnet::Ipv4Net::default(), router)];
    options.push(DhcpOption::ClasslessStaticRoute(routes));
    if !lease.dns.is_empty() {
        options.push(DhcpOption::DomainNameServer(lease.dns.clone()));
    }
    let search = lease.search.iter();
    let names: Vec<_> = search
        .filter_map(|name| Some((name, Name::from_ascii(name).ok()?)))
        .collect();
    if let Some((first, _)) = names.first() {
        options.push(DhcpOption::DomainName((*first).clone()));
        let names = names.into_iter().map(|(_, name)| name).collect();
        options.push(DhcpOption::DomainSearch(names));
    }
    if let Some(name) = &lease.host_name {
        options.push(DhcpOption::Hostname(name.clone()));
    }
    if let Some(mtu) = lease.mtu {
        options.push(DhcpOption::InterfaceMtu(mtu));
    }
    options
}

/// A frame with a UDP datagram from the server's port to the client's.
fn compose(
    (from_mac, from): ([u8; 6], Ipv4Addr),
    (to_mac, to): ([u8; 6], Ipv4Addr),
    payload: &[u8],
) -> Option<Vec<u8>> {
    let udp_length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let ip_length = u16::try_from(IP_HEADER).ok()?.checked_add(udp_length)?;
    let mut udp = Vec::with_capacity(usize::from(udp_length));
    udp.extend(SERVER_PORT.to_be_bytes());
    udp.extend(CLIENT_PORT.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &[0, UDP],
        &udp_length.to_be_bytes(),
    ]
    .concat();
    // 0 would mean that there is none.
    let sum = match checksum(&[&pseudo, &udp]) {
        0 => u16::MAX,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());

    let mut ip = vec![0x45, 0];
    ip.extend(ip_length.to_be_bytes());
    // Not to be fragmented, so it needs no number.
    ip.extend([0, 0, 0x40, 0, 64, UDP, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    Some([&to_mac[..], &from_mac, &IPV4, &ip, &udp].concat())
}

/// The checksum of IPv4 and UDP. All parts but the last must have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or_default()
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
