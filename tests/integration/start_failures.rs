//! Which failures of a start Nomad may retry: in the response, by the detail that Nomad's agent reads, and in the documentation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use nomad_driver_nspawn::container::Cause;
use nomad_driver_nspawn::proto::rpc;
use prost::Message as _;
use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::{Host, Running, eventually, refusal};

/// Whether a status has the detail that makes Nomad's agent retry.
fn is_recoverable(status: &tonic::Status) -> bool {
    let details = rpc::Status::decode(status.details()).unwrap().details;
    let marks = details.iter().filter(|detail| {
        detail
            .type_url
            .ends_with("/hashicorp.nomad.plugins.shared.structs.RecoverableError")
    });
    let values: Vec<_> = marks.map(|mark| mark.value.clone()).collect();
    assert!(values.is_empty() || values == [[8, 1]], "{values:?}");
    !values.is_empty()
}

fn says(text: &str) -> Value {
    json!({"refuse": {"status": 1, "stderr": text}})
}

#[rstest]
#[case::busy(says("Directory tree /srv/web is currently busy."), true)]
#[case::uid_range(
    says("Failed to pick suitable UID/GID range: Device or resource busy"),
    true
)]
#[case::memory(says("Failed to fork inner child: Cannot allocate memory"), true)]
#[case::processes(says("Failed to fork: Resource temporarily unavailable"), true)]
#[case::an_unknown_message(says("Failed to fork: out of luck"), true)]
#[case::killed(json!({"die_before_notify": 9}), true)]
#[case::silent(json!({"never_notify": true, "instead": {"exit": 3}}), true)]
#[case::option(says("systemd-nspawn: unrecognized option '--frobnicate'"), false)]
#[case::value(says("Failed to parse UID \"xyz\": Invalid argument"), false)]
#[case::image(
    says("Failed to resolve path /srv/none: No such file or directory"),
    false
)]
#[tokio::test]
async fn a_transient_refusal_is_recoverable(#[case] call: Value, #[case] recoverable: bool) {
    let host = Host::new();
    host.scenario(&json!({"calls": [call, {}]}));
    let plugin = host.plugin().await;
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    assert_eq!(is_recoverable(&status), recoverable, "{status:?}");
    let task = host.start(&plugin, host.shell("exit 6")).await;
    assert_eq!(task.wait(&plugin).await.code, 6);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn a_version_that_is_not_reported_in_time_is_recoverable() {
    let host = Host::new();
    host.scenario(&json!({"version_hangs": true}));
    let plugin = host.plugin().await;
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    assert!(
        status.message().contains("--version does not answer"),
        "{}",
        status.message()
    );
    assert!(is_recoverable(&status), "{status:?}");
    host.scenario(&json!({}));
    let task = host.start(&plugin, host.shell("exit 6")).await;
    assert_eq!(task.wait(&plugin).await.code, 6);
    task.destroy(&plugin).await;
}

/// Changes the launch spec of an earlier start of the task, so that the next start can't clean up after it.
async fn started_over(
    host: &Host,
    change: impl FnOnce(&mut Value),
) -> (tonic::Status, std::path::PathBuf) {
    let plugin = host.plugin().await;
    let first = host.start(&plugin, host.shell("exit 0")).await;
    first.wait(&plugin).await;
    let directory = directory_of(&first);
    // As if its supervisor had been killed before it released anything.
    eventually("the release of its resources", || {
        directory.join("freed").exists()
    })
    .await;
    fs::remove_file(directory.join("freed")).unwrap();
    let order = directory.join("order");
    let text = fs::read(&order).unwrap();
    let mut changed: Value = serde_json::from_slice(&text).unwrap();
    change(&mut changed);
    fs::write(&order, changed.to_string()).unwrap();
    let again = host.start_in(&plugin, Arc::clone(&first.allocation)).await;
    let status = refusal(again);
    fs::write(&order, text).unwrap();
    let second = host
        .start_in(&plugin, Arc::clone(&first.allocation))
        .await
        .unwrap();
    second.wait(&plugin).await;
    second.destroy(&plugin).await;
    first.destroy(&plugin).await;
    (status, directory)
}

fn directory_of(task: &Running) -> std::path::PathBuf {
    task.state(&["state"]).as_str().unwrap().into()
}

#[tokio::test]
async fn an_earlier_start_that_is_not_removed_is_recoverable() {
    let host = Host::new();
    let occupied = host.join("occupied");
    fs::write(&occupied, "").unwrap();
    let (status, _) = started_over(&host, |order| {
        order["resources"] = json!([{"kind": "ephemeral_copy", "directory": occupied}]);
    })
    .await;
    assert!(is_recoverable(&status), "{status:?}");
}

/// Only another version of the driver helps.
#[tokio::test]
async fn a_record_of_a_later_driver_is_final_and_named() {
    let host = Host::new();
    let (status, directory) = started_over(&host, |order| order["form"] = 2.into()).await;
    assert!(!is_recoverable(&status), "{status:?}");
    for words in [
        directory.to_str().unwrap(),
        "format 2",
        "remove the directory",
    ] {
        assert!(status.message().contains(words), "{}", status.message());
    }
}

/// The driver that wrote it may be installed again, and finds its task running.
#[tokio::test]
async fn a_start_of_a_later_driver_is_not_ended() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let first = host
        .up(
            &plugin,
            host.shell("trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done"),
        )
        .await;
    let order = directory_of(&first).join("order");
    let text = fs::read(&order).unwrap();
    let mut later: Value = serde_json::from_slice(&text).unwrap();
    later["form"] = 2.into();
    fs::write(&order, later.to_string()).unwrap();
    let status = refusal(host.start_in(&plugin, Arc::clone(&first.allocation)).await);
    assert!(!is_recoverable(&status), "{status:?}");
    assert!(
        status.message().contains("format 2"),
        "{}",
        status.message()
    );
    first.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(first.wait(&plugin).await.code, 12, "it was ended");
    fs::write(&order, text).unwrap();
    first.destroy(&plugin).await;
}

#[test]
fn the_documented_causes_are_those_of_the_driver() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, rest) = text.split_once("\n## Start failures\n").unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows: Vec<(String, String)> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .map(|line| {
            let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`'));
            let mut next = || cells.next().unwrap().to_owned();
            (next(), next())
        })
        .collect();
    let documented: BTreeMap<_, _> = rows.iter().cloned().collect();
    assert_eq!(documented.len(), rows.len(), "a cause stands there twice");
    let driver: BTreeMap<_, _> = Cause::ALL
        .into_iter()
        .map(|cause| {
            let recoverable = if cause.is_recoverable() { "yes" } else { "no" };
            (cause.as_str().to_owned(), recoverable.to_owned())
        })
        .collect();
    assert_eq!(documented, driver);
}
