//! What the plugin reports about the host and itself: fingerprints and capabilities.

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::CapabilitiesRequest;
use nomad_driver_nspawn::proto::driver::fingerprint_response::HealthState;
use serde_json::json;

use crate::harness::{Host, is_root, within};

#[tokio::test] // Conformance check 28.
async fn the_first_fingerprint_is_sent_immediately() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let (first, mut stream) = plugin.fingerprint().await.unwrap();
    assert!(!first.health_description.is_empty());
    let whole_life = async {
        let task = host.start(&plugin, host.shell("exit 0")).await;
        task.wait(&plugin).await;
        task.destroy(&plugin).await;
    };
    tokio::select! {
        () = whole_life => {}
        message = stream.message() => panic!("more than was asked for: {message:?}"),
    }
}

#[tokio::test] // Conformance check 29.
async fn the_same_host_has_the_same_fingerprint() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let (one, _first) = plugin.fingerprint().await.unwrap();
    let (two, _second) = plugin.fingerprint().await.unwrap();
    assert_eq!(one, two);
    assert_eq!(one.attributes.is_empty(), !is_root());
}

#[tokio::test] // Conformance check 30.
async fn a_host_without_systemd_nspawn() {
    let host = Host::new();
    std::fs::rename(host.join("bin/systemd-nspawn"), host.join("bin/away")).unwrap();
    let plugin = host.plugin().await;
    let (missing, mut stream) = plugin.fingerprint().await.unwrap();
    assert_eq!(
        (missing.health(), missing.err.as_str()),
        (HealthState::Undetected, "")
    );
    if !is_root() {
        assert_eq!(missing.health_description, "Driver must run as root");
        return;
    }
    assert!(
        missing.health_description.contains("systemd-nspawn"),
        "{}",
        missing.health_description
    );
    std::fs::rename(host.join("bin/away"), host.join("bin/systemd-nspawn")).unwrap();
    let there = within("another fingerprint", stream.message())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (there.health(), there.err.as_str()),
        (HealthState::Healthy, "")
    );
    assert!(there.attributes.contains_key("driver.nspawn.version"));
}

#[tokio::test] // Conformance check 31.
async fn capabilities_never_change() {
    let host = Host::new();
    let plugin = Plugin::launch(host.launch()).await.unwrap();
    let ask = || async {
        plugin
            .driver()
            .capabilities(CapabilitiesRequest {})
            .await
            .unwrap()
            .into_inner()
    };
    let before = ask().await;
    plugin.configure(&host.config()).await.unwrap();
    assert_eq!(before, ask().await);
    assert!(before.capabilities.unwrap().send_signals);
}

#[tokio::test]
async fn a_disabled_driver_is_undetected() {
    let host = Host::new();
    let plugin = host.plugin_with(&json!({"enabled": false})).await;
    let (print, _stream) = plugin.fingerprint().await.unwrap();
    assert_eq!(print.health(), HealthState::Undetected);
    assert!(
        print.health_description.contains("enabled"),
        "{}",
        print.health_description
    );
}
