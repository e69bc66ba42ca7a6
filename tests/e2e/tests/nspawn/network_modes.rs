//! The table of network modes in docs/networking.md, measured: what a container in each of them reaches, and what reaches it. All of them have
//! a user namespace.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::{PortMapping, TaskConfig};
use support::wire::Task;

use super::own_network::{Hosts, addresses, ask, within_network};
use super::*;

/// The port of the container's server, and the one of the host that is forwarded to it.
const SERVED: u16 = 8080;
const FORWARDED: u16 = 25_180;

/// Says what it reaches, and serves a page.
const SCRIPT: &str = "mkdir -p /srv/www; echo page > /srv/www/index.html; httpd -p 8080 -h /srv/www; \
    httpd -p 80 -h /srv/www && echo low; \
    timeout 15 wget -q -O - http://192.0.2.2:8080 && timeout 15 wget -q -O - http://[2001:db8::2]:8080 && echo out; \
    echo up; trap 'exit 0' TERM; while :; do sleep 0.05; done";

const COLUMNS: [&str; 7] = [
    "network of the task",
    "connects to other hosts",
    "is reached from other hosts, by the host's addresses",
    "from the host, on `127.0.0.1`",
    "from the host, on `::1`",
    "from the host, by an address of its own",
    "listens on ports below 1024",
];

/// A mode: its name in the table, its option, and whether ports are forwarded into it.
const MODES: [(&str, [&str; 2], bool); 5] = [
    ("the host's", ["network_mode", "host"], false),
    ("its own", ["network_mode", "bridge"], true),
    ("none", ["network_mode", "none"], false),
    ("a zone", ["network_zone", "e2e"], true),
    ("a bridge of the host", ["network_bridge", "e2ebr"], true),
];

/// Answers every connection to the other host.
fn serve_other(hosts: &Hosts) {
    for address in ["192.0.2.2:8080", "[2001:db8::2]:8080"] {
        let listener = within_network(&hosts.other, || TcpListener::bind(address)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nother\n");
            }
        });
    }
}

/// The port of the container's server, allocated on all addresses of the host.
fn with_port(task: &mut TaskConfig) {
    let port = PortMapping {
        label: "http".to_owned(),
        value: FORWARDED.into(),
        to: SERVED.into(),
        host_ip: String::new(),
    };
    task.resources.get_or_insert_default().ports = vec![port];
}

/// What works for a running server, in the order of the columns.
async fn observe(running: &Running, plugin: &Plugin, hosts: &Hosts, port: u16) -> [bool; 6] {
    let said = running.stdout.contains("up\n").await;
    let answers = |namespace: &Namespace, addresses: &[&str], port: u16| {
        within_network(namespace, || {
            addresses
                .iter()
                .all(|address| ask(address, port).is_ok_and(|said| said.contains("page")))
        })
    };
    let own = addresses(running, plugin).await;
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let of_host = ["192.0.2.1", "2001:db8::1"];
    [
        said.contains("out\n"),
        answers(&hosts.other, &of_host, port),
        answers(&hosts.host, &["127.0.0.1"], port),
        answers(&hosts.host, &["::1"], port),
        !own.is_empty() && answers(&hosts.host, &own, SERVED),
        said.contains("low\n"),
    ]
}

fn row(name: &str, works: [bool; 6]) -> String {
    let mut row = format!("| {name} |");
    for works in works {
        let word = if works { "yes" } else { "no" };
        write!(row, " {word} |").unwrap();
    }
    row + "\n"
}

/// Real only: network interfaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_of_network_modes_is_what_happens() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    // Where the kernel can't forward IPv6 for single interfaces, an operator does it for all.
    within_network(&hosts.host, || {
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    });
    hosts.host.ip(&["link", "add", "e2ebr", "type", "bridge"]);
    let address = ["address", "add", "198.51.100.1/24", "dev", "e2ebr"];
    hosts.host.ip(&address);
    hosts.host.ip(&["link", "set", "e2ebr", "up"]);
    serve_other(&hosts);
    let plugin = stage.plugin_in(&hosts.host).await;
    let task = |name: &str, script: &str, [option, value]: [&str; 2]| {
        let image = stage.tree(&name.replace(|letter: char| !letter.is_ascii_alphanumeric(), ""));
        let task = stage.shell(script).with("image", image.to_str().unwrap());
        task.with("user_namespacing", true).with(option, value)
    };
    let start = async |task: Task, edit: &dyn Fn(&mut TaskConfig)| {
        let allocation = stage.allocation(&task);
        let started = stage.start_edited(&plugin, allocation, edit).await;
        started.unwrap()
    };
    let mut table = format!("| {} |\n|{}\n", COLUMNS.join(" | "), "---|".repeat(7));
    for (name, option, ports) in MODES {
        let task = task(name, SCRIPT, option);
        let (running, port) = match ports {
            true => {
                let task = task.with("ports", json!(["http"]));
                (start(task, &with_port).await, FORWARDED)
            }
            false => (start(task, &|_| {}).await, SERVED),
        };
        let works = observe(&running, &plugin, &hosts, port).await;
        table += &row(name, works);
        running.destroy(&plugin).await;
    }
    let waits = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
    let other = task("other", waits, ["network_mode", "bridge"]);
    let other = start(other.with("ports", json!(["http"])), &with_port).await;
    let name = format!("task:{}", other.allocation.spec().task);
    let mut joined = task("joined", SCRIPT, ["network_mode", &name]);
    "joined".clone_into(&mut joined.spec.task);
    let of_group = |task: &mut TaskConfig| other.allocation.id().clone_into(&mut task.alloc_id);
    let joined = start(joined, &of_group).await;
    let works = observe(&joined, &plugin, &hosts, FORWARDED).await;
    table += &row("that of another task, which has one of its own", works);
    joined.destroy(&plugin).await;
    other.destroy(&plugin).await;
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/networking.md");
    let docs = fs::read_to_string(docs).unwrap();
    assert!(docs.contains(&table), "not in docs/networking.md:\n{table}");
    end(plugin).await;
    drop(hosts);
    stage.leave();
}
