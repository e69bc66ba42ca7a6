//! Whether a program of the host uses a port that is to be forwarded: it would not be reached any more, and nothing would say so. Reads the
//! kernel's lists of sockets; does not try to bind a port, which could make a program fail that wants it at that moment.

use std::fs::File;
use std::io::{self, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::exchange::Kernel;
use super::{Mapping, NetworkError};
use crate::container::Cause;

/// The state of a TCP socket that listens, and of a UDP socket without a peer, as the kernel writes them.
const LISTENS: &str = "0A";
const HAS_NO_PEER: &str = "07";

/// A socket of the host that receives from anyone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Receiver {
    protocol: &'static str,
    address: IpAddr,
    port: u16,
}

/// Fails if a program of the host listens on one of these ports over TCP or receives on it over UDP, on the port's address or on all.
/// Connections do not count, those that have ended (`TIME_WAIT`) neither, nor UDP sockets with a peer. A socket on all IPv6 addresses counts
/// for IPv4 too: the lists do not say whether it is for IPv6 only.
pub fn check_free(ports: &[Mapping]) -> Result<(), NetworkError> {
    if ports.is_empty() {
        return Ok(());
    }
    let receivers = receivers()
        .map_err(|error| NetworkError::new("the ports that the host uses can't be read", &error))?;
    for port in ports {
        if let Some(receiver) = receivers.iter().find(|receiver| takes(receiver, port)) {
            let Receiver {
                protocol, address, ..
            } = receiver;
            return Err(NetworkError {
                cause: Cause::Busy,
                reason: format!(
                    "{port} is in use: a program of the host receives on it over {protocol}, on the address {address}"
                ),
            });
        }
    }
    Ok(())
}

/// Whether packets to this port are for that socket.
fn takes(receiver: &Receiver, port: &Mapping) -> bool {
    let same_address = |address: IpAddr| match receiver.address {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => true,
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => address.is_ipv4(),
        other => other == address,
    };
    receiver.port == port.host && port.address.is_none_or(same_address)
}

fn receivers() -> io::Result<Vec<Receiver>> {
    // A kernel may lack this interface. The file takes milliseconds: for its end the kernel walks through the table of all connections.
    let mut receivers = match listeners() {
        Ok(listeners) => listeners,
        Err(_) => listed("TCP", LISTENS, ["tcp", "tcp6"])?,
    };
    receivers.extend(listed("UDP", HAS_NO_PEER, ["udp", "udp6"])?);
    Ok(receivers)
}

/// The TCP sockets that listen.
fn listeners() -> io::Result<Vec<Receiver>> {
    let kernel = Kernel::connect(NETLINK_SOCK_DIAG)?;
    let mut listeners = Vec::new();
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id,
        });
        for message in kernel.request(NLM_F_DUMP, request)? {
            if let SockDiagMessage::InetResponse(socket) = message {
                let SocketId {
                    source_address,
                    source_port,
                    ..
                } = socket.header.socket_id;
                listeners.push(Receiver {
                    protocol: "TCP",
                    address: source_address.to_canonical(),
                    port: source_port,
                });
            }
        }
    }
    Ok(listeners)
}

/// The sockets in this state, from the files that list them.
fn listed(protocol: &'static str, state: &str, files: [&str; 2]) -> io::Result<Vec<Receiver>> {
    let mut receivers = Vec::new();
    for file in files {
        // Not "/proc/net", which is that of the process's first thread.
        match File::open(format!("/proc/thread-self/net/{file}")) {
            Ok(file) => read(BufReader::new(file), protocol, state, &mut receivers)?,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(receivers)
}

fn read(
    list: impl io::BufRead,
    protocol: &'static str,
    wanted: &str,
    receivers: &mut Vec<Receiver>,
) -> io::Result<()> {
    // The first line is a heading.
    for line in list.lines().skip(1) {
        let line = line?;
        let mut words = line.split_ascii_whitespace().skip(1);
        let (local, state) = (words.next(), words.nth(1));
        if state == Some(wanted) {
            let socket = local.and_then(parse);
            receivers.extend(socket.map(|(address, port)| Receiver {
                protocol,
                address,
                port,
            }));
        } else if wanted == LISTENS {
            // Sockets that listen come first, and of connections there may be very many.
            break;
        }
    }
    Ok(())
}

/// An address and a port as the kernel writes them: the address in words of the host's byte order.
fn parse(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    if ![8, 32].contains(&address.len()) {
        return None;
    }
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?));
    let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?));
    let address = v4().or_else(v6)?;
    Some((address.to_canonical(), u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{Shutdown, shutdown};
    use rstest::rstest;

    use super::*;
    use crate::network::testing::port;

    #[rstest]
    #[case::all("0.0.0.0", None, true)]
    #[case::one_of_all("127.0.0.1", None, true)]
    #[case::all_for_one("0.0.0.0", Some("192.0.2.1"), true)]
    #[case::the_same("192.0.2.1", Some("192.0.2.1"), true)]
    #[case::another("192.0.2.2", Some("192.0.2.1"), false)]
    #[case::all_of_both_families("::", Some("192.0.2.1"), true)]
    #[case::all_of_both_families_for_six("::", Some("2001:db8::1"), true)]
    #[case::another_family("0.0.0.0", Some("2001:db8::1"), false)]
    fn a_port_is_taken_by_a_socket_on_its_address(
        #[case] bound: &str,
        #[case] mapped: Option<&str>,
        #[case] taken: bool,
    ) {
        let receiver = Receiver {
            protocol: "TCP",
            address: bound.parse().unwrap(),
            port: 8080,
        };
        assert_eq!(takes(&receiver, &port("http", mapped, 8080, 80)), taken);
        assert!(!takes(&receiver, &port("http", mapped, 8081, 80)));
    }

    fn refusal(number: u16) -> String {
        let error = check_free(&[port("http", None, number, 80)]).unwrap_err();
        assert_eq!(error.cause, Cause::Busy);
        error.reason
    }

    #[rstest]
    #[case::tcp("127.0.0.1:0")]
    #[case::tcp_6("[::1]:0")]
    #[case::tcp_all("[::]:0")]
    fn a_listener_of_the_host_is_found(#[case] address: SocketAddr) {
        let Ok(listener) = TcpListener::bind(address) else {
            return support::not_applicable("this host has no IPv6");
        };
        let local = listener.local_addr().unwrap();
        let reason = refusal(local.port());
        for part in [
            "\"http\"",
            "TCP",
            &local.port().to_string(),
            &local.ip().to_string(),
        ] {
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn a_udp_socket_without_a_peer_is_found_and_one_with_a_peer_is_not() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let number = socket.local_addr().unwrap().port();
        assert!(refusal(number).contains("UDP"));
        socket.connect("127.0.0.1:9").unwrap();
        check_free(&[port("http", Some("127.0.0.1"), number, 80)]).unwrap();
    }

    #[test]
    fn connections_do_not_take_a_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        // A process that another test is starting may have it open for a moment, so closing it is not enough.
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
        let ports = [port("http", None, address.port(), 80)];
        check_free(&ports).unwrap();
        // The side that closes first stays in TIME_WAIT, with the listener's port.
        drop(server);
        drop(client);
        check_free(&ports).unwrap();
    }

    #[test]
    fn both_lists_of_listeners_have_the_same() {
        let Ok(by_netlink) = listeners() else {
            return support::not_applicable("this kernel can't list sockets over netlink");
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = Receiver {
            protocol: "TCP",
            address: "127.0.0.1".parse().unwrap(),
            port: listener.local_addr().unwrap().port(),
        };
        assert!(!by_netlink.contains(&own));
        assert!(listeners().unwrap().contains(&own));
        let in_files = listed("TCP", LISTENS, ["tcp", "tcp6"]).unwrap();
        assert!(in_files.contains(&own), "{in_files:?}");
    }

    #[test]
    fn a_line_of_the_kernel_is_read() {
        if cfg!(target_endian = "big") {
            return;
        }
        let want: (IpAddr, u16) = ("127.0.0.1".parse().unwrap(), 8080);
        assert_eq!(parse("0100007F:1F90"), Some(want));
        let mapped = "0000000000000000FFFF00000100007F:1F90";
        assert_eq!(parse(mapped), Some(want));
        for text in ["", "0100007F", "0100007F:", "01:1F90", "x:1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
