//! The command line modes, from outside: arguments, exit statuses, and one task run by the development agent that ships with the driver.

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use dev_agent::{HostError, Run, RunEvent, TaskExit, run_task};
use rstest::rstest;
use serde_json::json;
use tokio::sync::mpsc;

use crate::harness::{Host, Task, Written, within};

/// The program as a person starts it: without the cookie.
fn person(host: &Host, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn"))
        .args(words)
        .current_dir(host.path())
        .env("TMPDIR", host.path())
        .env_remove("NOMAD_PLUGIN_MAGIC_COOKIE")
        .output()
        .unwrap()
}

#[test]
fn without_arguments_the_help_is_printed() {
    let output = person(&Host::new(), &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("Nomad plugin") && text.contains("run"),
        "{text}"
    );
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
}

#[test]
fn it_reports_its_version() {
    let output = person(&Host::new(), &["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text,
        format!("nomad-driver-nspawn {}\n", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(output.status.code(), Some(0));
}

#[rstest]
#[case(&["run"], 2, "JOBFILE")]
#[case(&["run", "job.hcl", "--meta", "x"], 2, "KEY=VALUE")]
#[case(&["run", "nope.hcl"], 125, "error: nope.hcl: No such file")]
#[case(&["run", "job.hcl"], 125, "error: job.hcl: line 5: the function upper(…) can't be evaluated here")]
fn an_unsupported_job_is_refused_before_anything_is_started(
    #[case] words: &[&str],
    #[case] status: i32,
    #[case] part: &str,
) {
    let host = Host::new();
    let job = "job \"j\" {\n task \"t\" {\n driver = \"nspawn\"\n config {\n image = upper(\"x\")\n }\n }\n}\n";
    fs::write(host.join("job.hcl"), job).unwrap();
    let output = person(&host, words);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(part), "{text}");
    assert_eq!(output.status.code(), Some(status));
}

#[rstest]
#[case(&["exec"], 2, "ID")]
#[case(&["exec", "web"], 2, "COMMAND")]
#[case(&["exec", "web", "true"], 2, "'true'")]
#[case(&["exec", "web", "--"], 2, "COMMAND")]
#[case(&["exec", "--directory", "tmp", "web", "--", "true"], 2, "expected an absolute path")]
#[case(&["exec", "--environment", "=x", "web", "--", "true"], 2, "expected NAME=VALUE or NAME")]
#[case(&["exec", "--environment", "NOT_SET_AT_ALL", "web", "--", "true"], 2, "NOT_SET_AT_ALL is not set here")]
#[case(&["exec", "--state-dir", "alloc", "web", "--", "true"], 125, "error: no task runs whose records are in alloc")]
#[case(&["exec", "--state-dir", "nowhere", "web", "--", "true"], 125, "error: nowhere: No such file")]
fn an_exec_that_can_not_work_is_refused(
    #[case] words: &[&str],
    #[case] status: i32,
    #[case] part: &str,
) {
    let output = person(&Host::new(), words);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(part), "{text}");
    assert_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(status), 0)
    );
}

/// The result of running one task in this process.
struct Ran {
    end: Result<TaskExit, HostError>,
    stdout: Written,
    stderr: Written,
    happened: Vec<RunEvent>,
}

/// Runs a task; once it has printed `stop_at` it is asked to stop.
async fn run(host: &Host, task: Task, stop_at: Option<&'static str>) -> Ran {
    let (stop, stops) = mpsc::channel(4);
    let (stdout, stderr) = (Written::default(), Written::default());
    let (reported, mut happenings) = mpsc::unbounded_channel();
    let run = Run {
        launch: host.launch(),
        plugin_config: host.config(),
        task: task.spec,
        allocations: host.join("alloc"),
    };
    let tell = move |happening| reported.send(happening).unwrap();
    let task = run_task(run, stdout.clone(), stderr.clone(), stops, &tell);
    let stopper = async {
        if let Some(text) = stop_at {
            stdout.contains(text).await;
            stop.send(()).await.unwrap();
        }
        std::future::pending::<()>().await;
    };
    let end = within("the run", async {
        tokio::select! {
            end = task => end,
            () = stopper => unreachable!(),
        }
    })
    .await;
    let mut happened = Vec::new();
    while let Ok(happening) = happenings.try_recv() {
        happened.push(happening);
    }
    Ran {
        end,
        stdout,
        stderr,
        happened,
    }
}

/// A driver that does not run as root takes no tasks; then checks the error of the run. Otherwise returns the exit.
fn as_root(ran: &Ran) -> Option<&TaskExit> {
    if nix::unistd::geteuid().is_root() {
        return Some(ran.end.as_ref().unwrap());
    }
    let error = ran.end.as_ref().unwrap_err().to_string();
    assert_eq!(error, "the driver is undetected: Driver must run as root");
    None
}

#[tokio::test]
async fn a_run_forwards_output_and_exit_code_and_leaves_nothing() {
    let host = Host::new();
    let task = host
        .shell("echo out $X; echo err >&2; exit 42")
        .env("X", "${NOMAD_TASK_NAME}");
    let ran = run(&host, task, None).await;
    assert_eq!(fs::read_dir(host.join("alloc")).unwrap().count(), 0);
    let Some(exit) = as_root(&ran) else { return };
    assert_eq!((exit.code, exit.signal), (42, 0), "{:?}", ran.happened);
    assert_eq!(
        (ran.stdout.text().as_str(), ran.stderr.text().as_str()),
        ("out web\n", "err\n")
    );
    assert!(
        !ran.happened
            .iter()
            .any(|one| matches!(one, RunEvent::Warning(_))),
        "{:?}",
        ran.happened
    );
}

#[tokio::test]
async fn a_stopped_run_stops_the_task() {
    let host = Host::new();
    let mut task =
        host.shell("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done");
    task.spec.kill_signal = "SIGTERM".to_owned();
    task.spec.kill_timeout = Duration::from_secs(10);
    let ran = run(&host, task, Some("ready")).await;
    let Some(exit) = as_root(&ran) else { return };
    assert_eq!(
        (exit.code, ran.stdout.text().as_str()),
        (0, "ready\nbye\n"),
        "{:?}",
        ran.happened
    );
}

#[tokio::test]
async fn a_refused_task_ends_the_run_with_the_reason() {
    let host = Host::new();
    let ran = run(
        &host,
        host.shell("true").with("volatile", json!("maybe")),
        None,
    )
    .await;
    if nix::unistd::geteuid().is_root() {
        let error = ran.end.unwrap_err().to_string();
        assert!(
            error.contains("config.volatile: \"maybe\" is not one of"),
            "{error}"
        );
    } else {
        as_root(&ran);
    }
    assert_eq!(fs::read_dir(host.join("alloc")).unwrap().count(), 0);
}

#[tokio::test]
async fn the_harness_starts_watches_and_removes_a_task() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 100"))
        .await;
    assert_eq!(host.starts().len(), 1);
    let exit = task.stop(&plugin, Duration::ZERO, "").await;
    assert_ne!((exit.code, exit.signal), (0, 0));
    task.destroy(&plugin).await;
    assert!(plugin.stray_stdout().is_empty());
    let stopped = plugin.shutdown().await;
    assert!(
        !stopped.killed && stopped.driver_shutdown.is_none(),
        "{stopped:?}"
    );
}
