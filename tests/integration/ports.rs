//! Ports in Nomad's messages, with the address on which they are allocated.

use std::collections::HashMap;
use std::sync::Arc;

use nomad_driver_nspawn::proto::driver::{PortMapping, Resources, TaskConfig};
use rstest::rstest;
use serde_json::json;

use crate::harness::{Host, argv, refusal};

/// The message of Nomad for the port `http`.
fn allotted(host_ip: &str) -> impl FnOnce(&mut TaskConfig) {
    let port = PortMapping {
        label: "http".to_owned(),
        value: 25_918,
        to: 80,
        host_ip: host_ip.to_owned(),
    };
    move |task| {
        let resources = task.resources.get_or_insert_with(Resources::default);
        resources.ports = vec![port];
    }
}

#[tokio::test]
async fn a_port_of_an_address_that_the_host_does_not_have_is_refused() {
    let host_ip = "203.0.113.7";
    let host = Host::new();
    let plugin = host.plugin_in_new_network().await;
    let task = host.shell("exit 0").with("ports", json!(["http"]));
    let allocation = Arc::new(host.allocation(task));
    let status = refusal(
        host.start_edited(&plugin, allocation, allotted(host_ip))
            .await,
    );
    for part in ["\"http\"", host_ip] {
        assert!(status.message().contains(part), "{status}");
    }
    assert!(host.starts().is_empty(), "systemd-nspawn was called");
}

#[rstest]
#[case("")]
#[case("0.0.0.0")]
#[case("::")]
#[case("127.0.0.1")]
#[tokio::test]
async fn the_agent_is_told_of_a_network_that_it_has_not_made(#[case] host_ip: &str) {
    let host = Host::new();
    let plugin = host.plugin_in_new_network().await;
    let task = host.shell("exit 0").with("ports", json!(["http"]));
    let allocation = Arc::new(host.allocation(task));
    let started = host
        .start_edited(&plugin, allocation, allotted(host_ip))
        .await;
    let running = started.unwrap();
    let inspected = running.inspect(&plugin).await.unwrap();
    let network = inspected.network_override.unwrap();
    assert_eq!(network.port_map, HashMap::from([("http".to_owned(), 80)]));
    assert!(network.addr.starts_with("10.213."), "{network:?}");
    assert!(!network.auto_advertise);
    running.wait(&plugin).await;
    running.destroy(&plugin).await;
    let words = argv(&host.starts()[0]);
    assert!(words.contains(&"--private-network".to_owned()), "{words:?}");
}

/// The command itself listens on the address that Nomad passes to it.
#[tokio::test]
async fn in_the_host_network_no_port_is_forwarded_or_refused() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("exit 0")));
    let started = host
        .start_edited(&plugin, allocation, allotted("127.0.0.1"))
        .await;
    let running = started.unwrap();
    running.wait(&plugin).await;
    running.destroy(&plugin).await;
    let words = argv(&host.starts()[0]);
    assert!(
        !words.iter().any(|word| word.starts_with("--port")),
        "{words:?}"
    );
}
