//! What a plugin that died leaves to the next one, beyond `tests/suite/recover.rs`: only the fake can be held before it is ready.

use std::sync::Arc;

use nomad_driver_nspawn::proto::driver::StartTaskRequest;
use serde_json::json;

use crate::harness::{Host, eventually, within};

#[tokio::test]
async fn a_plugin_that_dies_during_a_start_leaves_nothing() {
    let host = Host::new();
    host.scenario(&json!({"calls": [{"never_notify": true}, {}]}));
    let mut plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("exit 2")));
    let logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let mut client = plugin.driver();
    let request = StartTaskRequest {
        task: Some(config.clone()),
    };
    let start = tokio::spawn(async move { client.start_task(request).await });
    eventually("systemd-nspawn was called", || !host.starts().is_empty()).await;
    plugin.kill().await;
    assert!(within("StartTask", start).await.unwrap().is_err());
    host.quiet(&[]).await;
    // Nomad starts the same id with the next plugin.
    let plugin = host.plugin().await;
    within("StartTask", plugin.start(config.clone()))
        .await
        .unwrap();
    assert_eq!(
        within("WaitTask", plugin.wait(&config.id))
            .await
            .unwrap()
            .code,
        2
    );
    within("DestroyTask", plugin.destroy(&config.id, true))
        .await
        .unwrap();
    drop(logs);
}
