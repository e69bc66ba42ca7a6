//! A start that fails shows no secret, whatever its cause: not in the error, in an event, in the log, in a process or in a file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nomad_driver_nspawn::proto::driver::DriverTaskEvent;
use serde_json::{Value, json};
use support::secrecy::Mode;
use support::wire::Task;

use super::secrets::Case;
use super::*;

/// The cause of a failed start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NoImage,
    ImageIsNoTree,
    ImageIsNoDisk,
    BadOption,
    BadCapability,
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

impl Fault {
    /// A task that fails to start for this cause, options of the plugin, and what the error contains.
    fn prepare<W: World>(self, case: &Case<W>) -> (Task, Value, &'static str) {
        let task = case.task(ON_AND_ON);
        let secret = case.marker.secret("value");
        let world = &case.world;
        let (task, words) = match self {
            Self::NoImage => {
                let missing = world.join("missing");
                (task.with("image", json!(missing)), "config.image")
            }
            Self::ImageIsNoTree => {
                let empty = world.join("empty");
                fs::create_dir(&empty).unwrap();
                (task.with("image", json!(empty)), "")
            }
            Self::ImageIsNoDisk => {
                let broken = world.join("broken.raw");
                fs::write(&broken, "no file system").unwrap();
                (task.with("image", json!(broken)), "")
            }
            Self::BadOption => {
                let task = task.with("volatile", "maybe");
                (task, "config.volatile: \"maybe\"")
            }
            Self::BadCapability => {
                let task = task.with("capability", json!(["CAP_NO"]));
                (task, "config.capability")
            }
            Self::OptionWithASecret => {
                let task = task.with("volatile", secret);
                (task, "config.volatile: \"${DB_PASSWORD}\"")
            }
            Self::LongOptionWithASecret => {
                let long = format!("{}{secret}", "x".repeat(190));
                (task.with("bind", json!([{(long): "/srv"}])), "config.bind")
            }
            Self::ValueWithNul => {
                let task = task.env("OTHER", &format!("{secret}\0"));
                (task, "task.env[\"OTHER\"]: a NUL")
            }
            Self::ValueTooLong => {
                let task = task.env("OTHER", &secret.repeat(8000));
                (task, "task.env[\"OTHER\"]: has ")
            }
            Self::BadName => {
                let task = task.with("environment", json!([{"a=b": secret}]));
                (task, "config.environment[\"a=b\"]")
            }
            Self::NspawnRefuses => (task, "status 1"),
            Self::NspawnDies => (task, "SIGSEGV"),
            Self::NoNspawn => (task, "nspawn_path"),
            Self::NoStateDir => (task, "plugin."),
        };
        let options = match self {
            Self::NspawnRefuses => {
                let instead = "echo 'Failed to fork: out of luck' >&2; exit 1";
                json!({"nspawn_path": other_nspawn(world, instead)})
            }
            Self::NspawnDies => json!({"nspawn_path": other_nspawn(world, "kill -SEGV $$")}),
            Self::NoNspawn => json!({"nspawn_path": "/proc/self/mem"}),
            Self::NoStateDir => json!({"state_dir": "/proc/self/mem"}),
            _ => json!({}),
        };
        (task, options, words)
    }
}

/// A systemd-nspawn with the version of this world's one, that runs this shell script for every start.
fn other_nspawn(world: &impl World, script: &str) -> PathBuf {
    let path = world.join("other-nspawn");
    let config = world.config();
    let real = config["nspawn_path"].as_str().unwrap_or("systemd-nspawn");
    let text =
        format!("#!/bin/sh\ncase $1 in --version) exec {real} --version ;; esac\n{script}\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[rstest]
#[tokio::test]
async fn a_failed_start_shows_no_secret(
    world: impl World,
    #[values(
        Fault::NoImage,
        Fault::ImageIsNoTree,
        Fault::ImageIsNoDisk,
        Fault::BadOption,
        Fault::BadCapability,
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
    // The fake does not look into an image.
    if fault == Fault::ImageIsNoDisk && !world.has(&[Need::MountNamespace]) {
        world.unused();
        return;
    }
    let Some(case) = Case::new(world, mode, 252) else {
        return;
    };
    let (task, options, words) = fault.prepare(&case);
    let plugin = case.world.plugin().await;
    let mut config = case.world.config();
    for (option, value) in options.as_object().unwrap() {
        config[option] = value.clone();
    }
    plugin.configure(&config).await.unwrap();
    let mut events = plugin.events().await.unwrap();
    let error = case.world.start_in(&plugin, case.allocation(task)).await;
    let refused = error.expect_err("the start must fail");
    // Includes the stderr of systemd-nspawn if it was called.
    case.marker.not_in("the error", &format!("{refused:?}"));
    let text = refusal(Err::<(), _>(refused)).message().to_owned();
    assert!(text.contains(words), "{text}");
    case.search(&format!("after {fault:?}"), None);
    // A last task that starts emits the last event of the stream.
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
    case.world.leave(plugin).await;
}

/// The start has succeeded before this failure is known, so it is reported as an exit. A booted container has no command.
#[rstest]
#[tokio::test]
async fn a_command_that_cannot_run_shows_no_secret(
    world: impl World,
    #[values("/no/such/program", "/etc/passwd")] command: &str,
    #[values(Mode::Plain, Mode::ProcessTwo)] mode: Mode,
) {
    let Some(case) = Case::new(world, mode, 252) else {
        return;
    };
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
    case.world.leave(plugin).await;
}
