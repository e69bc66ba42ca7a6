//! Secrets: no value of a variable, no template's content and no token is visible on the host, neither while a task with them runs nor
//! after it has died in any way; and no process gets a descriptor or a variable that it does not need. Uses the fake, which takes values in
//! the same way as each version of systemd-nspawn.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use dev_agent::Plugin;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::proto::driver::fingerprint_response::HealthState;
use nomad_driver_nspawn::proto::driver::{DriverTaskEvent, FingerprintRequest};
use rstest::rstest;
use serde_json::json;
use support::not_applicable;

use crate::harness::{Host, argv, is_root, refusal, within};
use crate::lifecycle::nothing_left;
use crate::suite::scenarios::secrets::Case;

use support::secrecy::{self, Marker, Mode, descriptors, open_to_others, shown};

mod processes;
mod refusals;

const ON_AND_ON: &str = "echo up; exec sleep 1000";

/// A task with secrets on the fake of version 252.
fn case(mode: Mode) -> Case<Host> {
    Case::new(Host::new(), mode, 252).expect("the fake has every version")
}

/// Names that systemd-nspawn or one of its libraries would act on.
#[rstest]
#[case(Mode::Plain)]
#[case(Mode::ProcessTwo)]
#[case(Mode::Boot)]
#[tokio::test]
async fn names_that_systemd_reads_never_reach_its_environment(#[case] mode: Mode) {
    let case = case(mode);
    let plugin = case.world.plugin().await;
    let names = ["LD_PRELOAD", "SYSTEMD_LOG_LEVEL", "PKCS11_PIN"];
    let job = names.iter().fold(case.world.shell("exit 0"), |job, name| {
        job.env(name, &case.marker.secret(name))
    });
    let job = match mode {
        Mode::Plain => job,
        Mode::ProcessTwo => job.with("process_two", json!(true)),
        Mode::Boot => job.with("boot", json!(true)).with("command", json!([])),
    };
    let task = case.world.start(&plugin, job).await;
    let start = &case.world.starts()[0];
    let environment = crate::harness::environment(start);
    let shows = shown(mode, 252, true).is_some();
    for name in names {
        let secret = case.marker.secret(name);
        assert!(
            !environment.values().any(|value| *value == secret),
            "{name}"
        );
        let word = format!("--setenv={name}={secret}");
        assert_eq!(argv(start).contains(&word), shows, "{name}");
    }
    task.destroy(&plugin).await;
}

/// The cause of a failed start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NoImage,
    ImageIsNoTree,
    BadOption,
    OptionWithASecret,
    LongOptionWithASecret,
    ValueWithNul,
    ValueTooLong,
    BadName,
    NspawnRefuses,
    NspawnDies,
    NoNspawn,
    NoStateDir,
}

#[rstest]
#[tokio::test]
async fn no_failed_start_shows_a_secret(
    #[values(
        Fault::NoImage,
        Fault::ImageIsNoTree,
        Fault::BadOption,
        Fault::OptionWithASecret,
        Fault::LongOptionWithASecret,
        Fault::ValueWithNul,
        Fault::ValueTooLong,
        Fault::BadName,
        Fault::NspawnRefuses,
        Fault::NspawnDies,
        Fault::NoNspawn,
        Fault::NoStateDir
    )]
    fault: Fault,
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
) {
    let case = case(mode);
    let secret = case.marker.secret("value");
    let (task, words) = match fault {
        Fault::NoImage => {
            let missing = case.world.join("missing");
            (
                case.task(ON_AND_ON).with("image", json!(missing)),
                "config.image",
            )
        }
        Fault::ImageIsNoTree => {
            let empty = case.world.join("empty");
            fs::create_dir(&empty).unwrap();
            (case.task(ON_AND_ON).with("image", json!(empty)), "")
        }
        Fault::BadOption => {
            let task = case.task(ON_AND_ON).with("volatile", json!("maybe"));
            (task, "config.volatile: \"maybe\"")
        }
        Fault::OptionWithASecret => {
            let task = case.task(ON_AND_ON).with("volatile", json!(secret));
            (task, "config.volatile: \"${DB_PASSWORD}\"")
        }
        Fault::LongOptionWithASecret => {
            let long = format!("{}{}", "x".repeat(190), secret);
            let task = case.task(ON_AND_ON).with("bind", json!([{(long): "/srv"}]));
            (task, "config.bind")
        }
        Fault::ValueWithNul => {
            let task = case.task(ON_AND_ON).env("OTHER", &format!("{secret}\0"));
            (task, "task.env[\"OTHER\"]: a NUL")
        }
        Fault::ValueTooLong => {
            let task = case.task(ON_AND_ON).env("OTHER", &secret.repeat(8000));
            (task, "task.env[\"OTHER\"]: has ")
        }
        Fault::BadName => {
            let task = case
                .task(ON_AND_ON)
                .with("environment", json!([{"a=b": secret.clone()}]));
            (task, "config.environment[\"a=b\"]")
        }
        Fault::NspawnRefuses => {
            let call = json!({"refuse": {"status": 1, "stderr": "Failed to fork: out of luck"}});
            case.world.scenario(&json!({"calls": [call]}));
            (case.task(ON_AND_ON), "status 1")
        }
        Fault::NspawnDies => {
            case.world
                .scenario(&json!({"calls": [{"die_before_notify": 11}]}));
            (case.task(ON_AND_ON), "SIGSEGV")
        }
        Fault::NoNspawn | Fault::NoStateDir => (case.task(ON_AND_ON), "plugin."),
    };
    let options = match fault {
        Fault::NoNspawn => json!({"nspawn_path": "/proc/self/mem"}),
        Fault::NoStateDir => json!({"state_dir": "/proc/self/mem"}),
        _ => json!({}),
    };
    let words = if fault == Fault::NoNspawn {
        "nspawn_path"
    } else {
        words
    };
    let plugin = case.world.plugin_with(&options).await;
    let mut events = plugin.events().await.unwrap();
    let error = case.world.start_in(&plugin, case.allocation(task)).await;
    let text = refusal(error).message().to_owned();
    assert!(text.contains(words), "{text}");
    case.marker.not_in("the error", &text);
    case.search(&format!("after {fault:?}"), None);
    // A last task that starts emits the last event of the stream.
    case.world.scenario(&json!({}));
    plugin.configure(&case.world.config()).await.unwrap();
    let last = case.world.shell("exit 0").env("last=one", "x");
    let last = case.world.start(&plugin, last).await;
    loop {
        let event: DriverTaskEvent = within("an event", events.message()).await.unwrap().unwrap();
        case.marker.not_in("an event", &format!("{event:?}"));
        if event.task_id == last.id {
            break;
        }
    }
    last.destroy(&plugin).await;
}

/// The start has succeeded before this failure is known, so it is reported as an exit.
#[rstest]
#[case("/no/such/program")]
#[case("/etc/passwd")]
#[tokio::test]
async fn a_command_that_can_not_run_shows_no_secret(#[case] command: &str) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let case = case(mode);
        let plugin = case.world.plugin().await;
        let task = case.task(ON_AND_ON).with("command", json!([command]));
        let task = case.world.start_in(&plugin, case.allocation(task)).await;
        let task = task.unwrap();
        let exit = task.wait(&plugin).await;
        assert_ne!(exit.code, 0);
        case.marker.not_in("the exit", &format!("{exit:?}"));
        case.search("after the end", None);
        let said = task.stdout.all().await + &task.stderr.all().await;
        case.marker.not_in("the task's log", &said);
        task.destroy(&plugin).await;
    }
}
