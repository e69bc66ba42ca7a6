//! Ports in Nomad's messages, with the address on which they are allocated.

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

#[rstest]
#[case("127.0.0.1")]
#[case("203.0.113.7")]
#[tokio::test]
async fn a_port_of_one_address_is_refused(#[case] host_ip: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
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
#[tokio::test]
async fn a_port_of_every_address_is_forwarded(#[case] host_ip: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.shell("exit 0").with("ports", json!(["http"]));
    let allocation = Arc::new(host.allocation(task));
    let started = host
        .start_edited(&plugin, allocation, allotted(host_ip))
        .await;
    let running = started.unwrap();
    running.wait(&plugin).await;
    running.destroy(&plugin).await;
    let words = argv(&host.starts()[0]);
    assert!(
        words.contains(&"--port=tcp:25918:80".to_owned()),
        "{words:?}"
    );
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
