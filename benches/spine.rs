//! What the driver adds to systemd-nspawn: starts and ends the same container by hand and through the plugin, alternately, in one run.
//! Prints medians and ratios, and the budget next to them. Needs root, systemd-nspawn and busybox (Debian: busybox-static).
//!
//! `--check` exits with status 1 if the budget is exceeded. On a busy machine the result means little.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::ensure;
use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nomad_driver_nspawn::state::task_dir::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::json;

mod figures;

use figures::bare::Bare;
use figures::{Report, driver, in_memory, is_check, kib, make_tree, median, ms, run, switches};

/// Pairs of runs; the first ones warm the caches and are not counted.
const PAIRS: usize = 24;
const WARM_UP: usize = 5;
/// An upper bound for every step.
const LONG: Duration = Duration::from_secs(30);
/// The command of every container: waits for a line and exits.
const PAYLOAD: &str = "read word < /alloc/go; exit 3";

/// The budget of a start with captured seccomp filters, as a ratio to one by hand.
const CAPTURED: f64 = 0.5;
/// The budget of a start without them, in ms more than one by hand: 2 more than the worst run of this benchmark (6.8, ratio 1.10) when the
/// driver consisted of its core only.
const BUILT: f64 = 8.8;

fn main() -> anyhow::Result<ExitCode> {
    run(is_check(std::env::args().skip(1))?, compare())
}

/// Whether the budget was met.
async fn compare() -> anyhow::Result<bool> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree, &["sh"])?;
    let launched = Instant::now();
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    let handshake = launched.elapsed();
    let memory = in_memory()?;
    let capturing = Site::new(plugin, memory.path().join("captured"), true).await?;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    let building = Site::new(plugin, memory.path().join("built"), false).await?;

    let mut bare = Series::default();
    let mut driven = Series::default();
    let mut built = Series::default();
    let mut resting = Vec::new();
    for pair in 0..WARM_UP + PAIRS {
        settle().await;
        let by_hand = bare_container(scratch.path(), &tree)?;
        settle().await;
        let (through, rest) = driven_container(&capturing, &tree, pair == WARM_UP).await?;
        settle().await;
        let (by_building, _) = driven_container(&building, &tree, false).await?;
        if pair >= WARM_UP {
            bare.add(by_hand);
            built.add(by_building);
            driven.add(through);
            resting.extend(rest);
        }
    }
    let mut report = Report::default();
    report.say(&format!(
        "{PAIRS} pairs, medians in ms (p99 in brackets)\n\
         start to notification, bare systemd-nspawn   {}\n\
         StartTask to its response                    {}   {}",
        bare.up(),
        driven.up(),
        reported(driven.against(&bare, |run| run.up))
    ));
    let (_, ratio) = driven.against(&bare, |run| run.up);
    let what = "a start, ratio to the direct call";
    report.judge(what, ratio, CAPTURED, CAPTURED);
    report.say(&format!(
        "the same without captured seccomp filters    {}   {}",
        built.up(),
        reported(built.against(&bare, |run| run.up))
    ));
    let (more, _) = built.against(&bare, |run| run.up);
    let what = "a start without them, ms more than the direct call";
    report.judge(what, more, BUILT, BUILT);
    report.say(&format!(
        "payload exit to systemd-nspawn exit, bare     {}\n\
         payload exit to WaitTask response            {}   {}\n\
         exec of the plugin to its handshake line     {:.1}\n\
         plugin's resident memory after {} tasks      {:.1} MiB",
        bare.down(),
        driven.down(),
        reported(driven.against(&bare, |run| run.down)),
        ms(handshake),
        WARM_UP + PAIRS,
        kib(capturing.plugin.pid(), "status", "VmRSS:") / 1024.0
    ));
    for line in resting {
        report.say(&line);
    }
    capturing.plugin.shutdown().await;
    building.plugin.shutdown().await;
    Ok(report.met)
}

/// A plugin, and the directory with its state and its allocations.
#[derive(Debug)]
struct Site {
    plugin: Plugin,
    directory: PathBuf,
}

impl Site {
    async fn new(plugin: Plugin, directory: PathBuf, cache: bool) -> anyhow::Result<Self> {
        fs::create_dir(&directory)?;
        let config = json!({ "state_dir": directory.join("state"), "seccomp_cache": cache });
        plugin.configure(&config).await?;
        Ok(Self { plugin, directory })
    }
}

/// Waits until the previous run has no effect on the next one. On an idle host the kernel takes some 8 ms for the first move of a process to
/// a cgroup, and microseconds for those that follow within the next 10 ms.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// One container's start and end times.
#[derive(Debug, Clone, Copy)]
struct Run {
    up: Duration,
    down: Duration,
}

#[derive(Debug, Default)]
struct Series(Vec<Run>);

impl Series {
    fn add(&mut self, run: Run) {
        self.0.push(run);
    }

    fn sorted(&self, span: impl Fn(&Run) -> Duration) -> Vec<Duration> {
        let mut all: Vec<Duration> = self.0.iter().map(span).collect();
        all.sort_unstable();
        all
    }

    fn reported(&self, span: impl Fn(&Run) -> Duration) -> String {
        let all = self.sorted(span);
        let last = all.len() * 99 / 100;
        format!("{:6.1} ({:.1})", ms(all[all.len() / 2]), ms(all[last]))
    }

    fn up(&self) -> String {
        self.reported(|run| run.up)
    }

    fn down(&self) -> String {
        self.reported(|run| run.down)
    }

    /// The median of the differences and of the ratios, pair by pair, so that both sides of a pair ran under the same load.
    fn against(&self, other: &Self, span: impl Fn(&Run) -> Duration) -> (f64, f64) {
        let pairs: Vec<(f64, f64)> = self
            .0
            .iter()
            .zip(&other.0)
            .map(|(ours, theirs)| (ms(span(ours)), ms(span(theirs))))
            .collect();
        let more = median(pairs.iter().map(|(ours, theirs)| ours - theirs).collect());
        let ratio = median(pairs.iter().map(|(ours, theirs)| ours / theirs).collect());
        (more, ratio)
    }
}

fn reported((more, ratio): (f64, f64)) -> String {
    format!("{more:+.1} ms, ratio {ratio:.2}")
}

/// systemd-nspawn by hand.
fn bare_container(scratch: &Path, tree: &Path) -> anyhow::Result<Run> {
    let alloc = scratch.join("bare");
    fs::create_dir_all(&alloc)?;
    let go = fifo(&alloc)?;
    let bare = Bare::prepare(scratch, "bench")?;
    let begun = Instant::now();
    let mut child = bare.spawn(tree, &alloc, PAYLOAD)?;
    let leader = bare.leader()?;
    let up = begun.elapsed();
    let held = ProcessHandle::open(leader)?;
    fs::write(&go, "go\n")?;
    ensure!(held.wait(LONG), "the payload does not exit");
    let ended = Instant::now();
    child.wait()?;
    let down = ended.elapsed();
    bare.remove()?;
    fs::remove_file(go)?;
    Ok(Run { up, down })
}

/// The same container as a task of the plugin. With `rest`, also its cost while idle.
async fn driven_container(
    site: &Site,
    tree: &Path,
    rest: bool,
) -> anyhow::Result<(Run, Vec<String>)> {
    let Site { plugin, directory } = site;
    let config = json!({
        "image": tree, "boot": false, "user_namespacing": false, "command": ["/bin/sh", "-c", PAYLOAD],
    });
    let allocation = Allocation::create(directory, TaskSpec::new("bench", config))?;
    let _logs = allocation.open_logs()?;
    let go = fifo(&allocation.dir().join("alloc"))?;
    let task = plugin.task_config(&allocation).await?;
    let id = task.id.clone();
    let begun = Instant::now();
    let started = plugin.start(task).await?;
    let up = begun.elapsed();
    let running = TaskDir::for_task(&directory.join("state"), &id).running()?;
    let held = ProcessHandle::open(running.started.leader.pid)?;
    drop(started);
    let resting = if rest {
        at_rest(running.started.supervisor.pid).await?
    } else {
        Vec::new()
    };
    let answer = {
        let waited = plugin.wait(&id);
        let ended = tokio::task::spawn_blocking(move || {
            held.wait(LONG);
            Instant::now()
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        tokio::fs::write(&go, "go\n").await?;
        let (exit, ended) = tokio::join!(waited, ended);
        let answered = Instant::now();
        ensure!(exit?.code == 3, "the exit code is not the payload's");
        answered.duration_since(ended?)
    };
    plugin.destroy(&id, true).await?;
    fs::remove_file(go)?;
    allocation.remove()?;
    Ok((Run { up, down: answer }, resting))
}

/// Memory and wake-ups of an idle supervisor.
async fn at_rest(supervisor: i32) -> anyhow::Result<Vec<String>> {
    // systemd-nspawn sends one more notification shortly after the start.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = switches(supervisor)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let woken = switches(supervisor)? - before;
    let private = kib(supervisor, "smaps_rollup", "Private_Dirty:")
        + kib(supervisor, "smaps_rollup", "Private_Clean:");
    Ok(vec![
        format!(
            "supervisor's private memory                  {:.0} KiB ({:.0} KiB of it written)",
            private,
            kib(supervisor, "smaps_rollup", "Private_Dirty:")
        ),
        format!("supervisor's wake-ups in 3 idle seconds      {woken}"),
    ])
}

fn fifo(directory: &Path) -> anyhow::Result<PathBuf> {
    let path = directory.join("go");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    Ok(path)
}
