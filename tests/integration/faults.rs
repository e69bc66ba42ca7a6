//! Failures below the plugin: the start that fails, the tool that hangs or dies, the supervisor that is killed. Each is an error of one
//! task with a message, and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nomad_driver_nspawn::failpoint::OLD_KERNEL;
use nomad_driver_nspawn::proto::driver::{InspectTaskRequest, StartTaskRequest};
use nomad_driver_nspawn::proto::rpc;
use prost::Message as _;
use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::{Host, refusal, within};
use crate::lifecycle::nothing_left;
use support::trap::Trap;

#[rstest] // Conformance check 34.
#[case::refused(json!({"refuse": {"status": 1, "stderr": "Failed to fork: out of luck"}}), "status 1")]
#[case::killed(json!({"die_before_notify": 9}), "SIGKILL")]
#[case::exits_without_notify(json!({"never_notify": true, "instead": {"exit": 3}}), "status 3")]
#[tokio::test]
async fn a_start_that_fails(#[case] call: Value, #[case] words: &str) {
    let host = Host::new();
    host.scenario(&json!({"calls": [call, {}]}));
    let plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("exit 5")));
    let status = refusal(host.start_in(&plugin, Arc::clone(&allocation)).await);
    assert!(status.message().contains(words), "{}", status.message());
    assert!(
        status.message().starts_with("machine web-"),
        "{}",
        status.message()
    );
    assert_eq!(host.starts().len(), 1);
    nothing_left(&host, &plugin).await;
    let task = host.start_in(&plugin, allocation).await.unwrap();
    assert_eq!(
        task.wait(&plugin).await.code,
        5,
        "the next attempt is not harmed"
    );
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn the_output_of_systemd_nspawn_is_in_the_error() {
    let host = Host::new();
    host.scenario(
        &json!({"calls": [{"refuse": {"status": 1, "stderr": "Failed to fork: out of luck"}}]}),
    );
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exit 0"));
    let _read = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let status = refusal(within("StartTask", plugin.start(config)).await);
    assert!(
        status
            .message()
            .ends_with("with status 1 before the container was up: Failed to fork: out of luck"),
        "{}",
        status.message()
    );
}

#[tokio::test] // Conformance check 35.
async fn only_transient_failures_are_recoverable() {
    let host = Host::new();
    // A state directory that can't be created, as when a disk is not mounted yet.
    std::fs::write(host.join("occupied"), "").unwrap();
    let plugin = host
        .plugin_with(&json!({"state_dir": host.join("occupied/state")}))
        .await;
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    let details = rpc::Status::decode(status.details()).unwrap();
    let first = details.details.first().expect("a detail");
    assert!(
        first
            .type_url
            .ends_with("/hashicorp.nomad.plugins.shared.structs.RecoverableError"),
        "{}",
        first.type_url
    );
    assert_eq!(first.value, [8, 1]);
    let wrong = host.shell("exit 0").with("volatile", json!("maybe"));
    assert!(
        refusal(host.try_start(&plugin, wrong).await)
            .details()
            .is_empty()
    );
    plugin.configure(&host.config()).await.unwrap();
    let refused = "systemd-nspawn: unrecognized option '--frobnicate'";
    host.scenario(&json!({"calls": [{"refuse": {"status": 1, "stderr": refused}}]}));
    assert!(
        refusal(host.try_start(&plugin, host.shell("exit 0")).await)
            .details()
            .is_empty()
    );
}

#[tokio::test]
async fn an_abandoned_start_is_undone() {
    let host = Host::new();
    let mut trap = Trap::named(&host.state(), "pause_before_notify");
    host.scenario(&json!({"calls": [{"pause_before_notify": trap.socket()}]}));
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exec sleep 1000"));
    let logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let id = config.id.clone();
    let mut client = plugin.driver();
    let start = tokio::spawn(async move {
        client
            .start_task(StartTaskRequest { task: Some(config) })
            .await
    });
    within("the container", trap.reached()).await;
    start.abort();
    assert!(start.await.unwrap_err().is_cancelled());
    // Sent later on the same connection: once this has returned, the plugin has noticed the cancelled StartTask.
    let request = InspectTaskRequest {
        task_id: id.clone(),
    };
    within("InspectTask", plugin.driver().inspect_task(request))
        .await
        .unwrap();
    drop(trap);
    host.log()
        .contains("the agent has no handle of the task")
        .await;
    nothing_left(&host, &plugin).await;
    // The records are gone a moment before the task is; until then WaitTask returns the exit.
    let is_gone = async {
        while plugin.wait(&id).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("the end of the removal", is_gone).await;
    drop(logs);
}

#[tokio::test]
async fn a_missing_systemd_nspawn_fails_the_next_task() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(
            &plugin,
            host.shell("trap 'exit 4' USR1; echo up; while :; do sleep 0.05; done"),
        )
        .await;
    std::fs::remove_file(host.join("bin/systemd-nspawn")).unwrap();
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    assert!(
        status.message().contains("nspawn_path")
            && status.message().contains("not an executable file"),
        "{}",
        status.message()
    );
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(
        task.wait(&plugin).await.code,
        4,
        "the one that runs is not harmed"
    );
    task.destroy(&plugin).await;
}

/// A kernel that does not report the leader's exit status leaves it to systemd-nspawn, which may need long to clean up.
#[tokio::test]
async fn a_slow_cleanup_of_systemd_nspawn_keeps_the_exit_status() {
    let host = Host::new();
    let mut directory = host.state().into_os_string();
    directory.push(".pause");
    fs::create_dir_all(&directory).unwrap();
    fs::write(Path::new(&directory).join(OLD_KERNEL), "").unwrap();
    // Longer than a systemd-nspawn that has announced nothing is given.
    host.scenario(&json!({"calls": [{"delay_before_exit_ms": 6500}]}));
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exit 3")).await;
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, &exit.error), (3, &None), "{exit:?}");
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}
