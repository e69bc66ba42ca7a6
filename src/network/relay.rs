//! Connections to the host's `[::1]:PORT`, which are forwarded to a container by a process: packet filters can't, because the kernel does
//! not let a packet from `::1` leave the loopback interface.
//!
//! The supervisor holds the sockets, which costs nothing. Only when something arrives at one of them does it start a child (`relay`), which
//! gets the sockets and the addresses over its standard input and serves them from then on. The child ends when the [`Relay`] is dropped,
//! or this process dies. This file is the supervisor's part.
//!
//! | module | subject |
//! |---|---|
//! | `serve` | the child: its start, TCP |
//! | `datagrams` | UDP in the child |

mod datagrams;
mod serve;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockRef, Socket, Type};

use super::{Mapping, NetworkPlan};

pub use serve::run;

/// How often a child is started. One that keeps failing must not be started for every packet.
const MAX_STARTS: u32 = 10;

/// More connections than that may wait while the child starts; the kernel lowers it to the limit of the host.
const BACKLOG: i32 = 4096;

/// Room for the packets of some hundred ports. The kernel lowers it to the limit of the host, and doubles it.
const SEND_BUFFER: usize = 1024 * 1024;

/// The sockets of a start on `::1`, and the child that serves them.
#[derive(Debug)]
pub struct Relay {
    owner: String,
    order: Order,
    /// In the order of the ports in `order`, TCP first.
    sockets: Vec<OwnedFd>,
    /// Ready when one of the sockets is. None if there are no sockets.
    ready: Option<Epoll>,
    /// Closed when this is dropped, which the child sees.
    lifeline: Option<OwnedFd>,
    starts: u32,
}

/// What the child has to do. The sockets follow, in a packet for each port.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Order {
    /// The process that has started the child.
    parent: u32,
    address: Ipv4Addr,
    address6: Ipv6Addr,
    ports: Vec<Port>,
}

/// A port, and which of its sockets there are.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Port {
    container: u16,
    tcp: bool,
    udp: bool,
}

impl Relay {
    /// Listens for the ports that are forwarded on all addresses or on `::1`, in this thread's network namespace. Also returns a line for
    /// each that can't be used, which is no reason to give up a start. A host without IPv6 has no `::1` to be reached at; then there is
    /// nothing to do and no line.
    pub fn bind(plan: &NetworkPlan) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let mut relay = Self {
            owner: plan.owner.clone(),
            order: Order {
                parent: 0,
                address: plan.address,
                address6: plan.address6,
                ports: Vec::new(),
            },
            sockets: Vec::new(),
            ready: None,
            lifeline: None,
            starts: 0,
        };
        let loopback = |mapping: &&Mapping| {
            let address = mapping.address;
            address.is_none_or(|address| address == Ipv6Addr::LOCALHOST)
        };
        for mapping in plan.ports.iter().filter(loopback) {
            let mut open = |kind, name| match listen(kind, mapping.host) {
                Ok(socket) => {
                    relay.sockets.push(socket);
                    true
                }
                Err(error) => {
                    if !is_without_ipv6(&error) {
                        notes.push(format!(
                            "port {} ({}) is not forwarded on [::1] over {name}: {error}",
                            mapping.host, mapping.label
                        ));
                    }
                    false
                }
            };
            let (tcp, udp) = (open(Type::STREAM, "TCP"), open(Type::DGRAM, "UDP"));
            if tcp || udp {
                let container = mapping.container;
                relay.order.ports.push(Port {
                    container,
                    tcp,
                    udp,
                });
            }
        }
        if !relay.sockets.is_empty() {
            match watch(&relay.sockets) {
                Ok(ready) => relay.ready = Some(ready),
                Err(error) => notes.push(format!("no port is forwarded on [::1]: {error}")),
            }
        }
        (relay, notes)
    }

    /// Readable when something has arrived and no child serves it. Not to be waited for while a child lives.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.ready.as_ref().map(|ready| ready.0.as_fd())
    }

    /// Starts the child. The caller waits for its end, and may call this again after that.
    pub fn start(&mut self) -> io::Result<Child> {
        self.start_program(Path::new("/proc/self/exe"))
    }

    /// The same with another file of this program.
    #[expect(
        clippy::disallowed_methods,
        reason = "the supervisor starts this child"
    )]
    pub fn start_program(&mut self, program: &Path) -> io::Result<Child> {
        if self.starts >= MAX_STARTS {
            return Err(io::Error::other("it has ended too often"));
        }
        self.starts += 1;
        self.order.parent = std::process::id();
        let (ours, theirs) = packets::pair()?;
        SockRef::from(&ours).set_send_buffer_size(SEND_BUFFER)?;
        // All before it is started: this process does not wait for the child.
        packets::send(&ours, &packets::encode(&self.order), &[])?;
        let mut sockets = self.sockets.iter().map(|socket| socket.as_fd());
        for port in &self.order.ports {
            let count = usize::from(port.tcp) + usize::from(port.udp);
            let its: Vec<_> = sockets.by_ref().take(count).collect();
            packets::send(&ours, &packets::encode(&()), &its)?;
        }
        // Its standard error is the supervisor's own, which is no stream of the task.
        let child = Command::new(program)
            .arg0("nomad-driver-nspawn")
            .arg("relay")
            .arg(&self.owner)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()?;
        self.lifeline = Some(ours);
        Ok(child)
    }

    /// Ends the child, which the caller waits for.
    pub fn stop(&mut self) {
        self.lifeline = None;
    }
}

/// A socket on `::1`.
fn listen(kind: Type, port: u16) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::IPV6, kind.nonblocking().cloexec(), None)?;
    socket.set_only_v6(true)?;
    if kind == Type::STREAM {
        // Connections of an earlier start are no reason to fail.
        socket.set_reuse_address(true)?;
    }
    let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
    socket.bind(&SocketAddr::from(address).into())?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket.into())
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(nix::Error::from_raw);
    matches!(
        code,
        Some(nix::Error::EADDRNOTAVAIL | nix::Error::EAFNOSUPPORT)
    )
}

/// One descriptor for all of them.
fn watch(sockets: &[OwnedFd]) -> io::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for socket in sockets {
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    }
    Ok(epoll)
}

#[cfg(test)]
#[path = "relay/tests.rs"]
mod tests;
