//! What ends a `run`, and that its task never outlives it: signals, a closed output, the death of `run` or of its plugin.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nomad_driver_nspawn::failpoint::Failpoint;
use rstest::rstest;
use serde_json::json;
use support::trap::Trap;

use crate::harness::{Host, eventually, within};
use crate::run_command::{RunCommand, job, refused_without_root};

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(100);

/// Exits with 7 on SIGTERM.
const ASKED: &str = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done";
/// Ends only by force.
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.05; done";

/// A lost ssh session sends SIGHUP; `timeout`, CI runners and Ctrl-C signal the whole process group.
#[rstest]
#[case::terminated(Signal::SIGTERM)]
#[case::sighup(Signal::SIGHUP)]
#[case::interrupted(Signal::SIGINT)]
#[tokio::test]
async fn a_signal_to_the_process_group_stops_the_task(#[case] signal: Signal) {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, ASKED, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    run.signal_group(signal);
    run.ends_with(7).await;
    let text = run.stderr.text();
    assert!(!text.contains("the plugin died"), "{text}");
}

#[tokio::test]
async fn a_second_signal_kills_the_task() {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, DEAF, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    run.signal(Signal::SIGTERM);
    run.stderr.contains("stopping, kill timeout 600 s").await;
    run.signal(Signal::SIGTERM);
    run.ends_with(137).await;
}

/// `nohup` starts its command with SIGHUP ignored, and an ignored signal stays ignored.
#[tokio::test]
async fn a_hangup_that_nohup_ignores_stays_ignored() {
    let host = Host::new();
    fs::write(host.join("job.hcl"), job(&host, ASKED, LONG)).unwrap();
    let script = format!(
        "trap '' HUP; exec {} run job.hcl \"$@\"",
        env!("CARGO_BIN_EXE_nomad-driver-nspawn")
    );
    let mut run = RunCommand::with_program(&host, "/bin/sh", &["-c", &script, "sh"]).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    let status = fs::read_to_string(format!("/proc/{}/status", run.pid())).unwrap();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:\t"))
        .unwrap();
    assert_eq!(
        u64::from_str_radix(ignored, 16).unwrap() & 1,
        1,
        "{ignored}"
    );
    run.signal(Signal::SIGTERM);
    run.ends_with(7).await;
}

#[tokio::test]
async fn a_killed_run_kills_its_task() {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, DEAF, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    run.signal(Signal::SIGKILL);
    run.ends().await;
    run.leaves_nothing().await;
}

/// The stop request is in the socket of a stopped plugin, which then dies.
#[rstest]
#[case::graceful(ASKED, LONG, 7)]
#[case::forced(DEAF, SHORT, 137)]
#[tokio::test]
async fn a_stop_is_repeated_when_the_plugin_dies(
    #[case] script: &str,
    #[case] kill_timeout: Duration,
    #[case] code: i32,
) {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, script, kill_timeout)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    // The task may print before the plugin has answered StartTask.
    run.stderr.contains("is running").await;
    let plugin = run.plugin();
    kill(plugin, Signal::SIGSTOP).unwrap();
    run.signal(Signal::SIGTERM);
    run.stderr.contains("stopping").await;
    kill(plugin, Signal::SIGKILL).unwrap();
    run.ends_with(code).await;
}

#[tokio::test]
async fn a_plugin_that_dies_twice_is_replaced_each_time() {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, ASKED, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    // Before the start is answered, the death of the plugin would end it.
    run.stderr.contains("is running").await;
    for count in 1..=2 {
        kill(run.plugin(), Signal::SIGKILL).unwrap();
        let text = "recovered the task";
        eventually(text, || run.stderr.text().matches(text).count() == count).await;
    }
    run.signal(Signal::SIGTERM);
    run.ends_with(7).await;
}

/// As in `run x | head`: shells report 141 for a process killed by SIGPIPE.
#[rstest]
#[case::graceful("trap 'exit 7' TERM; trap '' PIPE; while :; do echo up; sleep 0.05; done")]
#[case::silent("trap '' PIPE; while :; do echo up 2>/dev/null; sleep 0.05; done")]
#[tokio::test]
async fn a_closed_output_stops_the_task(#[case] script: &str) {
    let host = Host::new();
    let mut run = RunCommand::new(&host, &job(&host, script, SHORT)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    drop(run.stdout.take());
    run.ends_with(141).await;
}

/// Output waiting in a full pipe delays neither the stop nor the exit.
#[tokio::test]
async fn a_stop_does_not_wait_for_the_reader_of_the_output() {
    let host = Host::new();
    let script = "trap 'exit 7' TERM; echo up; while :; do echo 0123456789012345678901234567890123456789; done";
    let mut run = RunCommand::new(&host, &job(&host, script, SHORT)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    run.signal(Signal::SIGTERM);
    let status = run.ends().await;
    assert!(
        [Some(7), Some(137)].contains(&status.code()),
        "{status}: {}",
        run.stderr.text()
    );
    run.leaves_nothing().await;
}

/// The plugin hangs before it takes tasks, because systemd-nspawn does not answer.
#[tokio::test]
async fn a_signal_before_the_task_is_started_ends_the_run() {
    let host = Host::new();
    host.scenario(&json!({ "version_hangs": true }));
    let mut run = RunCommand::new(&host, &job(&host, ASKED, LONG)).start();
    let asked = || {
        let processes = host.processes();
        processes
            .iter()
            .any(|one| one.command.contains("systemd-nspawn --version"))
    };
    eventually("systemd-nspawn was asked for its version", asked).await;
    run.signal_group(Signal::SIGINT);
    run.ends_with(125).await;
    let text = run.stderr.text();
    assert!(
        text.contains("stopped before the task was started"),
        "{text}"
    );
}

/// The container is up and recorded, but StartTask has not been answered.
#[tokio::test]
async fn a_plugin_that_dies_before_the_start_is_answered_leaves_no_task() {
    let host = Host::new();
    let mut trap = Trap::at(&host.state(), Failpoint::Recorded);
    let mut run = RunCommand::new(&host, &job(&host, DEAF, LONG))
        .state_dir(&host.state())
        .start();
    if refused_without_root(&mut run).await {
        return;
    }
    within("the recorded start", trap.reached()).await;
    kill(run.plugin(), Signal::SIGKILL).unwrap();
    drop(trap);
    run.ends_with(125).await;
    let text = run.stderr.text();
    assert!(text.contains("error: StartTask"), "{text}");
    assert!(!text.contains("left"), "{text}");
}

/// systemd-nspawn has been started and does not report the container.
#[tokio::test]
async fn a_second_signal_during_a_start_cancels_it() {
    let host = Host::new();
    let mut trap = Trap::named(&host.state(), "pause_before_notify");
    host.scenario(&json!({"calls": [{"pause_before_notify": trap.socket()}]}));
    let mut run = RunCommand::new(&host, &job(&host, DEAF, LONG)).start();
    if refused_without_root(&mut run).await {
        return;
    }
    within("the start", trap.reached()).await;
    // Two different signals, because two pending ones of the same number are one.
    run.signal(Signal::SIGTERM);
    run.signal(Signal::SIGINT);
    run.ends_with(125).await;
    let text = run.stderr.text();
    assert!(
        text.contains("stopped before the task was started"),
        "{text}"
    );
    assert!(!text.contains("left"), "{text}");
}
