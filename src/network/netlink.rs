//! Requests to the kernel's routing netlink, one at a time: each is sent, and its answer is waited for. Acts on the network namespace in
//! which the socket was opened.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::exchange::Kernel;

/// Fails if the thing exists already.
const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// A connection to the kernel.
#[derive(Debug)]
pub(super) struct Netlink(Kernel);

/// The container's end of a new link.
#[derive(Debug)]
pub(super) struct Peer<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its hardware address.
    pub(super) mac: [u8; 6],
    /// The network namespace that it is made in.
    pub(super) namespace: BorrowedFd<'a>,
}

impl Netlink {
    /// Acts on the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        Kernel::connect(NETLINK_ROUTE).map(Self)
    }

    /// Makes a bridge.
    pub(super) fn add_bridge(&self, name: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.request(RouteNetlinkMessage::NewLink(link), CREATE)
    }

    /// Whether links are connected to the bridge with this index.
    pub(super) fn has_members(&self, bridge: u32) -> io::Result<bool> {
        let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let is_member = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.contains(&LinkAttribute::Controller(bridge))
            }
            _ => false,
        };
        Ok(self.0.request(NLM_F_DUMP, all)?.iter().any(is_member))
    }

    /// Makes a veth pair whose other end is in another network namespace, connected to the bridge with this index if there is one.
    pub(super) fn add_veth(
        &self,
        name: &str,
        bridge: Option<u32>,
        peer: &Peer<'_>,
    ) -> io::Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer.name.to_owned()),
            LinkAttribute::Address(peer.mac.to_vec()),
            LinkAttribute::NetNsFd(peer.namespace.as_raw_fd()),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        link.attributes
            .extend(bridge.map(LinkAttribute::Controller));
        self.request(RouteNetlinkMessage::NewLink(link), CREATE)
    }

    /// Removes a link. One that does not exist is success.
    pub(super) fn remove_link(&self, name: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        match self.request(RouteNetlinkMessage::DelLink(link), 0) {
            Err(error) if error.raw_os_error() == Some(nix::Error::ENODEV as i32) => Ok(()),
            removed => removed,
        }
    }

    /// Sets a link up.
    pub(super) fn set_up(&self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header = LinkHeader {
            index,
            flags: LinkFlags::Up,
            change_mask: LinkFlags::Up,
            ..LinkHeader::default()
        };
        self.request(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Adds an address. One of IPv6 can be used at once: nobody else on the link has it, so nothing is detected first.
    pub(super) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let is_link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        let mut message = AddressMessage::default();
        message.header = AddressHeader {
            family: family(address),
            prefix_len: prefix,
            flags: match address {
                IpAddr::V4(_) => AddressHeaderFlags::empty(),
                IpAddr::V6(_) => AddressHeaderFlags::Nodad,
            },
            scope: match is_link_local {
                true => AddressScope::Link,
                false => AddressScope::Universe,
            },
            index,
        };
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        self.request(RouteNetlinkMessage::NewAddress(message), CREATE)
    }

    /// Adds a route to one address that is on the link itself.
    pub(super) fn add_host_route(&self, index: u32, to: IpAddr) -> io::Result<()> {
        self.request(RouteNetlinkMessage::NewRoute(host_route(index, to)), CREATE)
    }

    /// Removes it. One that does not exist is success.
    pub(super) fn remove_host_route(&self, index: u32, to: IpAddr) -> io::Result<()> {
        match self.request(RouteNetlinkMessage::DelRoute(host_route(index, to)), 0) {
            Err(error) if error.raw_os_error() == Some(nix::Error::ESRCH as i32) => Ok(()),
            removed => removed,
        }
    }

    /// Adds a default route. The gateway is on the link, whatever the addresses of the link are. Routes with a higher metric are used only
    /// if there are no others.
    pub(super) fn add_default_route(
        &self,
        index: u32,
        gateway: IpAddr,
        metric: u32,
    ) -> io::Result<()> {
        let mut route = new_route(index, gateway, RouteScope::Universe);
        route.header.flags = RouteFlags::Onlink;
        route.attributes.extend([
            RouteAttribute::Gateway(RouteAddress::from(gateway)),
            RouteAttribute::Priority(metric),
        ]);
        self.request(RouteNetlinkMessage::NewRoute(route), CREATE)
    }

    /// Sends a request that is answered by an acknowledgement or an error.
    fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.0.request(NLM_F_ACK | flags, message).map(drop)
    }
}

fn host_route(index: u32, to: IpAddr) -> RouteMessage {
    let mut route = new_route(index, to, RouteScope::Link);
    route.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    route
        .attributes
        .push(RouteAttribute::Destination(to.into()));
    route
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn new_route(index: u32, of: IpAddr, scope: RouteScope) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family(of),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        // IPv6 has no scopes of routes.
        scope: if of.is_ipv4() {
            scope
        } else {
            RouteScope::Universe
        },
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    route.attributes = vec![RouteAttribute::Oif(index)];
    route
}
