//! Interfaces of the host in a container: one on top of the host's, and the host's own. Real only: network interfaces. The hosts are network
//! namespaces of the test.

use std::net::TcpListener;
use std::thread;

use rstest::rstest;
use support::not_applicable;

use super::own_network::{Hosts, within_network};
use super::*;

/// A cable of the first host, beside that of [`Hosts`], which the first host needs itself.
const CABLE: &str = "e2ecable";

/// Two hosts, joined by [`CABLE`] as well. The other one has an address on it, the first has none: that is for the container.
fn cabled(stage: &Stage) -> Hosts {
    let hosts = Hosts::new(stage);
    let (end, peer) = (CABLE, hosts.other.name());
    hosts.host.ip(&[
        "link", "add", end, "type", "veth", "peer", "name", end, "netns", peer,
    ]);
    hosts
        .other
        .ip(&["address", "add", "198.51.100.2/24", "dev", end]);
    for namespace in [&hosts.host, &hosts.other] {
        namespace.ip(&["link", "set", end, "up"]);
    }
    hosts
}

/// The interfaces of a host, without what they are connected to.
fn links(host: &Namespace) -> Vec<String> {
    let text = host.ip(&["-br", "link"]);
    let names = text
        .lines()
        .filter_map(|line| line.split([' ', '@']).next());
    let mut names: Vec<_> = names.map(str::to_owned).collect();
    names.sort();
    names
}

/// Answers one client on the other host's end of the cable; returns the address that it has seen.
fn answer_once(hosts: &Hosts) -> thread::JoinHandle<String> {
    let bind = || TcpListener::bind("198.51.100.2:8080");
    let listener = within_network(&hosts.other, bind).unwrap();
    thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, client) = listener.accept().unwrap();
        // Otherwise the connection would be reset.
        let _ = stream.read(&mut [0; 1024]).unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello\n").unwrap();
        client.ip().to_string()
    })
}

/// Lists the interfaces of the container, configures this one and asks the other host through it.
fn through(interface: &str) -> String {
    format!(
        "ls /sys/class/net; ip address add 198.51.100.9/24 dev {interface} && ip link set {interface} up && \
        timeout 20 wget -q -O - http://198.51.100.2:8080/"
    )
}

/// Whether the kernel can make such an interface on the cable.
fn has_kind(hosts: &Hosts, kind: &str) -> bool {
    let status = Command::new("ip")
        .args(["-netns", hosts.host.name(), "link", "add", "link", CABLE])
        .args(["name", "e2etry", "type", kind])
        .output();
    let has = status.unwrap().status.success();
    if has {
        hosts.host.ip(&["link", "delete", "e2etry"]);
    }
    has
}

/// Beside a network of its own or without one. What the container has had of the host is as before afterwards.
#[rstest]
#[case::macvlan("network_macvlan", "mv-", Some("macvlan"))]
#[case::ipvlan("network_ipvlan", "iv-", Some("ipvlan"))]
#[case::moved("network_interface", "", None)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_reaches_others_through_an_interface_of_the_host(
    #[case] option: &str,
    #[case] prefix: &str,
    #[case] kind: Option<&str>,
    #[values(false, true)] veth: bool,
    #[values(false, true)] users: bool,
) {
    let stage = Stage::new();
    let hosts = cabled(&stage);
    let plugin = stage.plugin_for_interfaces(&hosts.host).await;
    let before = links(&hosts.host);
    let inside = format!("{prefix}{CABLE}");
    let task = stage
        .shell(&through(&inside))
        .with(option, json!([CABLE]))
        .with("user_namespacing", users);
    let task = match veth {
        true => task.with("network_veth", true),
        false => task,
    };
    if let Some(kind) = kind.filter(|kind| !has_kind(&hosts, kind)) {
        let refused = stage.refused(&plugin, task).await;
        assert!(refused.contains(kind), "{refused}");
        not_applicable(&format!("the kernel has no {kind}"));
    } else {
        let client = answer_once(&hosts);
        let ended = stage.run_on(&plugin, task).await;
        let mut names = vec!["lo", &*inside];
        names.extend(veth.then_some("host0"));
        names.sort_unstable();
        assert_eq!(
            ended.said(),
            format!("{}\nhello\n", names.join("\n")),
            "{ended:?}"
        );
        assert_eq!(client.join().unwrap(), "198.51.100.9");
    }
    assert_eq!(links(&hosts.host), before);
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

const WAITING: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.05; done";

/// How a container ends.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Stop,
    Kill,
    Destroy,
    Leader,
    Supervisor,
}

/// Kills a process of a task, and waits for the task's exit.
async fn kill(plugin: &Plugin, running: &Running, process: i32) {
    let process = nix::unistd::Pid::from_raw(process);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).unwrap();
    running.wait(plugin).await;
}

/// However the container ends.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_is_the_hosts_again_after_the_end(
    #[values(
        Ending::Stop,
        Ending::Kill,
        Ending::Destroy,
        Ending::Leader,
        Ending::Supervisor
    )]
    ending: Ending,
    #[values(false, true)] users: bool,
) {
    let stage = Stage::new();
    let hosts = cabled(&stage);
    let plugin = stage.plugin_for_interfaces(&hosts.host).await;
    let before = links(&hosts.host);
    let text = if matches!(ending, Ending::Kill) {
        DEAF
    } else {
        WAITING
    };
    let task = stage
        .shell(text)
        .with("network_interface", json!([CABLE]))
        .with("user_namespacing", users);
    let running = stage.up(&plugin, task).await;
    assert!(!links(&hosts.host).contains(&CABLE.to_owned()));
    match ending {
        Ending::Stop => drop(running.stop(&plugin, AMPLE, "SIGTERM").await),
        Ending::Kill => drop(running.stop(&plugin, Duration::ZERO, "SIGTERM").await),
        Ending::Destroy => {}
        Ending::Leader => kill(&plugin, &running, running.leader()).await,
        Ending::Supervisor => kill(&plugin, &running, running.supervisor()).await,
    }
    running.destroy(&plugin).await;
    assert_eq!(links(&hosts.host), before);
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Then only the kernel is left to give an interface back, and it does that for hardware alone. A virtual one goes with the network of the
/// container, like those that were made on top of another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_virtual_interface_is_gone_if_systemd_nspawn_was_killed() {
    let stage = Stage::new();
    let hosts = cabled(&stage);
    let plugin = stage.plugin_for_interfaces(&hosts.host).await;
    let before = links(&hosts.host);
    let task = stage
        .shell(WAITING)
        .with("network_interface", json!([CABLE]))
        .with("network_macvlan", json!(["eth0"]));
    let running = stage.up(&plugin, task).await;
    kill(&plugin, &running, running.nspawn()).await;
    running.destroy(&plugin).await;
    let rest: Vec<_> = before.into_iter().filter(|name| name != CABLE).collect();
    tokio::task::block_in_place(|| {
        // The kernel does that after the last process of the container is gone. The other end of the cable goes with this one.
        until("the end of the container's network", || {
            (!links(&hosts.other).contains(&CABLE.to_owned())).then_some(())
        });
    });
    assert_eq!(links(&hosts.host), rest);
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// The error names the option and its value, and nothing has been made.
#[rstest]
#[case("network_macvlan")]
#[case("network_ipvlan")]
#[case("network_interface")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_that_the_host_does_not_have_is_refused_by_name(
    #[case] option: &str,
    #[values(false, true)] veth: bool,
) {
    let stage = Stage::new();
    let hosts = cabled(&stage);
    let plugin = stage.plugin_for_interfaces(&hosts.host).await;
    let before = links(&hosts.host);
    let task = stage.shell("exit 0").with(option, json!([CABLE, "nolink"]));
    let task = match veth {
        true => task.with("network_veth", true),
        false => task,
    };
    let refused = stage.refused(&plugin, task).await;
    let words = format!("config.{option}: the host has no interface \"nolink\"");
    assert!(refused.contains(&words), "{refused}");
    assert_eq!(links(&hosts.host), before);
    end(plugin).await;
    drop(hosts);
    stage.leave();
}
