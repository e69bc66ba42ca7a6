//! The supervisor's part. What the child does is tested with the real program, in `tests/integration/relay.rs`.

use std::net::{IpAddr, TcpListener, TcpStream};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::DEADLINE;
use support::netns::{Space, linked_with_ipv6};

use super::*;

fn plan(ports: &[(u16, Option<&str>)]) -> NetworkPlan {
    let ports = ports.iter().map(|(host, address)| Mapping {
        label: "http".to_owned(),
        address: address.map(|address| address.parse::<IpAddr>().unwrap()),
        host: *host,
        container: 80,
    });
    NetworkPlan {
        owner: "alloc/task".to_owned(),
        link: "link0".to_owned(),
        attachment: super::super::Attachment::Host,
        mac: [0; 6],
        address: Ipv4Addr::LOCALHOST,
        address6: Ipv6Addr::LOCALHOST,
        ports: ports.collect(),
    }
}

fn is_ready(relay: &Relay, limit: PollTimeout) -> bool {
    let mut one = [PollFd::new(relay.descriptor().unwrap(), PollFlags::POLLIN)];
    poll(&mut one, limit).unwrap() == 1
}

#[test]
fn only_ports_of_the_loopback_address_are_bound() {
    let Some((host, _container)) = linked_with_ipv6() else {
        return;
    };
    let ports = [
        (8001, None),
        (8002, Some("::1")),
        (8003, Some("127.0.0.1")),
        (8004, Some("fd00:7::1")),
    ];
    let (relay, notes) = host.run(move || Relay::bind(&plan(&ports)));
    assert_eq!(notes, Vec::<String>::new());
    assert_eq!(relay.sockets.len(), 4);
    let free = host.run(|| [8001, 8002, 8003, 8004].map(|p| TcpListener::bind(("::1", p)).is_ok()));
    assert_eq!(free, [false, false, true, true]);
}

#[test]
fn a_port_in_use_is_a_note_and_the_others_are_bound() {
    let Some((host, _container)) = linked_with_ipv6() else {
        return;
    };
    let (_other, (relay, notes)) = host.run(|| {
        let other = TcpListener::bind("[::]:8001").unwrap();
        (other, Relay::bind(&plan(&[(8001, None), (8002, None)])))
    });
    let [note] = &notes[..] else {
        panic!("{notes:?}")
    };
    let expected = "port 8001 (http) is not forwarded on [::1] over TCP: Address already in use";
    assert!(note.starts_with(expected), "{note}");
    assert_eq!(relay.sockets.len(), 3);
}

#[test]
fn a_host_without_the_address_has_no_relay() {
    // Its loopback interface is down.
    let Some(host) = Space::new() else { return };
    let (relay, notes) = host.run(|| Relay::bind(&plan(&[(8001, None)])));
    assert_eq!(notes, Vec::<String>::new());
    assert!(relay.descriptor().is_none());
}

#[test]
fn a_connection_makes_the_descriptor_ready() {
    let Some((host, _container)) = linked_with_ipv6() else {
        return;
    };
    let (relay, _) = host.run(|| Relay::bind(&plan(&[(8001, None), (8002, None)])));
    assert!(!is_ready(&relay, PollTimeout::ZERO));
    let _client = host.run(|| TcpStream::connect("[::1]:8002").unwrap());
    assert!(is_ready(&relay, PollTimeout::try_from(DEADLINE).unwrap()));
}

#[test]
fn a_child_that_keeps_failing_is_not_started_for_ever() {
    let (mut relay, _) = Relay::bind(&plan(&[]));
    for _ in 0..MAX_STARTS {
        relay.start_program(Path::new("/dev/null")).unwrap_err();
    }
    let error = relay.start_program(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "it has ended too often");
}
