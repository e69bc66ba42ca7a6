//! The responder on a link, with plain sockets and with DHCP clients that this host has. Each test makes its own network namespaces.

use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, Message, MessageType};
use dhcproto::{Decodable as _, Decoder, Encodable as _};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::netns::{ADDRESS, GATEWAY, LINK, MAC, Space, linked};
use support::{DEADLINE, not_applicable, uninterrupted};

use super::*;

fn lease() -> Lease {
    Lease {
        address: ADDRESS.parse().unwrap(),
        mac: MAC,
        router: GATEWAY.parse().unwrap(),
        dns: vec!["192.0.2.53".parse().unwrap()],
        search: vec!["trial.example".to_owned()],
        host_name: Some("shop".to_owned()),
        mtu: Some(1400),
    }
}

fn bind(host: &Space) -> DhcpResponder {
    host.run(|| DhcpResponder::bind(LINK, lease())).unwrap()
}

/// Answers until it is dropped.
struct Serving {
    end: Option<PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Serving {
    fn new(responder: DhcpResponder) -> Self {
        let (ended, end) = std::io::pipe().unwrap();
        let thread = thread::spawn(move || serve(&responder, &ended));
        Self {
            end: Some(end),
            thread: Some(thread),
        }
    }
}

fn serve(responder: &DhcpResponder, ended: &PipeReader) {
    loop {
        let mut both = [responder.as_fd(), ended.as_fd()]
            .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
        poll(&mut both, PollTimeout::NONE).unwrap();
        if both[1].any().unwrap() {
            return;
        }
        let _ = responder.answer().unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end = None;
        let _ = self.thread.take().unwrap().join();
    }
}

/// A client's socket in the container.
fn client(container: &Space) -> UdpSocket {
    let socket = container.run(|| UdpSocket::bind("0.0.0.0:68").unwrap());
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

fn discover() -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(9, none, none, none, none, &MAC);
    let kind = DhcpOption::MessageType(MessageType::Discover);
    message.opts_mut().insert(kind);
    message.to_vec().unwrap()
}

fn offer(client: &UdpSocket) -> Message {
    let mut buffer = [0; 2048];
    let (length, from) = uninterrupted(|| client.recv_from(&mut buffer)).unwrap();
    assert_eq!(from, (GATEWAY.parse::<Ipv4Addr>().unwrap(), 67).into());
    Message::decode(&mut Decoder::new(&buffer[..length])).unwrap()
}

fn wait(responder: &DhcpResponder) {
    let mut one = [PollFd::new(responder.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut one, limit).unwrap(), 1, "nothing has arrived");
}

#[test]
fn a_link_that_does_not_exist_is_an_error() {
    let error = DhcpResponder::bind("no-such-link0", lease()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_request_is_answered_beside_a_server_of_the_host() {
    let Some((host, container)) = linked() else {
        return;
    };
    let server = || UdpSocket::bind("0.0.0.0:67");
    // Whichever starts first.
    let other = host.run(server).unwrap();
    let responder = bind(&host);
    drop(other);
    // A program that another test starts has the socket open until it executes.
    let end = Instant::now() + DEADLINE;
    let other = loop {
        match host.run(server) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(5));
            }
            bound => break bound.unwrap(),
        }
    };
    let client = client(&container);
    client.send_to(&discover(), "255.255.255.255:67").unwrap();
    wait(&responder);
    assert_eq!(responder.answer().unwrap(), Answered::All);
    assert_eq!(offer(&client).yiaddr(), lease().address);
    drop(other);
}

#[test]
fn other_packets_do_not_arrive() {
    let Some((host, container)) = linked() else {
        return;
    };
    let responder = bind(&host);
    let client = client(&container);
    for _ in 0..2 * BATCH {
        client.send_to(&discover(), (GATEWAY, 69)).unwrap();
        client.send_to(&[0; 20_000], (GATEWAY, 67)).unwrap();
    }
    client.send_to(&discover(), (GATEWAY, 67)).unwrap();
    wait(&responder);
    assert_eq!(responder.answer().unwrap(), Answered::All);
    offer(&client);
}

#[test]
fn a_flood_is_reported() {
    let Some((host, container)) = linked() else {
        return;
    };
    let responder = bind(&host);
    let client = client(&container);
    for _ in 0..BATCH + 1 {
        client.send_to(&discover(), (GATEWAY, 67)).unwrap();
    }
    wait(&responder);
    assert_eq!(responder.answer().unwrap(), Answered::Flooded);
    assert_eq!(responder.answer().unwrap(), Answered::All);
}

#[test]
fn a_link_that_is_removed_is_no_error() {
    let Some((host, _container)) = linked() else {
        return;
    };
    let responder = bind(&host);
    host.program(&["ip", "link", "delete", LINK]);
    for _ in 0..3 {
        assert_eq!(responder.answer().unwrap(), Answered::All);
    }
}

/// What the container has, as before a client ran in it.
fn check(host: &Space, container: &Space) {
    let addresses = container.program(&["ip", "-4", "-o", "address", "show", "dev", "host0"]);
    assert!(
        addresses.contains(&format!(" {ADDRESS}/32 ")),
        "{addresses}"
    );
    assert_eq!(addresses.lines().count(), 1, "{addresses}");
    let routes = container.program(&["ip", "-4", "route"]);
    assert!(
        routes.contains(&format!("default via {GATEWAY} dev host0")),
        "{routes}"
    );
    let listener = host.run(|| TcpListener::bind((GATEWAY, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let mut connection = container.run(move || TcpStream::connect((GATEWAY, port)).unwrap());
    connection.write_all(b"!").unwrap();
    let (mut accepted, from) = listener.accept().unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    assert_eq!(from.ip(), lease().address);
}

/// Whether a program is there, which is only asked for its version or, as busybox, for its parts: it must not run in the host's network.
#[expect(
    clippy::disallowed_methods,
    reason = "the test needs to know whether it can run"
)]
fn is_installed(program: &str, argument: &str, says: &str) -> bool {
    let said = Command::new(program).arg(argument).output();
    let there = said.is_ok_and(|said| {
        let text = [said.stdout, said.stderr].concat();
        String::from_utf8_lossy(&text).contains(says)
    });
    if !there {
        not_applicable(&format!("{says} is not installed"));
    }
    there
}

/// Where a client keeps what it knows, and what it changes.
fn prepare(container: &Space) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let resolver = scratch.path().join("resolv.conf");
    fs::write(&resolver, "").unwrap();
    let resolver = resolver.to_str().unwrap();
    container.program(&["mount", "--bind", resolver, "/etc/resolv.conf"]);
    scratch
}

/// A client with a limit, after which the test fails.
const LIMIT: [&str; 2] = ["timeout", "60"];

#[test]
fn dhclient_gets_the_address_that_the_container_has() {
    let Some((host, container)) = linked() else {
        return;
    };
    if !is_installed("dhclient", "--version", "dhclient") {
        return;
    }
    let serving = Serving::new(bind(&host));
    let scratch = prepare(&container);
    let leases = scratch.path().join("leases");
    let file = leases.to_str().unwrap();
    // From another host: it is refused, and the client asks for a new one.
    let old = "lease { interface \"host0\"; fixed-address 10.99.0.5; renew never; rebind never; expire never; }\n";
    fs::write(&leases, old).unwrap();
    // Without `-1`, as jobs run it.
    let run = |more: &[&str]| {
        container.program(&[&LIMIT, &["dhclient", "-lf", file][..], more].concat());
        fs::read_to_string(file).unwrap()
    };
    let text = run(&[]);
    assert!(
        text.contains(&format!("fixed-address {ADDRESS};")),
        "{text}"
    );
    check(&host, &container);
    run(&[]);
    check(&host, &container);
    run(&["-r"]);
    let addresses = container.program(&["ip", "-4", "-o", "address", "show", "dev", "host0"]);
    assert_eq!(addresses, "", "dhclient has removed it");
    run(&[]);
    check(&host, &container);
    drop(serving);
}

/// Does what the scripts of distributions do.
const SCRIPT: &str = r#"#!/bin/sh
case $1 in
deconfig) ip -4 address flush dev $interface ;;
bound)
    ip address add $ip/$mask dev $interface
    set -- $staticroutes
    while [ $# -ge 2 ]; do
        case $2 in
        0.0.0.0) ip route add $1 dev $interface ;;
        *) ip route add $1 via $2 dev $interface ;;
        esac
        shift 2
    done ;;
esac
"#;

#[test]
fn udhcpc_gets_the_address_that_the_container_has() {
    let Some((host, container)) = linked() else {
        return;
    };
    if !is_installed("busybox", "--list", "udhcpc") {
        return;
    }
    let serving = Serving::new(bind(&host));
    let scratch = prepare(&container);
    let script = scratch.path().join("script");
    let mut file = File::create(&script).unwrap();
    file.write_all(SCRIPT.as_bytes()).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755))
        .unwrap();
    drop(file);
    let script = script.to_str().unwrap();
    let client = ["busybox", "udhcpc", "-i", "host0", "-n", "-q", "-s", script];
    for _ in 0..2 {
        container.program(&[&LIMIT, &client[..]].concat());
        check(&host, &container);
    }
    drop(serving);
}
