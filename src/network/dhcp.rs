//! Answers the DHCP client of a container with the address that the container has anyway: images whose command begins with `dhclient` run as
//! they are. One link and one lease, which never ends. This file has the socket, `answer` what a request is answered with.
//!
//! The socket is a packet socket and not a UDP one. A DHCP server of the host that has bound port 67 of all addresses, as dnsmasq does by
//! default, and a UDP socket of ours exclude each other whatever the options: which of the two starts later fails, and that could be the
//! host's. A packet socket takes no port, is not subject to the host's firewall, and needs no address on the link.

mod answer;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::libc;
use nix::sys::socket::{LinkAddr, MsgFlags};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::{Attachment, GATEWAY, NetworkError, NetworkPlan, bridge};

/// How many packets are read at once. A client sends a few in a second.
const BATCH: usize = 16;

/// Longer frames are cut off, which makes them invalid. The longest request of a client fits in an Ethernet frame.
const MAX_FRAME: usize = 2048;

/// How much the kernel keeps for this process, and discards beyond that.
const BUFFER: usize = 64 * 1024;

/// What the container's DHCP client is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The container's address.
    pub address: Ipv4Addr,
    /// The hardware address of the container's end, the only one that is answered. Another one on the link is a device that something in
    /// the container has made, such as a macvlan one: if it was given the same address, the container would have it twice.
    pub mac: [u8; 6],
    /// The gateway, on link; also what the answers come from.
    pub router: Ipv4Addr,
    /// DNS servers. If there are none, a client leaves the container's resolv.conf alone.
    pub dns: Vec<Ipv4Addr>,
    /// Search domains. One that is not a domain name is left out.
    pub search: Vec<String>,
    /// The host name.
    pub host_name: Option<String>,
    /// The MTU of the link.
    pub mtu: Option<u16>,
}

/// Whether all packets that were waiting have been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Answered {
    /// There are no more.
    All,
    /// There may be more. No client sends so many, so the caller should not look again for a moment: the container could otherwise use up
    /// the time of a process that is not subject to its limits. Meanwhile the kernel discards what it has no room for.
    Flooded,
}

/// The socket on the host's end of a link, with the lease.
#[derive(Debug)]
pub struct DhcpResponder {
    socket: Socket,
    index: usize,
    mac: [u8; 6],
    lease: Lease,
}

/// What answers the DHCP client of this container. None on a bridge of the host, where a server of its network may.
pub(super) fn of_container(plan: &NetworkPlan) -> Result<Option<DhcpResponder>, NetworkError> {
    let lease = Lease {
        address: plan.address,
        mac: plan.mac,
        router: GATEWAY,
        // The container has a resolv.conf.
        dns: Vec::new(),
        search: Vec::new(),
        host_name: None,
        mtu: None,
    };
    let link = match &plan.attachment {
        Attachment::Host => plan.link.clone(),
        // What arrives at a member of a bridge is received by the bridge.
        Attachment::Zone(_) => bridge::name(&plan.attachment).unwrap_or_default(),
        Attachment::Bridge(_) => return Ok(None),
    };
    let bound = DhcpResponder::bind(&link, lease);
    let step = "listening for DHCP requests of the container";
    bound
        .map(Some)
        .map_err(|error| NetworkError::new(step, &error))
}

impl DhcpResponder {
    /// Begins to receive on this link of this thread's network namespace. What arrives waits until [`answer`](Self::answer). The link must
    /// exist and be up; without `CAP_NET_RAW` it fails.
    pub fn bind(link: &str, lease: Lease) -> io::Result<Self> {
        let address = address_of(link)?;
        let mac = address.addr().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let kind = Type::RAW.nonblocking().cloexec();
        let protocol = i32::from(u16::try_from(libc::ETH_P_IP).unwrap_or_default().to_be());
        let socket = Socket::new(Domain::PACKET, kind, Some(Protocol::from(protocol)))?;
        socket.attach_filter(&filter())?;
        socket.set_recv_buffer_size(BUFFER)?;
        // The address says nothing of a protocol, so that of the socket stays.
        nix::sys::socket::bind(socket.as_raw_fd(), &address)?;
        Ok(Self {
            socket,
            index: address.ifindex(),
            mac,
            lease,
        })
    }

    /// Answers what is waiting, at most as much as a client may send. Never waits.
    pub fn answer(&self) -> io::Result<Answered> {
        let mut buffer = [0; MAX_FRAME];
        for _ in 0..BATCH {
            let (length, from) = match self.receive(&mut buffer) {
                Ok(received) => received,
                Err(nix::Error::EAGAIN) => return Ok(Answered::All),
                // Reported once when the link goes down or is removed; nothing is lost.
                Err(nix::Error::ENETDOWN | nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            // Between its creation and bind(2) the socket received from all links.
            if from != Some(self.index) {
                continue;
            }
            let frame = buffer.get(..length).unwrap_or_default();
            if let Some(reply) = answer::answer(&self.lease, self.mac, frame) {
                // If there is no room, the client asks again.
                let fd = self.socket.as_raw_fd();
                let _ = nix::sys::socket::send(fd, &reply, MsgFlags::MSG_DONTWAIT);
            }
        }
        Ok(Answered::Flooded)
    }

    fn receive(&self, buffer: &mut [u8]) -> nix::Result<(usize, Option<usize>)> {
        let fd = self.socket.as_raw_fd();
        let (length, from) = nix::sys::socket::recvfrom::<LinkAddr>(fd, buffer)?;
        Ok((length, from.map(|from| from.ifindex())))
    }
}

impl AsFd for DhcpResponder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The hardware address and number of a link. In this form because bind(2) needs them so, and only the kernel's list has them so.
fn address_of(link: &str) -> io::Result<LinkAddr> {
    let found = nix::ifaddrs::getifaddrs()?
        .filter(|interface| interface.interface_name == link)
        .find_map(|interface| interface.address?.as_link_addr().copied());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Accepts UDP datagrams for port 67 that are no fragments. Nothing else of what the container sends may wake this process up.
fn filter() -> [SockFilter; 11] {
    let code = |bits: u32| u16::try_from(bits).unwrap_or_default();
    let load = |how: u32, at| SockFilter::new(code(libc::BPF_LD | how), 0, 0, at);
    let jump = |how: u32, value, yes, no| {
        SockFilter::new(code(libc::BPF_JMP | how | libc::BPF_K), yes, no, value)
    };
    let finish = |bytes| SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, bytes);
    let (half, byte) = (libc::BPF_H | libc::BPF_ABS, libc::BPF_B | libc::BPF_ABS);
    [
        load(half, 12),
        jump(libc::BPF_JEQ, 0x0800, 0, 8),
        load(byte, 23),
        jump(libc::BPF_JEQ, u32::from(answer::UDP), 0, 6),
        load(half, 20),
        jump(libc::BPF_JSET, u32::from(answer::FRAGMENT), 4, 0),
        SockFilter::new(code(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH), 0, 0, 14),
        load(libc::BPF_H | libc::BPF_IND, 16),
        jump(libc::BPF_JEQ, u32::from(answer::SERVER_PORT), 0, 1),
        finish(u32::MAX),
        finish(0),
    ]
}

#[cfg(test)]
#[path = "dhcp/tests.rs"]
mod tests;
