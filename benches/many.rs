//! A plugin with a thousand tasks: what it holds, what it and the supervisors use while idle, what statistics of all tasks every second cost,
//! how long recovery of all tasks takes, and 200 simultaneous starts. The containers are those of the hermetic tests' fake, so only the driver is measured. Needs no systemd-nspawn, but
//! some gigabytes of memory for the fake's processes. With cgroups if run as root.
//!
//! `--tasks N` sets another number. `--check` exits with status 1 if a budget is exceeded. On a busy machine times mean little: the best of
//! the attempts counts, and a time budget may be exceeded by half.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nomad_driver_nspawn::cleanup;
use nomad_driver_nspawn::proto::driver::{
    CapabilitiesRequest, TaskHandle, TaskStatsRequest, memory_usage,
};
use nomad_driver_nspawn::state::task_dir::TaskDir;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

mod figures;

use figures::{Report, driver, kib, ms, runtime, switches, ticks};

/// The number of simultaneous starts.
const AT_ONCE: usize = 200;
/// The length of the idle measurement.
const IDLE: Duration = Duration::from_secs(10);
/// The time in which a plugin without calls settles: it returns free memory every 6 s, and its idle threads end after 10 s.
const SETTLED: Duration = Duration::from_secs(12);
/// The number of concurrent calls where it does not matter.
const WIDTH: usize = 16;

/// The budget for recovering all of 1,000 tasks, in milliseconds.
const RECOVERED: f64 = 1000.0;
/// The memory budget of a plugin, in KiB, and the additional budget per task.
const BASE: f64 = 15.0 * 1024.0;
const EACH: f64 = 16.0;
/// The budget for statistics of 1,000 tasks every second, in percent of a core.
const SAMPLED: f64 = 2.0;
/// The tolerance for time budgets on a busy machine.
const NOISE: f64 = 1.5;

fn main() -> ExitCode {
    let mut asked = Asked::default();
    if let Err(error) = asked.read(std::env::args().skip(1)) {
        let _ = writeln!(std::io::stderr(), "{error}");
        return ExitCode::from(2);
    }
    match run(&asked) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) if !asked.check => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command line arguments.
#[derive(Debug)]
struct Asked {
    check: bool,
    tasks: usize,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            check: false,
            tasks: 1000,
        }
    }
}

impl Asked {
    fn read(&mut self, mut words: impl Iterator<Item = String>) -> anyhow::Result<()> {
        while let Some(word) = words.next() {
            match word.as_str() {
                // Passed by cargo.
                "--bench" => {}
                "--check" => self.check = true,
                "--tasks" => {
                    self.tasks = words.next().context("--tasks needs a number")?.parse()?
                }
                other => anyhow::bail!("{other:?} is not one of --check, --tasks N"),
            }
        }
        Ok(())
    }
}

fn run(asked: &Asked) -> anyhow::Result<bool> {
    // Two pipes per task here, and as many descriptors again in the plugin.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    runtime()?.block_on(measure(asked.tasks))
}

async fn measure(count: usize) -> anyhow::Result<bool> {
    let mut report = Report::default();
    let site = Site::new()?;
    let mut plugin = site.plugin().await?;
    report.say(&format!("plugin without a task{}", resident(plugin.pid())));

    let tasks = starts(&site, &plugin, count, &mut report).await?;
    let count = tasks.len();
    let mut waits = waits(&plugin, &tasks);
    tokio::time::sleep(SETTLED).await;
    idle(&plugin, &tasks, &mut report).await?;
    let stats = statistics(&plugin, &tasks).await?;
    tokio::time::sleep(SETTLED).await;
    held(&plugin, count, "and a stream of statistics", &mut report);
    sampled(&plugin, count, &stats, &mut report).await?;
    drop(stats);
    waits.abort_all();

    let floor = floor(&plugin, count).await?;
    report.say(&format!(
        "{count} calls that do nothing, one after the other: {:.0} ms",
        ms(floor)
    ));
    let mut best = f64::INFINITY;
    for together in [1, 1, WIDTH, count] {
        plugin.kill().await;
        plugin = site.plugin().await?;
        let took = recover(&plugin, &tasks, together).await?;
        let how = match together {
            1 => "one after the other, as Nomad does it".to_owned(),
            all if all == count => "all at once".to_owned(),
            some => format!("{some} together"),
        };
        report.say(&format!(
            "{count} tasks recovered, {how}: {:.0} ms, ratio {:.1} to calls that do nothing",
            ms(took),
            took.as_secs_f64() / floor.as_secs_f64()
        ));
        if together == 1 {
            best = best.min(ms(took));
        }
    }
    let budget = RECOVERED * count as f64 / 1000.0;
    report.judge(
        "recovery of all one after the other, ms, the better of two",
        best,
        budget,
        budget * NOISE,
    );
    let mut waits = self::waits(&plugin, &tasks);
    tokio::time::sleep(SETTLED).await;
    held(&plugin, count, "all recovered", &mut report);
    waits.abort_all();

    destroy(&plugin, &tasks, &mut report).await?;
    plugin.shutdown().await;
    Ok(report.met)
}

/// The directory with everything: the link to the fake, a tree per task, allocations, the state directory. Leftovers are removed at the
/// end.
#[derive(Debug)]
struct Site(tempfile::TempDir);

impl Site {
    fn new() -> anyhow::Result<Self> {
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new().prefix("nd-").tempdir()?;
        for name in ["bin", "state", "alloc", "trees"] {
            fs::create_dir(dir.path().join(name))?;
        }
        let link = dir.path().join("bin/systemd-nspawn");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fake-nspawn"), link)?;
        Ok(Self(dir))
    }

    fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(path)
    }

    async fn plugin(&self) -> anyhow::Result<Plugin> {
        let plugin = Plugin::launch(Launch::new(driver())).await?;
        let config = json!({
            "state_dir": self.join("state"),
            "nspawn_path": self.join("bin/systemd-nspawn"),
        });
        plugin.configure(&config).await?;
        Ok(plugin)
    }

    /// An allocation with its own tree, booted: the fake then simulates the init and does not poll.
    fn allocation(&self, number: usize) -> anyhow::Result<Allocation> {
        let tree = self.join(format!("trees/{number}"));
        for directory in ["usr/lib/systemd", "etc", "alloc", "local", "secrets"] {
            fs::create_dir_all(tree.join(directory))?;
        }
        fs::write(tree.join("etc/os-release"), "ID=bench\n")?;
        let init = tree.join("usr/lib/systemd/systemd");
        fs::write(&init, "")?;
        fs::set_permissions(init, fs::Permissions::from_mode(0o755))?;
        let config = json!({ "image": tree, "boot": true, "user_namespacing": false });
        let spec = TaskSpec::new(&format!("t{number}"), config);
        Ok(Allocation::create(&self.join("alloc"), spec)?)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(self.join("state")) else {
            return;
        };
        for entry in entries.flatten() {
            let task_dir = TaskDir::new(entry.path());
            if let Ok(running) = task_dir.running() {
                cleanup::kill(running.started.supervisor);
            }
            let _ = cleanup::kill_and_release(&task_dir);
        }
    }
}

/// A running task, with the descriptors that keep its logs open.
#[derive(Debug)]
struct Task {
    id: String,
    handle: TaskHandle,
    supervisor: i32,
    _logs: dev_agent::Logs,
}

/// Starts tasks: some sequentially, [`AT_ONCE`] simultaneously, then the rest.
async fn starts(
    site: &Site,
    plugin: &Plugin,
    count: usize,
    report: &mut Report,
) -> anyhow::Result<Vec<Task>> {
    let at_once = AT_ONCE.min(count / 2);
    let mut tasks = Vec::new();
    let mut allocations = Vec::new();
    for number in 0..count {
        allocations.push(site.allocation(number)?);
    }
    let rest = allocations.split_off(2 * at_once);
    let second = allocations.split_off(at_once);
    let mut failed = 0;
    let mut took = Vec::new();
    for (some, together) in [(allocations, 1), (second, at_once), (rest, WIDTH)] {
        let number = some.len();
        let begun = Instant::now();
        let up = start(plugin, some, together).await?;
        took.push(begun.elapsed());
        failed += number - up.len();
        tasks.extend(up);
    }
    report.say(&format!(
        "{at_once} starts one after the other: {:.0} ms; at once: {:.0} ms, ratio {:.2}; {failed} of {count} starts failed",
        ms(took[0]),
        ms(took[1]),
        took[1].as_secs_f64() / took[0].as_secs_f64()
    ));
    report.judge("starts that fail", failed as f64, 0.0, 0.0);
    Ok(tasks)
}

/// Starts these tasks with this concurrency and returns those that came up.
async fn start(
    plugin: &Plugin,
    allocations: Vec<Allocation>,
    together: usize,
) -> anyhow::Result<Vec<Task>> {
    let mut configs = Vec::new();
    for allocation in &allocations {
        configs.push((
            plugin.task_config(allocation).await?,
            allocation.open_logs()?,
        ));
    }
    let gate = Arc::new(Semaphore::new(together));
    let mut under_way = JoinSet::new();
    for (config, logs) in configs {
        let (gate, mut client) = (gate.clone(), plugin.driver());
        under_way.spawn(async move {
            let _turn = gate.acquire().await;
            let id = config.id.clone();
            let request =
                nomad_driver_nspawn::proto::driver::StartTaskRequest { task: Some(config) };
            (id, client.start_task(request).await, logs)
        });
    }
    let mut tasks = Vec::new();
    for (id, answer, logs) in under_way.join_all().await {
        let handle = match answer {
            Ok(answer) => answer.into_inner().handle.context("no handle")?,
            Err(status) => {
                writeln!(std::io::stderr(), "{id}: {}", status.message())?;
                continue;
            }
        };
        let state: serde_json::Value = serde_json::from_slice(&handle.driver_state)?;
        let supervisor = state["started"]["supervisor"]["pid"].as_i64();
        tasks.push(Task {
            id,
            handle,
            supervisor: i32::try_from(supervisor.context("no pid")?)?,
            _logs: logs,
        });
    }
    Ok(tasks)
}

/// One WaitTask per task, as Nomad has.
fn waits(plugin: &Plugin, tasks: &[Task]) -> JoinSet<()> {
    let mut waits = JoinSet::new();
    for task in tasks {
        let mut client = plugin.driver();
        let task_id = task.id.clone();
        waits.spawn(async move {
            let request = nomad_driver_nspawn::proto::driver::WaitTaskRequest { task_id };
            let _ = client.wait_task(request).await;
        });
    }
    waits
}

/// Open streams of statistics.
#[derive(Debug)]
struct Statistics {
    /// The samples that have been received.
    samples: Arc<AtomicU64>,
    /// Whether memory is read from a memory controller.
    has_controller: bool,
    _streams: JoinSet<()>,
}

/// One TaskStats per task, with Nomad's interval.
async fn statistics(plugin: &Plugin, tasks: &[Task]) -> anyhow::Result<Statistics> {
    let samples = Arc::new(AtomicU64::new(0));
    let mut streams = JoinSet::new();
    let mut has_controller = true;
    for task in tasks {
        let request = TaskStatsRequest {
            task_id: task.id.clone(),
            collection_interval: Some(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            }),
        };
        let mut stream = plugin.driver().task_stats(request).await?.into_inner();
        let first = stream.message().await?.and_then(|first| first.stats);
        let usage = first.and_then(|stats| stats.agg_resource_usage?.memory);
        let field = memory_usage::Fields::Usage as i32;
        has_controller &= usage.is_some_and(|usage| usage.measured_fields.contains(&field));
        let samples = Arc::clone(&samples);
        streams.spawn(async move {
            while let Ok(Some(_)) = stream.message().await {
                samples.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    Ok(Statistics {
        samples,
        has_controller,
        _streams: streams,
    })
}

/// The plugin's processor time while all tasks are sampled every second.
async fn sampled(
    plugin: &Plugin,
    count: usize,
    stats: &Statistics,
    report: &mut Report,
) -> anyhow::Result<()> {
    let read = || stats.samples.load(Ordering::Relaxed);
    let (before, samples, begun) = (ticks(plugin.pid())?, read(), Instant::now());
    tokio::time::sleep(IDLE).await;
    let used = (ticks(plugin.pid())? - before) * 10;
    let percent = used as f64 / ms(begun.elapsed()) * 100.0;
    let source = match stats.has_controller {
        true => "memory from the memory controller",
        false => "no memory controller: the memory of the processes is added up",
    };
    report.say(&format!(
        "{count} tasks sampled every second, for {} s: {} samples, {used} ms of the plugin's processor time ({source})",
        IDLE.as_secs(),
        read() - samples
    ));
    let budget = SAMPLED * count as f64 / 1000.0;
    report.judge("statistics, % of a core", percent, budget, budget * NOISE);
    Ok(())
}

/// The usage of all processes while idle.
async fn idle(plugin: &Plugin, tasks: &[Task], report: &mut Report) -> anyhow::Result<()> {
    let count = tasks.len();
    held(plugin, count, "with a WaitTask each", report);
    let all = |of: fn(i32) -> anyhow::Result<u64>| -> anyhow::Result<u64> {
        tasks.iter().map(|task| of(task.supervisor)).sum()
    };
    let before = (all(ticks)?, all(switches)?, ticks(plugin.pid())?);
    tokio::time::sleep(IDLE).await;
    let after = (all(ticks)?, all(switches)?, ticks(plugin.pid())?);
    let used = after.0 - before.0;
    report.say(&format!(
        "{} idle seconds of {count} supervisors: {} ms of processor time, {} wake-ups; of the plugin: {} ms",
        IDLE.as_secs(),
        used * 10,
        after.1 - before.1,
        (after.2 - before.2) * 10
    ));
    // A timer tick may be charged to any of the measured processes.
    report.judge(
        "the supervisors' processor time together, ms",
        (used * 10) as f64,
        0.0,
        20.0,
    );
    let private = tasks.iter().map(|task| {
        kib(task.supervisor, "smaps_rollup", "Private_Dirty:")
            + kib(task.supervisor, "smaps_rollup", "Private_Clean:")
    });
    let private: f64 = private.sum();
    report.say(&format!(
        "a supervisor's private memory: {:.0} KiB on average",
        private / count as f64
    ));
    Ok(())
}

fn resident(pid: i32) -> String {
    format!(
        ": {:.1} MiB resident, {:.1} MiB of it anonymous, {} threads",
        kib(pid, "status", "VmRSS:") / 1024.0,
        kib(pid, "status", "RssAnon:") / 1024.0,
        kib(pid, "status", "Threads:")
    )
}

fn held(plugin: &Plugin, count: usize, how: &str, report: &mut Report) {
    let pid = plugin.pid();
    report.say(&format!(
        "plugin with {count} tasks, {how}{}",
        resident(pid)
    ));
    let budget = BASE + EACH * count as f64;
    report.judge("memory, KiB", kib(pid, "status", "VmRSS:"), budget, budget);
}

/// The same number of sequential calls that do nothing.
async fn floor(plugin: &Plugin, count: usize) -> anyhow::Result<Duration> {
    let mut client = plugin.driver();
    let begun = Instant::now();
    for _ in 0..count {
        client.capabilities(CapabilitiesRequest {}).await?;
    }
    Ok(begun.elapsed())
}

async fn recover(plugin: &Plugin, tasks: &[Task], together: usize) -> anyhow::Result<Duration> {
    let gate = Arc::new(Semaphore::new(together));
    let mut under_way = JoinSet::new();
    let begun = Instant::now();
    for task in tasks {
        let handle = task.handle.clone();
        if together == 1 {
            plugin.recover(handle).await?;
            continue;
        }
        let (gate, mut client) = (gate.clone(), plugin.driver());
        under_way.spawn(async move {
            let _turn = gate.acquire().await;
            let request = nomad_driver_nspawn::proto::driver::RecoverTaskRequest {
                task_id: String::new(),
                handle: Some(handle),
            };
            client.recover_task(request).await.map(drop)
        });
    }
    for answer in under_way.join_all().await {
        answer?;
    }
    Ok(begun.elapsed())
}

async fn destroy(plugin: &Plugin, tasks: &[Task], report: &mut Report) -> anyhow::Result<()> {
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let mut under_way = JoinSet::new();
    let begun = Instant::now();
    for task in tasks {
        let (gate, mut client) = (gate.clone(), plugin.driver());
        let task_id = task.id.clone();
        under_way.spawn(async move {
            let _turn = gate.acquire().await;
            let request = nomad_driver_nspawn::proto::driver::DestroyTaskRequest {
                task_id,
                force: true,
            };
            client.destroy_task(request).await.map(drop)
        });
    }
    let mut failed = 0;
    for answer in under_way.join_all().await {
        failed += usize::from(answer.is_err());
    }
    report.say(&format!(
        "{} tasks destroyed by force, {AT_ONCE} together: {:.0} ms, {failed} failed",
        tasks.len(),
        ms(begun.elapsed())
    ));
    ensure!(failed == 0, "tasks could not be destroyed");
    Ok(())
}
