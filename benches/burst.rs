//! Two hundred starts at once: by hand and through the plugin, alternately, in one run, each until the last container runs. Needs root,
//! systemd-nspawn, busybox (Debian: busybox-static), and 2 GiB of memory.
//!
//! `--check` exits with status 1 if the budget is exceeded. On a busy machine the result means little.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::proto::driver::{DestroyTaskRequest, StartTaskRequest};
use serde_json::json;
use tokio::task::JoinSet;

mod figures;

use figures::bare::Bare;
use figures::{Report, driver, in_memory, is_check, make_tree, median, ms, run};

/// The number of containers.
const AT_ONCE: usize = 200;
/// Rounds of both; the first one warms the caches and is not counted.
const ROUNDS: usize = 3;
/// Between two rounds, for what the kernel still does after the end of the containers.
const PAUSE: Duration = Duration::from_secs(2);
/// The budget, as a ratio to the starts by hand.
const BUDGET: f64 = 0.5;
/// The command of every container.
const PAYLOAD: &str = "exec sleep 1000";

fn main() -> anyhow::Result<ExitCode> {
    // Several pipes and sockets for each container.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    run(is_check(std::env::args().skip(1))?, compare())
}

/// Whether the budget was met.
async fn compare() -> anyhow::Result<bool> {
    let scratch = tempfile::Builder::new().prefix("nd-").tempdir()?;
    let trees = trees(scratch.path())?;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    let memory = in_memory()?;
    let state = memory.path().join("state");
    plugin.configure(&json!({ "state_dir": state })).await?;
    let (mut bare, mut driven) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        tokio::time::sleep(PAUSE).await;
        let by_hand = by_hand(scratch.path(), &trees)?;
        tokio::time::sleep(PAUSE).await;
        let through = through(&plugin, scratch.path(), &trees).await?;
        if round > 0 {
            bare.push(ms(by_hand));
            driven.push(ms(through));
        }
    }
    plugin.shutdown().await;
    let ratio = median(driven.iter().zip(&bare).map(|(a, b)| a / b).collect());
    let mut report = Report::default();
    report.say(&format!(
        "{AT_ONCE} starts at once, until the last one runs, medians of {}: {:.0} ms, bare systemd-nspawn {:.0} ms",
        ROUNDS - 1,
        median(driven),
        median(bare)
    ));
    report.judge("starts at once, ratio to bare", ratio, BUDGET, BUDGET);
    Ok(report.met)
}

/// A tree for each container, with one copy of busybox for all.
fn trees(scratch: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let first = scratch.join("trees/0");
    make_tree(&first, &["sh", "sleep"])?;
    let mut all = vec![first.clone()];
    for number in 1..AT_ONCE {
        let tree = scratch.join(format!("trees/{number}"));
        for directory in ["bin", "sbin", "etc", "usr", "alloc", "local", "secrets"] {
            fs::create_dir_all(tree.join(directory))?;
        }
        for file in ["bin/busybox", "bin/sh", "bin/sleep", "etc/os-release"] {
            fs::hard_link(first.join(file), tree.join(file))?;
        }
        all.push(tree);
    }
    Ok(all)
}

fn by_hand(scratch: &Path, trees: &[PathBuf]) -> anyhow::Result<Duration> {
    let alloc = scratch.join("bare");
    fs::create_dir_all(&alloc)?;
    let prepared: anyhow::Result<Vec<Bare>> = (0..trees.len())
        .map(|number| Bare::prepare(scratch, &format!("bench-{number}")))
        .collect();
    let prepared = prepared?;
    let begun = Instant::now();
    let spawned: anyhow::Result<Vec<Child>> = prepared
        .iter()
        .zip(trees)
        .map(|(bare, tree)| bare.spawn(tree, &alloc, PAYLOAD))
        .collect();
    let leaders: anyhow::Result<Vec<i32>> = prepared.iter().map(Bare::leader).collect();
    let span = begun.elapsed();
    for leader in leaders? {
        kill(Pid::from_raw(leader), Signal::SIGKILL)?;
    }
    for mut child in spawned? {
        child.wait()?;
    }
    prepared.into_iter().try_for_each(Bare::remove)?;
    Ok(span)
}

async fn through(plugin: &Plugin, scratch: &Path, trees: &[PathBuf]) -> anyhow::Result<Duration> {
    let mut prepared = Vec::new();
    for (number, tree) in trees.iter().enumerate() {
        let config = json!({
            "image": tree, "boot": false, "user_namespacing": false, "command": ["/bin/sh", "-c", PAYLOAD],
        });
        let spec = TaskSpec::new(&format!("t{number}"), config);
        let allocation = Allocation::create(scratch, spec)?;
        let logs = allocation.open_logs()?;
        prepared.push((plugin.task_config(&allocation).await?, allocation, logs));
    }
    let mut starts = JoinSet::new();
    let begun = Instant::now();
    for (task, _, _) in &prepared {
        let mut client = plugin.driver();
        let task = Some(task.clone());
        starts.spawn(async move { client.start_task(StartTaskRequest { task }).await });
    }
    let answers = starts.join_all().await;
    let span = begun.elapsed();
    answers
        .into_iter()
        .try_for_each(|answer| answer.map(drop))?;
    let mut ends = JoinSet::new();
    for (task, _, _) in &prepared {
        let mut client = plugin.driver();
        let (task_id, force) = (task.id.clone(), true);
        ends.spawn(async move {
            client
                .destroy_task(DestroyTaskRequest { task_id, force })
                .await
        });
    }
    let answers = ends.join_all().await;
    answers
        .into_iter()
        .try_for_each(|answer| answer.map(drop))?;
    for (_, allocation, _) in prepared {
        allocation.remove()?;
    }
    Ok(span)
}
