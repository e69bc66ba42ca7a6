//! The task's output on its way into Nomad's FIFOs.

use std::sync::Arc;

use nomad_driver_nspawn::proto::driver::TaskConfig;
use rstest::rstest;

use crate::harness::{Host, refusal};

#[tokio::test] // Conformance check 73.
async fn both_streams_are_separate_and_complete() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let script = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo out-$i; echo err-$i >&2; done; printf last; printf LAST >&2";
    let task = host.start(&plugin, host.shell(script)).await;
    assert_eq!(task.wait(&plugin).await.code, 0);
    let lines = |word: &str| {
        (1..=2000)
            .map(|number| format!("{word}-{number}\n"))
            .collect::<String>()
    };
    // The streams end without DestroyTask: no process holds the write ends once the task has exited.
    assert_eq!(task.stdout.all().await, lines("out") + "last");
    assert_eq!(task.stderr.all().await, lines("err") + "LAST");
    task.destroy(&plugin).await;
}

#[rstest] // Conformance check 74.
#[case("/dev/null")]
#[case("")]
#[tokio::test]
async fn output_can_be_disabled(#[case] path: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("echo x; echo y >&2; exit 4")));
    let edit = |task: &mut TaskConfig| {
        task.stdout_path = path.to_owned();
        task.stderr_path = path.to_owned();
    };
    let task = host.start_edited(&plugin, allocation, edit).await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 4);
    let descriptors = &host.starts()[0]["descriptors"];
    assert_eq!(
        (&descriptors["4"], &descriptors["5"]),
        (&"/dev/null".into(), &"/dev/null".into()),
        "{descriptors:?}"
    );
    task.destroy(&plugin).await;
}

#[rstest] // Conformance check 76.
#[case("stdout")]
#[case("stderr")]
#[tokio::test]
async fn a_link_in_place_of_a_fifo(#[case] stream: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("echo x; echo y >&2"));
    let elsewhere = host.join("elsewhere");
    std::fs::write(&elsewhere, "untouched").unwrap();
    let path = if stream == "stdout" {
        allocation.stdout_path()
    } else {
        allocation.stderr_path()
    };
    let logs = allocation.open_logs().unwrap();
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let status = refusal(plugin.start(config).await);
    assert!(status.message().contains("log"), "{}", status.message());
    assert_eq!(std::fs::read_to_string(elsewhere).unwrap(), "untouched");
    assert!(host.starts().is_empty());
    drop(logs);
}
