//! How long a stop takes: from the end of the grace time (or from the call, where the payload obeys) until the last process of the
//! container is gone, and from there until StopTask and WaitTask answer. One line a case, medians; judges nothing. Needs root,
//! systemd-nspawn and busybox (Debian: busybox-static).

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nomad_driver_nspawn::host::{Allocation, Launch, Plugin, TaskSpec};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::supervisor::process::Held;
use nomad_driver_nspawn::supervisor::record::{Records, Running};
use serde_json::{Value, json};

/// Stops of every case.
const ROUNDS: usize = 5;
/// The grace time of the cases whose payload ignores the signal.
const GRACE: Duration = Duration::from_millis(300);
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// One way to be stopped.
struct Case {
    name: &'static str,
    script: &'static str,
    /// What the job's configuration says besides image and command.
    config: Value,
    grace: Duration,
    /// Whether the payload obeys the signal: then the time counts from the call.
    obeys: bool,
    /// What is done to the container before it is stopped.
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
        obeys: false,
        before: |_| Ok(()),
    };
    vec![
        Case {
            grace: LONG,
            obeys: true,
            ..case("obeys", HEARS)
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
            ..case("ephemeral, 20000 files", DEAF)
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
    Ok(Held::by_pid(pid)?.signal(stop)?)
}

fn main() -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark starts real containers and needs root"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(measure())
}

async fn measure() -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree)?;
    let plugin = Plugin::launch(Launch::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn"))).await?;
    plugin
        .configure(&json!({ "state_dir": scratch.path().join("state") }))
        .await?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{ROUNDS} stops each, medians in ms (largest in brackets)\n{:34}{:>20}{:>20}{:>20}",
        "", "until it is gone", "then StopTask", "then WaitTask"
    )?;
    let only = std::env::args()
        .nth(1)
        .filter(|word| !word.starts_with('-'));
    for case in cases() {
        if only
            .as_ref()
            .is_some_and(|only| !case.name.contains(only.as_str()))
        {
            continue;
        }
        let mut spans = Vec::new();
        for _ in 0..ROUNDS {
            spans.push(stop(&plugin, scratch.path(), &tree, &case).await?);
        }
        let told = |pick: fn(&[f64; 3]) -> f64| {
            let mut all: Vec<f64> = spans.iter().map(pick).collect();
            all.sort_by(f64::total_cmp);
            format!("{:.1} ({:.1})", all[all.len() / 2], all[all.len() - 1])
        };
        writeln!(
            out,
            "{:34}{:>20}{:>20}{:>20}",
            case.name,
            told(|span| span[0]),
            told(|span| span[1]),
            told(|span| span[2])
        )?;
    }
    plugin.shutdown().await;
    Ok(())
}

/// One container's stop: milliseconds until it is gone, and from there until StopTask and WaitTask answered.
async fn stop(
    plugin: &Plugin,
    scratch: &Path,
    tree: &Path,
    case: &Case,
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
    let running = Records::of(&scratch.join("state"), &id).running()?;
    let held = Held::by_pid(running.started.leader.pid)?;
    (case.before)(&running)?;
    // The first process of a pid namespace is the last to go.
    let gone = tokio::task::spawn_blocking(move || {
        ensure!(held.wait(LONG), "it does not end");
        Ok(Instant::now())
    });
    let begun = Instant::now();
    let stopped = async {
        plugin.stop(&id, case.grace, "SIGTERM").await?;
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

/// Milliseconds between two moments, in whichever order.
fn ms(from: Instant, to: Instant) -> f64 {
    let span = |span: Duration| span.as_secs_f64() * 1000.0;
    to.checked_duration_since(from)
        .map_or_else(|| -span(from - to), span)
}

fn make_tree(tree: &Path) -> anyhow::Result<()> {
    for directory in ["bin", "etc", "usr", "alloc", "local", "secrets"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|path| Path::new(path).exists());
    fs::copy(
        busybox.context("busybox is not installed (Debian: busybox-static)")?,
        tree.join("bin/busybox"),
    )?;
    for applet in ["sh", "sleep"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet))?;
    }
    fs::write(tree.join("etc/os-release"), "ID=bench\n")?;
    // What an ephemeral root has to throw away at the end.
    for directory in 0..20 {
        let directory = tree.join(format!("usr/d{directory}"));
        fs::create_dir(&directory)?;
        for file in 0..1000 {
            fs::write(directory.join(file.to_string()), "")?;
        }
    }
    Ok(())
}
