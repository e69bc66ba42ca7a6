//! What mounts add to a start: ten mapped binds in a user namespace, beside ten plain binds of systemd-nspawn by hand, in one run. And how fast a
//! mapped mount is read and written, beside one without a mapping. Needs root, systemd-nspawn and busybox (Debian: busybox-static).
//!
//! `--check` exits with status 1 if the budget is exceeded. On a busy machine the result means little.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::{Value, json};

mod figures;

use figures::bare::Bare;
use figures::{Report, driver, in_memory, is_check, make_tree, median, ms, run};

/// Rounds of starts; the first ones warm the caches and are not counted.
const ROUNDS: usize = 24;
const WARM_UP: usize = 3;
/// How many binds.
const BINDS: usize = 10;
/// The budget of ten mapped binds, in ms more than what ten plain ones add to a start by hand.
const MORE: f64 = 3.0;
/// The tolerance on a busy machine.
const NOISE: f64 = 5.0;
/// How often a file is read and written.
const COPIES: usize = 9;
/// The budget of reading and writing on a mapped mount, as a ratio to one without a mapping.
const THROUGHPUT: f64 = 1.03;
/// The tolerance on a busy machine.
const THROUGHPUT_NOISE: f64 = 1.15;
/// An upper bound for every step.
const LONG: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<ExitCode> {
    run(is_check(std::env::args().skip(1))?, compare())
}

/// Whether the budgets were met.
async fn compare() -> anyhow::Result<bool> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree, &["sh", "dd", "touch"])?;
    let volumes: Vec<PathBuf> = (0..BINDS)
        .map(|number| scratch.path().join(format!("volume-{number}")))
        .collect();
    for (number, volume) in volumes.iter().enumerate() {
        fs::create_dir(volume)?;
        fs::create_dir(tree.join(format!("v{number}")))?;
    }
    let memory = in_memory()?;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    plugin
        .configure(&json!({ "state_dir": memory.path().join("state") }))
        .await?;
    let site = Site {
        plugin,
        directory: memory.path().to_owned(),
        tree,
        volumes,
    };
    let mut report = Report::default();
    site.starts(scratch.path(), &mut report).await?;
    site.throughput(&mut report).await?;
    site.plugin.shutdown().await;
    Ok(report.met)
}

/// A plugin, its directory, and what its tasks mount.
struct Site {
    plugin: Plugin,
    directory: PathBuf,
    tree: PathBuf,
    volumes: Vec<PathBuf>,
}

impl Site {
    async fn starts(&self, scratch: &Path, report: &mut Report) -> anyhow::Result<()> {
        let [mut bare, mut bare_ten, mut driven, mut driven_ten] = [const { Vec::new() }; 4];
        for round in 0..WARM_UP + ROUNDS {
            let figures = [
                self.by_hand(scratch, 0)?,
                self.by_hand(scratch, BINDS)?,
                self.driven(0).await?,
                self.driven(BINDS).await?,
            ];
            if round >= WARM_UP {
                let series = [&mut bare, &mut bare_ten, &mut driven, &mut driven_ten];
                for (series, figure) in series.into_iter().zip(figures) {
                    series.push(ms(figure));
                }
            }
        }
        let more = |with: &[f64], without: &[f64]| {
            median(with.iter().zip(without).map(|(a, b)| a - b).collect())
        };
        let (by_hand, through) = (more(&bare_ten, &bare), more(&driven_ten, &driven));
        report.say(&format!(
            "{ROUNDS} rounds, medians in ms\n\
             a start by hand without filters, and with {BINDS} binds {:.1}  {:.1}\n\
             StartTask, without and with {BINDS} mapped binds        {:.1}  {:.1}\n\
             what {BINDS} binds add, by hand and mapped              {by_hand:+.1}  {through:+.1}",
            median(bare),
            median(bare_ten),
            median(driven),
            median(driven_ten)
        ));
        let what = "ten mapped binds, ms more than ten plain ones by hand";
        report.judge(what, through - by_hand, MORE, NOISE);
        Ok(())
    }

    /// systemd-nspawn by hand, with this many binds.
    fn by_hand(&self, scratch: &Path, count: usize) -> anyhow::Result<Duration> {
        std::thread::sleep(Duration::from_millis(50));
        let alloc = scratch.join("bare");
        fs::create_dir_all(&alloc)?;
        let binds: Vec<String> = self
            .binds(count)
            .map(|(source, target)| format!("--bind={}:{target}", source.display()))
            .collect();
        let binds: Vec<&str> = binds.iter().map(String::as_str).collect();
        let bare = Bare::prepare(scratch, "bench-volumes")?.without_filters();
        let begun = Instant::now();
        let mut child = bare.spawn_with(&binds, &self.tree, &alloc, "exit 0")?;
        let leader = bare.leader()?;
        let up = begun.elapsed();
        if let Ok(held) = ProcessHandle::open(leader) {
            ensure!(held.wait(LONG), "the payload does not exit");
        }
        child.wait()?;
        bare.remove()?;
        Ok(up)
    }

    /// StartTask in a user namespace, with this many binds.
    async fn driven(&self, count: usize) -> anyhow::Result<Duration> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.task(count, json!({}), "exit 0").await
    }

    /// Runs a task with this many binds to its end. Returns how long StartTask took.
    async fn task(&self, count: usize, more: Value, script: &str) -> anyhow::Result<Duration> {
        let binds: Value = self
            .binds(count)
            .map(|(source, target)| (source.display().to_string(), json!(target)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let mut config = json!({
            "image": self.tree, "boot": false, "bind": [binds], "command": ["/bin/sh", "-c", script],
        });
        let options = more.as_object().cloned().unwrap_or_default();
        config.as_object_mut().context("an object")?.extend(options);
        let allocation = Allocation::create(&self.directory, TaskSpec::new("bench", config))?;
        let _logs = allocation.open_logs()?;
        let task = self.plugin.task_config(&allocation).await?;
        let id = task.id.clone();
        let begun = Instant::now();
        self.plugin.start(task).await?;
        let up = begun.elapsed();
        let exit = self.plugin.wait(&id).await?;
        ensure!(exit.code == 0, "the task has failed: {exit:?}");
        self.plugin.destroy(&id, true).await?;
        allocation.remove()?;
        Ok(up)
    }

    fn binds(&self, count: usize) -> impl Iterator<Item = (&PathBuf, String)> {
        let volumes = self.volumes.iter().take(count).enumerate();
        volumes.map(|(number, volume)| (volume, format!("/v{number}")))
    }

    /// Copies a file of 64 MiB on a volume, which stays in the page cache.
    async fn throughput(&self, report: &mut Report) -> anyhow::Result<()> {
        const SCRIPT: &str = "cd /v0; dd if=/dev/zero of=from bs=1M count=64 2> /dev/null; \
            touch begun; for i in 1 2 3 4; do dd if=from of=to bs=64k 2> /dev/null; done; touch ended";
        let [mut plain, mut mapped] = [const { Vec::new() }; 2];
        for _ in 0..COPIES {
            for (users, series) in [(false, &mut plain), (true, &mut mapped)] {
                let more = json!({ "user_namespacing": users });
                self.task(1, more, SCRIPT).await?;
                let [begun, ended] = ["begun", "ended"].map(|name| self.volumes[0].join(name));
                let span = ended
                    .metadata()?
                    .modified()?
                    .duration_since(begun.metadata()?.modified()?)?;
                series.push(ms(span));
            }
        }
        let ratio = mapped.iter().zip(&plain).map(|(a, b)| a / b).collect();
        let ratio = median(ratio);
        report.say(&format!(
            "copying 256 MiB on a volume, plain and mapped         {:.0}  {:.0}",
            median(plain),
            median(mapped)
        ));
        let what = "copying on a mapped volume, ratio to a plain one";
        report.judge(what, ratio, THROUGHPUT, THROUGHPUT_NOISE);
        Ok(())
    }
}
