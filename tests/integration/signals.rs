//! SignalTask and StopTask: names, ids, which process a signal reaches, and requests that are concurrent with each other or with a start.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use dev_agent::Plugin;
use nomad_driver_nspawn::failpoint::{Failpoint, OLD_KERNEL};
use nomad_driver_nspawn::proto::driver::InspectTaskRequest;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::handles_signal;
use rstest::rstest;
use serde_json::json;
use tonic::Code;

use crate::harness::{DEADLINE, Host, Running, eventually, refusal, within};
use crate::lifecycle::nothing_left;
use support::trap::Trap;

#[rstest] // Conformance check 61.
#[case(false, "SIGUSR1")]
#[case(true, "SIGUSR1")]
#[case(false, "usr1")]
#[tokio::test]
async fn a_signal_reaches_the_main_process(#[case] process_two: bool, #[case] name: &str) {
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

#[tokio::test] // Conformance check 61.
async fn unknown_names_and_ids_are_errors() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .start(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    for name in ["SIGNONSENSE", "", "99", "-9", "32", "33"] {
        let status = task.signal(&plugin, name).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status:?}");
    }
    assert!(
        host.call_log()
            .iter()
            .all(|event| event["event"] != "signal")
    );
    task.destroy(&plugin).await;
    let status = task.signal(&plugin, "SIGHUP").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "task not found for given id")
    );
}

#[tokio::test]
async fn an_exited_task_takes_no_signal() {
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

const HEARS_TERM: &str = "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";
/// The longest duration that the protocol can carry.
const ENDLESS: Duration = Duration::from_secs(i64::MAX.cast_unsigned());

#[tokio::test]
async fn an_invalid_signal_is_named_and_does_nothing() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(HEARS_TERM)).await;
    let stop = refusal(within("StopTask", plugin.stop(&task.id, DEADLINE, "SIGNOPE")).await);
    let signal = task.signal(&plugin, "SIGNOPE").await.unwrap_err();
    for status in [stop, signal] {
        assert_eq!(
            (status.code(), status.message()),
            (
                Code::InvalidArgument,
                "\"SIGNOPE\" is not a signal: use a name such as SIGHUP, SIGRTMIN+3, or a number from 0 to 64"
            )
        );
    }
    // The C library reserves two of the kernel's signals and does not allow sending them.
    let kept = refusal(within("StopTask", plugin.stop(&task.id, DEADLINE, "33")).await);
    assert!(
        kept.message().starts_with("\"33\" can't be sent: "),
        "{kept:?}"
    );
    assert_eq!(task.stop(&plugin, DEADLINE, "SIGTERM").await.code, 3);
    task.destroy(&plugin).await;
}

#[rstest]
// Nomad sends no name if the job has none: then the signal depends on the payload's handlers.
#[case::none("", 3)]
#[case::nomads_default_by_name("SIGINT", 2)]
#[case::without_the_prefix("term", 3)]
#[case::a_number("10", 1)]
#[case::real_time("SIGRTMIN+2", 4)]
#[tokio::test]
async fn a_stop_sends_the_jobs_kill_signal(#[case] name: &str, #[case] code: i32) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let script = "trap 'exit 1' USR1; trap 'exit 2' INT; trap 'exit 3' TERM; trap 'exit 4' 36; echo up; while :; do sleep 0.05; done";
    let task = host.up(&plugin, host.shell(script)).await;
    let leader = task.leader();
    let real_time = "SIGRTMIN+2".parse().unwrap();
    eventually("the handlers are seen", || {
        handles_signal(leader, real_time)
    })
    .await;
    let exit = task.stop(&plugin, ENDLESS, name).await;
    assert_eq!((exit.code, exit.signal, exit.error), (code, 0, None));
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn concurrent_stops_all_end_with_the_task() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(DEAF)).await;
    let patient = || within("StopTask", plugin.stop(&task.id, ENDLESS, ""));
    let force = within("StopTask", plugin.stop(&task.id, Duration::ZERO, ""));
    let (one, two, forced) = tokio::join!(patient(), patient(), force);
    for stopped in [one, two, forced] {
        stopped.unwrap();
    }
    assert_eq!(task.wait(&plugin).await.code, 137);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn a_forced_destroy_overtakes_a_stop() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(DEAF)).await;
    let stop = within("StopTask", plugin.stop(&task.id, ENDLESS, ""));
    let destroy = within("DestroyTask", plugin.destroy(&task.id, true));
    let (stopped, destroyed) = tokio::join!(stop, destroy);
    stopped.unwrap();
    destroyed.unwrap();
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_stop_during_the_start_ends_the_new_container() {
    let host = Host::new();
    let mut trap = Trap::named(&host.state(), "pause_before_notify");
    host.scenario(&json!({"calls": [{"pause_before_notify": trap.socket()}]}));
    let plugin = Arc::new(host.plugin().await);
    let allocation = host.allocation(host.shell(DEAF));
    let _logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let id = config.id.clone();
    let line = Arc::clone(&plugin);
    let start = tokio::spawn(async move { line.start(config).await });
    within("the container", trap.reached()).await;
    let (line, task) = (Arc::clone(&plugin), id.clone());
    let stop = tokio::spawn(async move { line.stop(&task, Duration::ZERO, "").await });
    // Sent later on the same connection: once it has returned, the plugin has received the stop.
    let request = InspectTaskRequest {
        task_id: id.clone(),
    };
    tokio::task::yield_now().await;
    within("InspectTask", plugin.driver().inspect_task(request))
        .await
        .unwrap();
    assert!(!start.is_finished() && !stop.is_finished());
    drop(trap);
    within("StartTask", start).await.unwrap().unwrap();
    within("StopTask", stop).await.unwrap().unwrap();
    let exit = within("WaitTask", plugin.wait(&id)).await.unwrap();
    assert_eq!((exit.code, exit.signal), (137, 9));
    within("DestroyTask", plugin.destroy(&id, false))
        .await
        .unwrap();
    nothing_left(&host, &plugin).await;
}

/// A started container whose init is held before it installs its signal handlers.
async fn booting(host: &Host) -> (Plugin, Running, Trap) {
    let mut early = Trap::named(&host.state(), "before_signals");
    host.scenario(&json!({"calls": [{"pause_before_signals": early.socket()}]}));
    let plugin = host.plugin().await;
    let job = host.task(&[]).with("boot", json!(true));
    let task = host.start(&plugin, job.with("command", json!([]))).await;
    within("the init", early.reached()).await;
    (plugin, task, early)
}

/// systemd-nspawn reports the start long before the image's init has installed its handlers, and the kernel drops signals to a PID 1
/// without a handler.
#[rstest]
#[case::a_stop(None)]
#[case::a_signal(Some("SIGRTMIN+4"))]
#[tokio::test]
async fn a_signal_that_an_init_does_not_handle_yet_is_kept(#[case] signal: Option<&str>) {
    let host = Host::new();
    let (plugin, task, early) = booting(&host).await;
    let mut asked = Trap::at(&host.state(), Failpoint::Signalled);
    let ask = async {
        match signal {
            None => within("StopTask", plugin.stop(&task.id, ENDLESS, ""))
                .await
                .unwrap(),
            Some(name) => task.signal(&plugin, name).await.unwrap(),
        }
    };
    let wake = async {
        within("the supervisor", asked.reached()).await;
        drop(asked);
        assert!(
            host.call_log()
                .iter()
                .all(|event| event["event"] != "signal")
        );
        drop(early);
    };
    tokio::join!(ask, wake);
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (0, 0, None));
    task.destroy(&plugin).await;
}

/// For an init that never handles the signal there is the grace period.
#[tokio::test]
async fn a_stop_that_an_init_never_handles_ends_at_the_timeout() {
    let host = Host::new();
    let (plugin, task, _early) = booting(&host).await;
    let exit = task.stop(&plugin, Duration::from_millis(300), "").await;
    assert_eq!((exit.code, exit.signal, exit.error), (137, 9, None));
    task.destroy(&plugin).await;
}

/// The forced stop arrives while systemd-nspawn still cleans up after a command that has exited by itself. An older kernel reports that
/// exit only to systemd-nspawn.
#[rstest]
#[case::of_its_own(false, false)]
#[case::of_its_own_on_an_older_kernel(false, true)]
#[case::with_a_copy(true, false)]
#[case::with_a_copy_on_an_older_kernel(true, true)]
#[tokio::test]
async fn a_late_kill_does_not_change_the_exit(#[case] ephemeral: bool, #[case] old: bool) {
    let host = Host::new();
    let mut clearing = Trap::named(&host.state(), "before_exit");
    let mut force = Trap::at(&host.state(), Failpoint::Killing);
    if old {
        fs::write(force.socket().with_file_name(OLD_KERNEL), "").unwrap();
    }
    host.scenario(&json!({"calls": [{"pause_before_exit": clearing.socket()}]}));
    let plugin = host.plugin().await;
    let job = host.shell(&format!(
        "echo up; while ! test -e {}; do sleep 0.02; done; exit 3",
        host.join("gate").display()
    ));
    let task = host
        .up(&plugin, job.with("ephemeral", json!(ephemeral)))
        .await;
    fs::write(host.join("gate"), "").unwrap();
    within("systemd-nspawn", clearing.reached()).await;
    let stop = within("StopTask", plugin.stop(&task.id, Duration::ZERO, ""));
    let release = async {
        if old || !kernel_tells() {
            within("the supervisor", force.reached()).await;
        }
        drop(force);
        drop(clearing);
    };
    let (stopped, exit, ()) = tokio::join!(stop, task.wait(&plugin), release);
    stopped.unwrap();
    assert_eq!((exit.code, exit.signal, exit.error), (3, 0, None));
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

/// It may need a long time for that, to remove an ephemeral root.
#[rstest]
#[tokio::test]
async fn an_exit_is_reported_before_systemd_nspawn_exits(
    #[values(false, true)] ephemeral: bool,
    #[values(false, true)] two: bool,
    #[values(0, 7)] code: i32,
) {
    let host = Host::new();
    let mut clearing = Trap::named(&host.state(), "before_exit");
    host.scenario(&json!({"calls": [{"pause_before_exit": clearing.socket()}]}));
    let plugin = host.plugin().await;
    let job = host.shell(&format!("exit {code}"));
    let job = job.with("ephemeral", json!(ephemeral));
    let task = host
        .start(&plugin, job.with("process_two", json!(two)))
        .await;
    within("systemd-nspawn", clearing.reached()).await;
    let mut clearing = Some(clearing);
    if !two && !kernel_tells() {
        clearing = None;
    }
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (code, 0, None));
    let recorded = TaskDir::for_task(&host.state(), &task.id).exit().unwrap();
    assert_eq!(recorded.map(|exit| exit.code), Some(code));
    drop(clearing);
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

/// Nomad may start another task on the tree as soon as the exit is reported.
#[tokio::test]
async fn a_start_waits_for_the_tree_of_a_task_whose_exit_was_reported() {
    let host = Host::new();
    let mut clearing = Trap::named(&host.state(), "before_exit");
    let mut busy = Trap::at(&host.state(), Failpoint::TreeBusy);
    host.scenario(&json!({"calls": [{"pause_before_exit": clearing.socket()}]}));
    let plugin = host.plugin().await;
    let job = host.shell("exit 7").with("process_two", json!(true));
    let first = host.start(&plugin, job).await;
    within("systemd-nspawn", clearing.reached()).await;
    assert_eq!(first.wait(&plugin).await.code, 7);
    let second = host.start(&plugin, host.shell("exit 8").named("second"));
    let release = async {
        within("the second supervisor", busy.reached()).await;
        drop(clearing);
        drop(busy);
    };
    let (second, ()) = tokio::join!(second, release);
    assert_eq!(second.wait(&plugin).await.code, 8);
    for task in [&first, &second] {
        task.destroy(&plugin).await;
    }
    nothing_left(&host, &plugin).await;
}

/// The supervisor has reported the exit to a plugin that is dead by now.
#[tokio::test]
async fn an_end_that_was_reported_early_is_reported_to_a_later_plugin_too() {
    let host = Host::new();
    let mut clearing = Trap::named(&host.state(), "before_exit");
    host.scenario(&json!({"calls": [{"pause_before_exit": clearing.socket()}]}));
    let mut plugin = host.plugin().await;
    let job = host.shell("exit 7").with("ephemeral", json!(true));
    let task = host
        .start(&plugin, job.with("process_two", json!(true)))
        .await;
    within("systemd-nspawn", clearing.reached()).await;
    assert_eq!(task.wait(&plugin).await.code, 7);
    plugin.kill().await;
    let plugin = host.recovered(&task).await;
    let exit = task.stop(&plugin, ENDLESS, "").await;
    assert_eq!((exit.code, exit.signal, exit.error), (7, 0, None));
    drop(clearing);
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

/// Whether this kernel shows a process's exit status to processes other than its parent.
fn kernel_tells() -> bool {
    nomad_driver_nspawn::sys::kernel::version() >= (6, 15)
}
