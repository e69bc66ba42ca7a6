//! The exit status of a `run` is that of its task whenever it is known.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::{Value, json};
use std::time::Duration;

use crate::harness::Host;
use crate::run_command::{RunCommand, job, job_with, refused_without_root};

const LONG: Duration = Duration::from_secs(600);

#[rstest]
#[case::missing(json!(["/no/such/program"]), 127, "/no/such/program")]
#[case::not_executable(json!(["/proc/version"]), 126, "/proc/version")]
#[case::a_directory(json!(["/proc"]), 126, "/proc")]
#[case::a_code(json!(["/bin/sh", "-c", "exit 125"]), 125, "the task exited with code 125")]
#[case::a_fault(json!(["/bin/sh", "-c", "ulimit -c unlimited; kill -ABRT $$"]), 134, "the task exited with code 134")]
#[tokio::test]
async fn the_status_is_that_of_the_task(
    #[case] command: Value,
    #[case] code: i32,
    #[case] part: &str,
) {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job_with(&host, &command, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.ends_with(code).await;
    let text = run.stderr.text();
    assert!(text.contains(part), "{text}");
    assert!(!text.contains("not known"), "{text}");
}

/// The pid of this test's only process with this argument.
fn process(host: &Host, word: &str) -> Pid {
    let mut found = host.processes();
    found.retain(|one| one.command.split(' ').any(|part| part == word));
    assert_eq!(found.len(), 1, "{found:?}");
    Pid::from_raw(found[0].pid)
}

#[tokio::test]
async fn an_unknown_exit_is_not_the_status_of_the_task() {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, "echo up; exec sleep 1000", LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    // The command begins before its start is reported.
    run.stderr.contains("is running").await;
    kill(process(&host, "supervise"), Signal::SIGKILL).unwrap();
    run.ends_with(125).await;
    let text = run.stderr.text();
    assert!(
        text.contains("error: how the task ended is not known"),
        "{text}"
    );
}

#[tokio::test]
async fn a_killed_systemd_nspawn_ends_the_task_with_its_signal() {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, "echo up; exec sleep 1000", LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    // The command begins before its start is reported.
    run.stderr.contains("is running").await;
    kill(process(&host, "--keep-unit"), Signal::SIGKILL).unwrap();
    run.ends_with(137).await;
    let text = run.stderr.text();
    assert!(text.contains("from outside"), "{text}");
}
