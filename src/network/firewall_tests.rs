//! The driver's table with traffic: another host, the host, and two containers, each a namespace of the test's own.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rstest::rstest;
use support::uninterrupted;

use super::*;
use crate::network::testing::{Namespace, plan, port};
use crate::network::{Mapping, conntrack};

/// How long a test waits for a packet. Only a broken test ever waits this long.
const DEADLINE: Duration = Duration::from_secs(60);

const HOST: &str = "192.0.2.1";
const HOST_SECOND: &str = "192.0.2.3";
const HOST6: &str = "2001:db8::1";
const OTHER: &str = "192.0.2.2";
const OTHER6: &str = "2001:db8::2";

/// The programs that a world needs.
const PROGRAMS: [&str; 2] = ["nft", "ip"];

struct World {
    host: Namespace,
    other: Namespace,
    /// Those of the plans 1 and 2.
    containers: [(Namespace, Server); 2],
}

/// What listens in a container, on port 80.
struct Server {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl World {
    fn new(programs: &[&str]) -> Option<Self> {
        let host = Namespace::new(&[&PROGRAMS, programs].concat())?;
        let other = Namespace::new(&[])?;
        host.join("eth0", &other, "eth0");
        host.feed(
            "ip -batch -",
            &format!(
                "link set lo up\naddress add {HOST}/24 dev eth0\naddress add {HOST_SECOND}/24 dev eth0\naddress add {HOST6}/64 dev eth0 nodad\n"
            ),
        );
        other.feed(
            "ip -batch -",
            &format!("address add {OTHER}/24 dev eth0\naddress add {OTHER6}/64 dev eth0 nodad\n"),
        );
        for (name, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // Each refusal is an event that a test waits for.
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
        ] {
            host.set(name, value);
        }
        let first = container(&host, 1)?;
        let containers = [first, container(&host, 2)?];
        Some(Self {
            host,
            other,
            containers,
        })
    }

    fn open(&self, plan: &NetworkPlan) -> Result<(), NetworkError> {
        let plan = plan.clone();
        self.host.run(move || open(&plan))
    }

    /// Plans 1 and 2 with these ports, opened.
    fn opened(&self, ports: [&[Mapping]; 2]) -> [NetworkPlan; 2] {
        let plans = [plan(1, ports[0]), plan(2, ports[1])];
        for plan in &plans {
            self.open(plan).unwrap();
        }
        plans
    }

    fn close(&self, plan: &NetworkPlan) {
        let plan = plan.clone();
        self.host.run(move || close(&plan)).unwrap();
    }

    fn forget_udp(&self, plan: &NetworkPlan, few: usize) {
        let ports = plan.ports.clone();
        self.host
            .run(move || conntrack::forget_udp_of(&ports, few))
            .unwrap();
    }

    /// The client's addresses that a container sees over TCP and over UDP.
    fn seen(&self, container: usize, from: &Namespace, to: &str) -> [IpAddr; 2] {
        let server = &self.containers[container].1;
        let to = to.parse().unwrap();
        [
            server.seen_over_tcp(from, to),
            server.seen_over_udp(from, to),
        ]
    }
}

/// A container of the plan with this number.
fn container(host: &Namespace, number: u8) -> Option<(Namespace, Server)> {
    let plan = plan(number, &[]);
    let (link, v4, v6) = (&plan.link, plan.address, plan.address6);
    let container = Namespace::new(&[])?;
    host.join(link, &container, "host0");
    host.feed(
        "ip -batch -",
        &format!(
            "address add 10.77.0.254/32 dev {link}\naddress add fe80::1/64 dev {link} nodad\nroute add {v4} dev {link}\nroute add {v6} dev {link}\n"
        ),
    );
    host.set(&format!("ipv4/conf/{link}/route_localnet"), "1");
    container.feed(
        "ip -batch -",
        &format!(
            "address add {v4}/32 dev host0\naddress add {v6}/128 dev host0 nodad\nroute add 10.77.0.254 dev host0\nroute add default via 10.77.0.254\nroute add default via fe80::1 dev host0\n"
        ),
    );
    let server = container.run(|| Server {
        tcp: TcpListener::bind("[::]:80").unwrap(),
        udp: datagrams("[::]:80"),
    });
    Some((container, server))
}

fn datagrams(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

fn connect(from: &Namespace, to: SocketAddr) -> std::io::Result<TcpStream> {
    from.run(move || TcpStream::connect_timeout(&to, DEADLINE))
}

/// A UDP socket that sends to one address, and learns of refusals.
fn client(from: &Namespace, to: SocketAddr) -> UdpSocket {
    from.run(move || {
        let socket = datagrams(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        socket.connect(to).unwrap();
        socket
    })
}

/// Waits until there is something to accept or to receive.
fn wait(socket: &impl AsFd) {
    let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).unwrap();
    let ready = uninterrupted(|| poll(&mut sockets, timeout).map_err(std::io::Error::from));
    assert_eq!(ready.unwrap(), 1, "nothing has arrived");
}

impl Server {
    fn seen_over_tcp(&self, from: &Namespace, to: SocketAddr) -> IpAddr {
        let mut client = connect(from, to).unwrap_or_else(|error| panic!("{to}: {error}"));
        wait(&self.tcp);
        let (mut server, peer) = self.tcp.accept().unwrap();
        server.write_all(b"answer").unwrap();
        drop(server);
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        peer.ip().to_canonical()
    }

    fn seen_over_udp(&self, from: &Namespace, to: SocketAddr) -> IpAddr {
        self.exchange(&client(from, to))
    }

    fn exchange(&self, client: &UdpSocket) -> IpAddr {
        client.send(b"question").unwrap();
        let mut buffer = [0; 16];
        let (_, peer) = uninterrupted(|| self.udp.recv_from(&mut buffer)).unwrap();
        self.udp.send_to(b"answer", peer).unwrap();
        let length = uninterrupted(|| client.recv(&mut buffer)).unwrap();
        assert_eq!(&buffer[..length], b"answer");
        peer.ip().to_canonical()
    }
}

fn is_refused(from: &Namespace, to: &str) {
    let to = to.parse().unwrap();
    let error = connect(from, to).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
    is_refused_over_udp(&client(from, to));
}

fn is_refused_over_udp(client: &UdpSocket) {
    client.send(b"question").unwrap();
    let error = uninterrupted(|| client.recv(&mut [0; 16])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

fn both(address: &str) -> [IpAddr; 2] {
    [address.parse().unwrap(); 2]
}

#[test]
fn a_port_is_reached_from_everywhere_and_other_hosts_are_seen_by_their_address() {
    let Some(world) = World::new(&[]) else { return };
    let plans = world.opened([&[port("http", None, 8080, 80)], &[]]);
    let [(own, _), (neighbour, _)] = &world.containers;
    for (from, to, seen) in [
        (&world.other, "192.0.2.1:8080", OTHER),
        (&world.other, "192.0.2.3:8080", OTHER),
        (&world.other, "[2001:db8::1]:8080", OTHER6),
        (&world.host, "192.0.2.1:8080", HOST),
        (&world.host, "[2001:db8::1]:8080", HOST6),
        (&world.host, "127.0.0.1:8080", "10.77.0.254"),
        // Itself, which could not answer its own address.
        (own, "192.0.2.1:8080", "10.77.0.254"),
        (own, "[2001:db8::1]:8080", HOST6),
        (neighbour, "192.0.2.1:8080", "10.77.0.254"),
        (neighbour, "[2001:db8::1]:8080", HOST6),
    ] {
        assert_eq!(world.seen(0, from, to), both(seen), "{to}");
    }
    is_refused(&world.host, "[::1]:8080");
    is_refused(&world.other, "192.0.2.1:8081");
    world.close(&plans[0]);
    world.forget_udp(&plans[0], usize::MAX);
    is_refused(&world.other, "192.0.2.1:8080");
    is_refused(&world.host, "127.0.0.1:8080");
}

#[test]
fn a_port_of_one_address_is_forwarded_there_only_and_before_that_of_all() {
    let Some(world) = World::new(&[]) else { return };
    let ports = [
        port("one", Some(HOST), 8080, 80),
        port("six", Some(HOST6), 8081, 80),
        port("loopback", Some("127.0.0.1"), 8082, 80),
    ];
    world.opened([&ports, &[]]);
    for (from, to, seen) in [
        (&world.other, "192.0.2.1:8080", OTHER),
        (&world.host, "192.0.2.1:8080", HOST),
        (&world.other, "[2001:db8::1]:8081", OTHER6),
        (&world.host, "127.0.0.1:8082", "10.77.0.254"),
    ] {
        assert_eq!(world.seen(0, from, to), both(seen), "{to}");
    }
    for (from, to) in [
        (&world.other, "192.0.2.3:8080"),
        (&world.other, "[2001:db8::1]:8080"),
        (&world.other, "192.0.2.1:8081"),
        (&world.host, "127.0.0.1:8080"),
        (&world.other, "192.0.2.1:8082"),
    ] {
        is_refused(from, to);
    }
    world
        .open(&plan(2, &[port("all", None, 8080, 80)]))
        .unwrap();
    assert_eq!(world.seen(0, &world.other, "192.0.2.1:8080"), both(OTHER));
    assert_eq!(world.seen(1, &world.other, "192.0.2.3:8080"), both(OTHER));
}

/// Other hosts have no route to a container.
#[test]
fn containers_reach_others_by_the_hosts_address_and_each_other_by_their_own() {
    let Some(world) = World::new(&[]) else { return };
    world.opened([&[], &[]]);
    let other = world.other.run(|| Server {
        tcp: TcpListener::bind("[::]:80").unwrap(),
        udp: datagrams("[::]:80"),
    });
    let [(own, _), _] = &world.containers;
    for (to, seen) in [("192.0.2.2:80", HOST), ("[2001:db8::2]:80", HOST6)] {
        let to = to.parse().unwrap();
        let all = [other.seen_over_tcp(own, to), other.seen_over_udp(own, to)];
        assert_eq!(all, both(seen), "{to}");
    }
    assert_eq!(world.seen(1, own, "10.77.0.2:80"), both("10.77.0.1"));
    assert_eq!(world.seen(1, own, "[fd77::2]:80"), both("fd77::1"));
}

/// Sends from an address to one, then something that is let through. `true` if both arrive.
fn arrives(world: &World, from: &'static str, to: &str) -> bool {
    let receiver = world.host.run(|| datagrams("[::]:9000"));
    let mut buffer = [0; 16];
    let to: SocketAddr = to.parse().unwrap();
    let allowed: SocketAddr = match to {
        SocketAddr::V4(_) => "192.0.2.1:9000",
        SocketAddr::V6(_) => "[2001:db8::1]:9000",
    }
    .parse()
    .unwrap();
    world.containers[0].0.run(move || {
        // Finds out the host's hardware address, which the container would ask for from the address that it must not use.
        client_of(allowed).send(b"first").unwrap();
    });
    uninterrupted(|| receiver.recv_from(&mut buffer)).unwrap();
    world.containers[0].0.run(move || {
        let sender = UdpSocket::bind((from, 0)).unwrap();
        sender.send_to(b"questionable", to).unwrap();
        // From the container's own address.
        client_of(allowed).send(b"allowed").unwrap();
    });
    let mut all = Vec::new();
    while !all.contains(&b"allowed".to_vec()) {
        let (length, _) = uninterrupted(|| receiver.recv_from(&mut buffer)).unwrap();
        all.push(buffer[..length].to_vec());
    }
    // It was sent first, along the same path.
    all.contains(&b"questionable".to_vec())
}

fn client_of(to: SocketAddr) -> UdpSocket {
    let own = if to.is_ipv4() { "10.77.0.1" } else { "fd77::1" };
    let socket = UdpSocket::bind((own, 0)).unwrap();
    socket.connect(to).unwrap();
    socket
}

#[rstest]
#[case::loopback_of_the_host("10.77.0.1", "127.0.0.1:9000")]
#[case::another_loopback_address("10.77.0.1", "127.9.9.9:9000")]
#[case::address_of_a_neighbour("10.77.0.2", "192.0.2.1:9000")]
#[case::address_of_anyone("198.51.100.7", "192.0.2.1:9000")]
#[case::loopback_as_source("127.0.0.1", "192.0.2.1:9000")]
#[case::address_of_a_neighbour_6("fd77::2", "[2001:db8::1]:9000")]
#[case::address_of_anyone_6("2001:db8:9::1", "[2001:db8::1]:9000")]
fn a_container_is_kept_to_its_addresses_and_off_the_loopback_of_the_host(
    #[case] from: &'static str,
    #[case] to: &str,
) {
    let Some(world) = World::new(&[]) else { return };
    world.opened([&[], &[]]);
    // Without a loopback interface that is up, 127.0.0.1 is an address like others.
    let (container, _) = &world.containers[0];
    container.set("ipv4/conf/host0/route_localnet", "1");
    if from != "10.77.0.1" {
        let length = if from.contains(':') {
            "128 nodad"
        } else {
            "32"
        };
        let (length, flags) = length.split_once(' ').unwrap_or((length, ""));
        let line = format!("ip address add {from}/{length} dev host0 {flags}");
        container.call(line.trim());
    }
    // So that the kernel itself would accept it.
    world.host.set("ipv4/conf/nd-1/accept_local", "1");
    assert!(!arrives(&world, from, to));
    world
        .host
        .call("nft flush chain inet nomad_driver_nspawn incoming");
    assert!(
        arrives(&world, from, to),
        "the test sends nothing that arrives"
    );
}

/// A flow is tracked before the port is forwarded, and goes on after it is not.
#[rstest]
#[case::v4("192.0.2.1:8080", OTHER, &[])]
#[case::v6("[2001:db8::1]:8080", OTHER6, &[])]
#[case::one_of_two_ports("192.0.2.1:8080", OTHER, &[port("http", None, 8081, 80)])]
fn a_udp_flow_follows_the_port_once_it_is_forgotten(
    #[case] to: &str,
    #[case] seen: &str,
    #[case] more: &[Mapping],
    // Both ways to read the flows: with a filter and without.
    #[values(0, usize::MAX)] few: usize,
) {
    let Some(world) = World::new(&[]) else { return };
    world.host.feed(
        "nft -f -",
        "table inet someones { chain input { type filter hook input priority 0; ct state established accept; }; }",
    );
    let client = client(&world.other, to.parse().unwrap());
    let unrelated = self::client(&world.other, to.replace("8080", "9000").parse().unwrap());
    is_refused_over_udp(&client);
    is_refused_over_udp(&unrelated);
    let ports = [&[port("dns", None, 8080, 80)], more].concat();
    let [plan, _] = world.opened([&ports, &[]]);
    is_refused_over_udp(&client);
    world.forget_udp(&plan, few);
    assert_eq!([world.containers[0].1.exchange(&client); 2], both(seen));
    world.close(&plan);
    // It still arrives, only the answer does not.
    client.send(b"question").unwrap();
    let server = &world.containers[0].1.udp;
    uninterrupted(|| server.recv_from(&mut [0; 16])).unwrap();
    world.forget_udp(&plan, few);
    is_refused_over_udp(&client);
    is_refused_over_udp(&unrelated);
}

#[rstest]
#[case::before(true)]
#[case::after(false)]
fn iptables_does_not_take_a_port(#[case] before: bool) {
    let Some(world) = World::new(&["iptables"]) else {
        return;
    };
    let take = || {
        for chain in ["PREROUTING", "OUTPUT"] {
            world.host.call(&format!(
                "iptables -t nat -A {chain} -p tcp --dport 8080 -j DNAT --to-destination 10.77.0.2:80"
            ));
            world.host.call(&format!(
                "iptables -t nat -A {chain} -p udp --dport 8080 -j DNAT --to-destination 10.77.0.2:80"
            ));
        }
    };
    if before {
        take();
    }
    world.opened([&[port("http", None, 8080, 80)], &[]]);
    if !before {
        take();
    }
    for (from, to, seen) in [
        (&world.other, "192.0.2.1:8080", OTHER),
        (&world.host, "192.0.2.1:8080", HOST),
    ] {
        assert_eq!(world.seen(0, from, to), both(seen), "{to}");
    }
}

#[test]
fn a_rule_set_that_someone_flushes_is_made_again() {
    let Some(world) = World::new(&[]) else { return };
    let [plan, _] = world.opened([&[port("http", None, 8080, 80)], &[]]);
    world.host.call("nft flush ruleset");
    world.close(&plan);
    world.open(&plan).unwrap();
    assert_eq!(world.seen(0, &world.other, "192.0.2.1:8080"), both(OTHER));
}
