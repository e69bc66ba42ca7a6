//! The process that forwards what arrives on `::1`: the real program between two network namespaces, a host's and a container's.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Child;
use std::thread;

use nomad_driver_nspawn::network::relay::Relay;
use nomad_driver_nspawn::network::{Mapping, NetworkPlan};
use nomad_driver_nspawn::sys::process::ProcessHandle;
use rstest::rstest;
use support::netns::{ADDRESS, ADDRESS6, LINK, MAC, Space, linked_with_ipv6};
use support::{DEADLINE, uninterrupted};

const HOST: &str = "[::1]:8080";
const CONTAINER: u16 = 80;

fn plan() -> NetworkPlan {
    NetworkPlan {
        owner: "alloc/task".to_owned(),
        link: LINK.to_owned(),
        attachment: nomad_driver_nspawn::network::Attachment::Host,
        mac: MAC,
        address: ADDRESS.parse().unwrap(),
        address6: ADDRESS6.parse().unwrap(),
        ports: vec![Mapping {
            label: "http".to_owned(),
            address: None,
            host: 8080,
            container: CONTAINER,
        }],
    }
}

/// A host with a relay that is not started yet, and a container.
struct World {
    relay: Relay,
    host: Space,
    container: Space,
}

impl World {
    fn new() -> Option<Self> {
        let (host, container) = linked_with_ipv6()?;
        let (relay, notes) = host.run(|| Relay::bind(&plan()));
        assert_eq!(notes, Vec::<String>::new());
        Some(Self {
            relay,
            host,
            container,
        })
    }

    /// Starts it. The relay dies with the thread of the host's namespace.
    fn start(self) -> Started {
        let Self {
            mut relay,
            host,
            container,
        } = self;
        let (relay, child) = host.run(move || {
            let child = start(&mut relay);
            (relay, child)
        });
        Started {
            relay,
            child,
            host,
            container,
        }
    }
}

struct Started {
    relay: Relay,
    child: Child,
    host: Space,
    container: Space,
}

impl Started {
    /// The relay ends when nobody holds the other end any more.
    fn end(self) {
        let Self {
            relay, mut child, ..
        } = self;
        assert!(
            child.try_wait().unwrap().is_none(),
            "it has ended by itself"
        );
        drop(relay);
        wait(&child);
        assert!(child.wait().unwrap().success());
    }
}

fn start(relay: &mut Relay) -> Child {
    let program = Path::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn"));
    relay.start_program(program).unwrap()
}

fn wait(child: &Child) {
    let pid = i32::try_from(child.id()).unwrap();
    assert!(ProcessHandle::open(pid).unwrap().wait(DEADLINE), "it lives");
}

fn connect(host: &Space) -> TcpStream {
    let client = host.run(|| TcpStream::connect(HOST).unwrap());
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
}

/// Returns everything in a connection when its sender has ended.
fn echo(container: &Space, address: &'static str) {
    let listener = container.run(move || TcpListener::bind((address, CONTAINER)).unwrap());
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            thread::spawn(move || {
                let mut text = Vec::new();
                connection.read_to_end(&mut text).unwrap();
                connection.write_all(&text).unwrap();
            });
        }
    });
}

fn exchange(mut client: TcpStream, text: &[u8]) {
    client.write_all(text).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, text);
}

#[rstest]
#[case::six(ADDRESS6)]
#[case::only_four(ADDRESS)]
fn a_side_that_has_ended_its_sending_still_receives(#[case] address: &'static str) {
    let Some(world) = World::new() else { return };
    echo(&world.container, address);
    // The first one waits for the start.
    let first = connect(&world.host);
    let started = world.start();
    exchange(first, &[7; 300_000]);
    exchange(connect(&started.host), b"again");
    started.end();
}

#[test]
fn a_hundred_connections_at_once_are_forwarded() {
    let Some(world) = World::new() else { return };
    echo(&world.container, ADDRESS6);
    let clients: Vec<_> = (0..100).map(|_| connect(&world.host)).collect();
    let started = world.start();
    let mut clients = clients;
    for (number, client) in (0_u8..).zip(&mut clients) {
        client.write_all(&[number; 1000]).unwrap();
    }
    for (number, mut client) in (0_u8..).zip(clients) {
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, [number; 1000]);
    }
    started.end();
}

#[test]
fn a_connection_that_nobody_accepts_is_closed() {
    let Some(world) = World::new() else { return };
    let started = world.start();
    let mut client = connect(&started.host);
    let error = uninterrupted(|| client.read(&mut [0])).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // Later somebody does.
    echo(&started.container, ADDRESS6);
    exchange(connect(&started.host), b"later");
    started.end();
}

fn datagrams(host: &Space) -> UdpSocket {
    let client = host.run(|| {
        let client = UdpSocket::bind("[::1]:0").unwrap();
        client.connect(HOST).unwrap();
        client
    });
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
}

#[rstest]
#[case::six(ADDRESS6)]
#[case::only_four(ADDRESS)]
fn datagrams_of_two_clients_are_answered(#[case] address: &'static str) {
    let Some(world) = World::new() else { return };
    let server = world
        .container
        .run(move || UdpSocket::bind((address, CONTAINER)).unwrap());
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let clients = [datagrams(&world.host), datagrams(&world.host)];
    clients[0].send(b"0").unwrap();
    let started = world.start();
    clients[1].send(b"1").unwrap();
    for round in 0..2 {
        let mut senders: Vec<SocketAddr> = Vec::new();
        for _ in &clients {
            let mut buffer = [0; 2000];
            let (length, from) = uninterrupted(|| server.recv_from(&mut buffer)).unwrap();
            senders.push(from);
            buffer[length] = b'!';
            server.send_to(&buffer[..=length], from).unwrap();
        }
        assert_ne!(senders[0], senders[1], "each has a socket of its own");
        for (number, client) in clients.iter().enumerate() {
            let mut buffer = [0; 2000];
            let length = uninterrupted(|| client.recv(&mut buffer)).unwrap();
            let mut expected = [number.to_string().as_bytes(), b"!"].concat();
            if round == 1 {
                expected.splice(1..1, vec![b'x'; 1200]);
            }
            assert_eq!(buffer[..length], expected);
            if round == 0 {
                let next = [number.to_string().as_bytes(), &[b'x'; 1200]].concat();
                client.send(&next).unwrap();
            }
        }
    }
    started.end();
}

/// Its standard input stays open, so only the kernel can have told it.
#[test]
fn it_ends_with_the_thread_that_has_started_it() {
    let Some(world) = World::new() else { return };
    let World {
        mut relay, host, ..
    } = world;
    let (_relay, mut child) = host.run(move || {
        let starter = thread::spawn(move || {
            let child = start(&mut relay);
            let pid = i32::try_from(child.id()).unwrap();
            // Until it serves, which is after it has asked the kernel.
            let mut client = TcpStream::connect(HOST).unwrap();
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            uninterrupted(|| client.read(&mut [0])).unwrap_err();
            assert!(ProcessHandle::open(pid).is_ok());
            (relay, child)
        });
        starter.join().unwrap()
    });
    wait(&child);
    assert!(!child.wait().unwrap().success());
}

/// A relay has no use for what its parent may do and has open.
#[test]
fn it_has_no_privileges_and_no_environment() {
    let Some(world) = World::new() else { return };
    let started = world.start();
    let mut client = connect(&started.host);
    uninterrupted(|| client.read(&mut [0])).unwrap_err();
    let read = |file: &str| {
        let path = format!("/proc/{}/{file}", started.child.id());
        std::fs::read_to_string(path).unwrap()
    };
    let status = read("status");
    for field in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let line = format!("{field}:\t0000000000000000\n");
        assert!(status.contains(&line), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    assert_eq!(read("environ"), "");
    let directory = std::fs::read_link(format!("/proc/{}/cwd", started.child.id()));
    assert_eq!(directory.unwrap(), Path::new("/"));
    started.end();
}
