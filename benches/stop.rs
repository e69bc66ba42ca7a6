//! How long a stop takes: from the end of the grace period (or from the call, if the payload obeys) until the last process of the container
//! is gone, and from there until StopTask and WaitTask return. Also the time that systemd-nspawn itself needs to exit after its container,
//! and the memory of the driver's own init. One line per case, medians. Needs root, systemd-nspawn and busybox (Debian: busybox-static).
//!
//! An argument selects the cases whose name contains it. `--check` exits with status 1 if a budget is exceeded; a time budget may be
//! exceeded by half on a busy machine.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::task_dir::{Running, TaskDir};
use nomad_driver_nspawn::sys::process::{ProcessHandle, first_child};
use serde_json::{Value, json};

mod figures;

use figures::{driver, kib, make_tree, run};

/// Stops per case.
const ROUNDS: usize = 3;
/// The grace period of the cases whose payload ignores the signal.
const GRACE: Duration = Duration::from_millis(300);
/// An upper bound for every step.
const LONG: Duration = Duration::from_secs(60);

/// The budget from the end of a task until its exit is reported, in milliseconds, beyond the time that systemd-nspawn needs to exit.
const TOLD: f64 = 10.0;
/// The budget from the end of the grace period until a task that ignores everything is gone, in milliseconds.
const GONE: f64 = 100.0;
/// The memory budget of the driver's own init while its command runs, in KiB.
const HELD: f64 = 200.0;
/// The tolerance for time budgets on a busy machine.
const NOISE: f64 = 1.5;

/// One way of being stopped.
struct Case {
    name: &'static str,
    script: &'static str,
    /// The job's configuration besides image and command.
    config: Value,
    grace: Duration,
    /// The job's signal; empty: chosen by the driver to suit the payload.
    signal: &'static str,
    /// Whether the payload obeys the signal: then the time counts from the call.
    obeys: bool,
    /// Whether the exit is reported before systemd-nspawn has exited.
    early: bool,
    /// Applied to the container before it is stopped.
    before: fn(&Running) -> anyhow::Result<()>,
}

const HEARS: &str = "trap 'exit 3' TERM; echo > /alloc/up; while :; do sleep 0.02; done";
const DEAF: &str = "trap '' TERM INT; echo > /alloc/up; while :; do sleep 0.05; done";
/// A hundred loops that fork as fast as they can.
const FORKS: &str = "trap '' TERM INT; i=0; while [ $i -lt 100 ]; do (while :; do (:); done) & i=$((i+1)); done; echo > /alloc/up; wait";
const STOPPED: &str = "trap '' TERM INT; sleep 600 & kill -STOP $!; echo > /alloc/up; wait";

fn cases() -> Vec<Case> {
    let case = |name, script| Case {
        name,
        script,
        config: json!({}),
        grace: GRACE,
        signal: "SIGTERM",
        obeys: false,
        early: false,
        before: |_| Ok(()),
    };
    vec![
        Case {
            grace: LONG,
            obeys: true,
            ..case("obeys", HEARS)
        },
        Case {
            config: json!({"boot": true, "command": []}),
            grace: LONG,
            signal: "",
            obeys: true,
            ..case("boot, obeys", "")
        },
        case("ignores everything", DEAF),
        Case {
            config: json!({"process_two": true}),
            ..case("ignores everything, process_two", DEAF)
        },
        Case {
            grace: Duration::ZERO,
            ..case("no grace", DEAF)
        },
        case("a child is stopped", STOPPED),
        case("100 loops that fork", FORKS),
        Case {
            config: json!({"ephemeral": true}),
            early: true,
            ..case("ephemeral, 4000 files", DEAF)
        },
        Case {
            config: json!({"ephemeral": true}),
            grace: LONG,
            obeys: true,
            // Before 6.15 the kernel reports the exit status only to systemd-nspawn.
            early: nomad_driver_nspawn::sys::kernel::version() >= (6, 15),
            ..case("ephemeral, 4000 files, obeys", HEARS)
        },
        Case {
            config: json!({"ephemeral": true, "process_two": true}),
            grace: LONG,
            obeys: true,
            early: true,
            ..case("the same, process_two", HEARS)
        },
        Case {
            before: freeze,
            ..case("the payload is frozen", DEAF)
        },
        Case {
            before: freeze_all,
            ..case("everything is frozen", DEAF)
        },
        Case {
            before: |running| strike(running.nspawn.pid),
            ..case("systemd-nspawn is stopped", DEAF)
        },
        Case {
            before: |running| strike(running.started.supervisor.pid),
            ..case("the supervisor is stopped", DEAF)
        },
    ]
}

fn freeze(running: &Running) -> anyhow::Result<()> {
    let group = running.started.cgroup.as_ref().context("a group")?;
    Ok(fs::write(group.join("payload/cgroup.freeze"), "1")?)
}

fn freeze_all(running: &Running) -> anyhow::Result<()> {
    let group = running.started.cgroup.as_ref().context("a group")?;
    Ok(fs::write(group.join("cgroup.freeze"), "1")?)
}

fn strike(pid: i32) -> anyhow::Result<()> {
    let stop = Signal::from_number(19).context("SIGSTOP")?;
    Ok(ProcessHandle::open(pid)?.signal(stop)?)
}

fn main() -> anyhow::Result<ExitCode> {
    let (words, names): (Vec<_>, Vec<_>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with('-'));
    let check = words.iter().any(|word| word == "--check");
    run(check, measure(&names))
}

/// Whether all budgets are met.
async fn measure(names: &[String]) -> anyhow::Result<bool> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree, &["sh", "sleep"])?;
    fill_tree(&tree)?;
    let bare = median(
        (0..ROUNDS)
            .map(|_| bare(&tree))
            .collect::<anyhow::Result<_>>()?,
    )
    .0;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    plugin
        .configure(&json!({ "state_dir": scratch.path().join("state") }))
        .await?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "systemd-nspawn alone exits {bare:.1} ms after its container\n\
         {ROUNDS} stops each, medians in ms (largest in brackets)\n{:34}{:>20}{:>20}{:>20}",
        "", "until it is gone", "then StopTask", "then WaitTask"
    )?;
    let mut held: Vec<f64> = Vec::new();
    let mut missed = Vec::new();
    for case in cases() {
        if !names.is_empty() && !names.iter().any(|name| case.name.contains(name.as_str())) {
            continue;
        }
        let mut spans = Vec::new();
        for _ in 0..ROUNDS {
            spans.push(stop(&plugin, scratch.path(), &tree, &case, &mut held).await?);
        }
        let reported = |which: usize| median(spans.iter().map(|span| span[which]).collect());
        let shown = |which: usize| {
            let (middle, most) = reported(which);
            format!("{middle:.1} ({most:.1})")
        };
        writeln!(
            out,
            "{:34}{:>20}{:>20}{:>20}",
            case.name,
            shown(0),
            shown(1),
            shown(2)
        )?;
        let due = if case.early { TOLD } else { bare + TOLD };
        let mut judge = |what: &str, figure: f64, budget: f64| {
            if figure > budget * NOISE {
                missed.push(format!(
                    "{}: {what}: {figure:.1} ms of {budget:.1}",
                    case.name
                ));
            }
        };
        judge("until StopTask", reported(1).0, due);
        judge("until WaitTask", reported(2).0, due);
        if !case.obeys {
            judge("until it is gone", reported(0).0, GONE);
        }
    }
    if !held.is_empty() {
        let (_, most) = median(held);
        writeln!(
            out,
            "the container init with process_two: {most:.0} KiB of anonymous memory, budget {HELD:.0}"
        )?;
        if most > HELD {
            missed.push(format!("the container init uses {most:.0} KiB"));
        }
    }
    for miss in &missed {
        writeln!(out, "NOT MET: {miss}")?;
    }
    plugin.shutdown().await;
    Ok(missed.is_empty())
}

/// The median and the maximum.
fn median(mut all: Vec<f64>) -> (f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[all.len() - 1])
}

/// Milliseconds from the end of a container to the exit of its systemd-nspawn, which was called by hand.
#[expect(
    clippy::disallowed_methods,
    reason = "the baseline is started without the driver"
)]
fn bare(tree: &Path) -> anyhow::Result<f64> {
    let mut nspawn = Command::new("systemd-nspawn")
        .args([
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
            "-D",
        ])
        .arg(tree)
        .args(["/bin/sh", "-c", "echo up; exec sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut up = [0; 3];
    nspawn
        .stdout
        .take()
        .context("its output")?
        .read_exact(&mut up)?;
    let leader = first_child(i32::try_from(nspawn.id())?).context("the leader")?;
    let leader = ProcessHandle::open(leader)?;
    leader.signal(Signal::KILL)?;
    ensure!(leader.wait(LONG), "it does not exit");
    let gone = Instant::now();
    nspawn.wait()?;
    Ok(ms(gone, Instant::now()))
}

/// Stops one container: milliseconds until it is gone, and from there until StopTask and WaitTask have returned.
async fn stop(
    plugin: &Plugin,
    scratch: &Path,
    tree: &Path,
    case: &Case,
    held_by_init: &mut Vec<f64>,
) -> anyhow::Result<[f64; 3]> {
    let mut config = json!({
        "image": tree, "boot": false, "user_namespacing": false, "command": ["/bin/sh", "-c", case.script],
    });
    for (option, value) in case.config.as_object().into_iter().flatten() {
        config[option] = value.clone();
    }
    let allocation = Allocation::create(scratch, TaskSpec::new("bench", config))?;
    let _logs = allocation.open_logs()?;
    let task = plugin.task_config(&allocation).await?;
    let id = task.id.clone();
    plugin.start(task).await?;
    let up = allocation.dir().join("alloc/up");
    while !up.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let running = TaskDir::for_task(&scratch.join("state"), &id).running()?;
    let held = ProcessHandle::open(running.started.leader.pid)?;
    if case.config["process_two"] == true {
        let pid = running.started.leader.pid;
        held_by_init.push(kib(pid, "smaps_rollup", "Anonymous:"));
    }
    (case.before)(&running)?;
    // PID 1 of a pid namespace is the last process to exit.
    let gone = tokio::task::spawn_blocking(move || {
        ensure!(held.wait(LONG), "it does not exit");
        Ok(Instant::now())
    });
    let begun = Instant::now();
    let stopped = async {
        plugin.stop(&id, case.grace, case.signal).await?;
        anyhow::Ok(Instant::now())
    };
    let waited = async {
        plugin.wait(&id).await?;
        anyhow::Ok(Instant::now())
    };
    let (stopped, waited, gone) = tokio::try_join!(stopped, waited, async { gone.await? })?;
    let due = if case.obeys {
        begun
    } else {
        begun + case.grace
    };
    plugin.destroy(&id, true).await?;
    allocation.remove()?;
    Ok([ms(due, gone), ms(gone, stopped), ms(gone, waited)])
}

/// Milliseconds between two instants, in either order.
fn ms(from: Instant, to: Instant) -> f64 {
    let span = |span: Duration| span.as_secs_f64() * 1000.0;
    to.checked_duration_since(from)
        .map_or_else(|| -span(from - to), span)
}

/// Adds an init that obeys, and many files.
fn fill_tree(tree: &Path) -> anyhow::Result<()> {
    let init = tree.join("sbin/init");
    // 38 is SIGRTMIN+4.
    let obeys = "trap 'exit 0' 38; echo > /alloc/up; while :; do sleep 0.02; done";
    fs::write(&init, format!("#!/bin/sh\n{obeys}\n"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    // The content that systemd-nspawn removes with an ephemeral root.
    for directory in 0..4 {
        let directory = tree.join(format!("usr/d{directory}"));
        fs::create_dir(&directory)?;
        for file in 0..1000 {
            fs::write(directory.join(file.to_string()), "")?;
        }
    }
    Ok(())
}
