//! Networks that the driver makes, and ports that it forwards, seen from a container, its neighbours, the host and another host. The hosts are
//! network namespaces of the test, joined by a veth pair.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use dev_agent::Plugin;
use e2e::stage;
use nomad_driver_nspawn::proto::driver::{PortMapping, TaskConfig};
use rstest::rstest;

use super::*;

const PORT: u16 = 25_080;

/// Two hosts. The driver runs on the first.
pub(super) struct Hosts {
    pub(super) host: Namespace,
    pub(super) other: Namespace,
}

impl Hosts {
    pub(super) fn new(stage: &Stage) -> Self {
        let host = Namespace::new(stage.name());
        let other = Namespace::new(&format!("{}o", stage.name()));
        let peer = format!("{}o", stage.name());
        host.ip(&[
            "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &peer,
        ]);
        for (namespace, last) in [(&host, "1"), (&other, "2")] {
            namespace.ip(&[
                "address",
                "add",
                &format!("192.0.2.{last}/24"),
                "dev",
                "eth0",
            ]);
            let address6 = format!("2001:db8::{last}/64");
            namespace.ip(&["address", "add", &address6, "dev", "eth0", "nodad"]);
            namespace.ip(&["link", "set", "eth0", "up"]);
        }
        host.ip(&["route", "add", "default", "via", "192.0.2.2"]);
        host.ip(&["-6", "route", "add", "default", "via", "2001:db8::2"]);
        Self { host, other }
    }
}

/// Calls it in a network namespace.
pub(super) fn within_network<T: Send>(namespace: &Namespace, call: impl FnOnce() -> T + Send) -> T {
    stage::within_network(&namespace.path(), call)
}

/// What a server at this address says over TCP.
pub(super) fn ask(address: &str, port: u16) -> io::Result<String> {
    let address = SocketAddr::new(address.parse().unwrap(), port);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// What a server at this address answers over UDP.
fn ask_udp(address: &str, port: u16) -> io::Result<String> {
    let address: IpAddr = address.parse().unwrap();
    let socket = UdpSocket::bind(match address {
        IpAddr::V4(_) => "0.0.0.0:0",
        IpAddr::V6(_) => "[::]:0",
    })?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect(SocketAddr::new(address, port))?;
    socket.send(b"ping")?;
    let mut answer = [0; 64];
    let length = support::uninterrupted(|| socket.recv(&mut answer))?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Answers datagrams in the network of a task as long as it runs, because busybox can't.
async fn answer_datagrams(running: &Running, plugin: &Plugin) {
    let inspected = running.inspect(plugin).await.unwrap().driver.unwrap();
    let path = format!("/proc/{}/ns/net", inspected.attributes["pid"]);
    let bind = || UdpSocket::bind("[::]:5353");
    let socket = stage::within_network(Path::new(&path), bind).unwrap();
    thread::spawn(move || {
        let mut asked = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut asked) {
            let _ = socket.send_to(&[b"pong ", &asked[..length]].concat(), from);
        }
    });
}

/// A web server, until the task is stopped. `up` is said when it listens.
const SERVER: &str = "mkdir -p /srv/www; echo page > /srv/www/index.html; httpd -p 80 -h /srv/www; echo up; \
    trap 'exit 0' TERM; while :; do sleep 0.05; done";

/// The ports of [`SERVER`], allocated on this address of the host.
fn of_server(address: &str) -> impl FnOnce(&mut TaskConfig) {
    let port = |label: &str, value: u16, to| PortMapping {
        label: label.to_owned(),
        value: value.into(),
        to,
        host_ip: address.to_owned(),
    };
    let ports = vec![port("http", PORT, 80), port("dns", PORT + 1, 5353)];
    move |task| task.resources.get_or_insert_default().ports = ports
}

async fn serve(stage: &Stage, plugin: &Plugin, address: &str, users: bool) -> Running {
    let task = stage
        .shell(SERVER)
        .with("user_namespacing", users)
        .with("ports", json!(["http", "dns"]));
    let allocation = stage.allocation(&task);
    let started = stage.start_edited(plugin, allocation, of_server(address));
    let running = started.await.unwrap();
    running.stdout.contains("up").await;
    answer_datagrams(&running, plugin).await;
    running
}

/// The addresses that a task shows of itself: of IPv4 and of IPv6.
pub(super) async fn addresses(running: &Running, plugin: &Plugin) -> Vec<String> {
    let inspected = running.inspect(plugin).await.unwrap().driver.unwrap();
    // Missing in the host's network.
    let all = inspected.attributes.get("addresses");
    let all = all.into_iter().flat_map(|all| all.split(", "));
    all.filter(|address| !address.starts_with("fe80"))
        .map(str::to_owned)
        .collect()
}

/// Real only: network interfaces. Nothing of it is left.
#[rstest]
#[case::with_user_namespace(true)]
#[case::without(false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_is_reached_from_everywhere(#[case] users: bool) {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let before = rules(&hosts.host);
    let running = serve(&stage, &plugin, "192.0.2.1", users).await;
    let own = addresses(&running, &plugin).await;
    let ways = [
        (&hosts.other, "192.0.2.1"),
        (&hosts.other, "2001:db8::1"),
        (&hosts.host, "192.0.2.1"),
        (&hosts.host, "2001:db8::1"),
        (&hosts.host, "127.0.0.1"),
        (&hosts.host, "::1"),
    ];
    for (from, to) in ways {
        let said = within_network(from, || ask(to, PORT));
        assert!(
            said.as_ref().is_ok_and(|said| said.contains("page")),
            "{to}: {said:?}"
        );
        let said = within_network(from, || ask_udp(to, PORT + 1));
        assert!(
            said.as_ref().is_ok_and(|said| said == "pong ping"),
            "{to}: {said:?}"
        );
    }
    for address in &own {
        let said = within_network(&hosts.host, || ask(address, 80));
        assert!(
            said.as_ref().is_ok_and(|said| said.contains("page")),
            "{address}: {said:?}"
        );
    }
    // From itself, and from a neighbour, by the host's addresses; and the neighbour by its own.
    let mut urls = vec![
        format!("http://192.0.2.1:{PORT}"),
        format!("http://[2001:db8::1]:{PORT}"),
    ];
    let get = |urls: &[String]| {
        let gets = urls
            .iter()
            .map(|url| format!("timeout 5 wget -q -O - {url}; "));
        gets.collect::<String>()
    };
    let command = get(&urls);
    let command = ["/bin/sh", "-c", &command];
    let itself = plugin.exec(&running.id, &command, None).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&itself.stdout), "page\npage\n");
    urls.extend([format!("http://{}", own[0]), format!("http://[{}]", own[1])]);
    let task = stage
        .shell(&get(&urls))
        .with("network_veth", true)
        .with("image", stage.tree("neighbour").to_str().unwrap());
    let neighbour = stage.run_on(&plugin, task).await;
    assert_eq!(neighbour.said(), "page\n".repeat(4), "{neighbour:?}");
    assert_eq!(running.stop(&plugin, AMPLE, "SIGTERM").await.code, 0);
    running.destroy(&plugin).await;
    let said = within_network(&hosts.other, || ask("192.0.2.1", PORT));
    assert!(said.is_err(), "{said:?}");
    assert_eq!(rules(&hosts.host), before);
    assert!(!hosts.host.ip(&["-o", "link"]).contains("nd-"));
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// What the firewall of a host has for containers: the elements of the driver's maps and sets.
fn rules(host: &Namespace) -> Vec<String> {
    let output = Command::new("ip")
        .args(["netns", "exec", host.name(), "nft", "list", "ruleset"])
        .output()
        .expect("nft is not installed (Debian: nftables)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines().filter(|line| line.contains("comment"));
    lines.map(str::to_owned).collect()
}

/// Real only: network interfaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_of_one_address_is_reached_there_only() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    hosts
        .host
        .ip(&["address", "add", "198.51.100.1/32", "dev", "eth0"]);
    hosts
        .other
        .ip(&["route", "add", "198.51.100.1/32", "dev", "eth0"]);
    let plugin = stage.plugin_in(&hosts.host).await;
    let running = serve(&stage, &plugin, "198.51.100.1", true).await;
    for (from, to, is_reached) in [
        (&hosts.other, "198.51.100.1", true),
        (&hosts.host, "198.51.100.1", true),
        (&hosts.other, "192.0.2.1", false),
        (&hosts.host, "127.0.0.1", false),
    ] {
        let said = within_network(from, || ask(to, PORT));
        assert_eq!(said.is_ok(), is_reached, "{to}: {said:?}");
    }
    running.destroy(&plugin).await;
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network interfaces. The other host sees the address of the first.
#[rstest]
#[case("192.0.2.2:8080", "192.0.2.1")]
#[case("[2001:db8::2]:8080", "2001:db8::1")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_reaches_other_hosts(#[case] server: &str, #[case] seen: &str) {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let listener = within_network(&hosts.other, || TcpListener::bind(server)).unwrap();
    let client = thread::spawn(move || {
        let (mut stream, client) = listener.accept().unwrap();
        // Otherwise the connection would be reset.
        let _ = stream.read(&mut [0; 1024]).unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello\n").unwrap();
        client.ip().to_string()
    });
    let task = stage
        .shell(&format!("timeout 5 wget -q -O - http://{server}/"))
        .with("network_mode", "bridge");
    let ended = stage.run_on(&plugin, task).await;
    assert_eq!(ended.said(), "hello\n", "{ended:?}");
    assert_eq!(client.join().unwrap(), seen);
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network interfaces. A container has the privileges for its own network, and none for the host's services.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_does_not_reach_the_loopback_of_the_host() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let _listener = within_network(&hosts.host, || TcpListener::bind("127.0.0.1:8080")).unwrap();
    let script = "ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.1/32 via 169.254.1.1 dev host0 onlink; \
        ip route get 127.0.0.1 | head -n 1; nc -w 2 127.0.0.1 8080 </dev/null && echo reached; echo end";
    let task = stage.shell(script).with("network_veth", true);
    let ended = stage.run_on(&plugin, task).await;
    assert!(ended.said().ends_with("end\n"), "{ended:?}");
    assert!(!ended.said().contains("reached"), "{ended:?}");
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_network_there_is_only_loopback() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let task = stage
        .shell("ls /sys/class/net; ip -o address | wc -l")
        .with("network_mode", "none");
    let ended = stage.run_on(&plugin, task).await;
    assert_eq!(ended.said(), "lo\n2\n", "{ended:?}");
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network interfaces. The bridge of a zone comes with the first container and goes with the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_containers_of_a_zone_reach_each_other_and_the_host() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let zone = |task: support::wire::Task| task.with("network_zone", "e2e");
    let first = stage.up(&plugin, zone(stage.shell(SERVER))).await;
    let links = hosts.host.ip(&["-o", "link"]);
    assert!(
        links.contains("nz-e2e") && links.contains("master nz-e2e"),
        "{links}"
    );
    let own = addresses(&first, &plugin).await;
    let script = format!(
        "timeout 5 wget -q -O - http://{}; timeout 5 wget -q -O - http://[{}]",
        own[0], own[1]
    );
    let second = stage
        .shell(&script)
        .with("image", stage.tree("neighbour").to_str().unwrap());
    let ended = stage.run_on(&plugin, zone(second)).await;
    assert_eq!(ended.said(), "page\npage\n", "{ended:?}");
    let said = within_network(&hosts.host, || ask(&own[0], 80));
    assert!(
        said.as_ref().is_ok_and(|said| said.contains("page")),
        "{said:?}"
    );
    assert!(hosts.host.ip(&["-o", "link"]).contains("nz-e2e"));
    first.destroy(&plugin).await;
    let links = hosts.host.ip(&["-o", "link"]);
    assert!(!links.contains("nz-") && !links.contains("nd-"), "{links}");
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network interfaces. The driver leaves a bridge of the host as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_on_a_bridge_of_the_host_is_reached_by_its_address() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    hosts.host.ip(&["link", "add", "e2ebr", "type", "bridge"]);
    hosts
        .host
        .ip(&["address", "add", "198.51.100.1/24", "dev", "e2ebr"]);
    hosts.host.ip(&["link", "set", "e2ebr", "up"]);
    let shown = |hosts: &Hosts| {
        let addresses = hosts.host.ip(&["-4", "-o", "address"]);
        let routes = hosts.host.ip(&["route"]);
        // Whether a bridge is up depends on what is connected to it.
        (addresses, routes.replace(" linkdown", ""))
    };
    let before = shown(&hosts);
    let plugin = stage.plugin_in(&hosts.host).await;
    let task = stage.shell(SERVER).with("network_bridge", "e2ebr");
    let running = stage.up(&plugin, task).await;
    let own = addresses(&running, &plugin).await;
    for address in &own {
        let said = within_network(&hosts.host, || ask(address, 80));
        assert!(
            said.as_ref().is_ok_and(|said| said.contains("page")),
            "{address}: {said:?}"
        );
    }
    running.destroy(&plugin).await;
    assert_eq!(shown(&hosts), before);
    let task = stage.shell("exit 0").with("network_bridge", "nobridge");
    let refused = stage.refused(&plugin, task).await;
    assert!(refused.contains("\"nobridge\""), "{refused}");
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: network interfaces. The tasks of a group have one network, with user namespaces, and reach each other on localhost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_joins_the_network_of_another_task_of_its_group() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let plugin = stage.plugin_in(&hosts.host).await;
    let first = serve(&stage, &plugin, "192.0.2.1", true).await;
    let (group, name) = (first.allocation.id(), &first.allocation.spec().task);
    let script = "timeout 5 wget -q -O - http://127.0.0.1; httpd -p 81 -h /; echo $?; cat /etc/hosts; echo end; \
        trap 'exit 0' TERM; while :; do sleep 0.05; done";
    let mut second = stage
        .shell(script)
        .with("image", stage.tree("neighbour").to_str().unwrap())
        .with("network_mode", format!("task:{name}"));
    "client".clone_into(&mut second.spec.task);
    let allocation = stage.allocation(&second);
    let into_group = |task: &mut TaskConfig| group.clone_into(&mut task.alloc_id);
    let second = stage.start_edited(&plugin, allocation, into_group).await;
    let second = second.unwrap();
    let shared = addresses(&first, &plugin).await;
    assert_eq!(addresses(&second, &plugin).await, shared);
    let said = second.stdout.contains("end\n").await;
    // A port below 1024 can be listened on.
    assert!(said.starts_with("page\n0\n"), "{said}");
    for address in shared {
        assert!(said.contains(&format!("\n{address} ")), "{said}");
    }
    second.destroy(&plugin).await;
    first.destroy(&plugin).await;
    end(plugin).await;
    drop(hosts);
    stage.leave();
}
