//! SignalTask: names, ids, and whom a signal reaches.

use rstest::rstest;
use serde_json::json;
use tonic::Code;

use crate::harness::Host;

#[rstest]
#[case(false, "SIGUSR1")]
#[case(true, "SIGUSR1")]
#[case(false, "usr1")]
#[tokio::test]
async fn check_61_a_signal_reaches_the_main_process(#[case] process_two: bool, #[case] name: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let job = host.shell("trap 'echo got; exit 8' USR1; echo up; while :; do sleep 0.05; done");
    let task = host
        .up(&plugin, job.with("process_two", json!(process_two)))
        .await;
    task.signal(&plugin, name).await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 8);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn check_61_unknown_names_and_ids_are_errors() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .start(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    for name in ["SIGNONSENSE", "", "99", "-9"] {
        let status = task.signal(&plugin, name).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status:?}");
    }
    assert!(host.ledger().iter().all(|event| event["event"] != "signal"));
    task.destroy(&plugin).await;
    let status = task.signal(&plugin, "SIGHUP").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "task not found for given id")
    );
}

#[tokio::test]
async fn a_task_that_has_ended_takes_no_signal() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exit 0")).await;
    task.wait(&plugin).await;
    let status = task.signal(&plugin, "SIGHUP").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::FailedPrecondition, "the task is not running")
    );
    task.destroy(&plugin).await;
}
