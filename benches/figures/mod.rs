//! What the benchmarks have in common: their arguments, their runtime, the tree of their containers, and figures of processes from /proc.
//! Measures nothing itself.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each benchmark uses some of the functions"
)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::runtime::{Builder, Runtime};

pub(crate) mod bare;

/// Runs a benchmark that starts real containers and returns whether its budgets are met; a missed one is a failure if `check` is set.
pub(crate) fn run(
    check: bool,
    met: impl Future<Output = anyhow::Result<bool>>,
) -> anyhow::Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark starts real containers and needs root"
    );
    let met = runtime()?.block_on(met)?;
    Ok(match met || !check {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The driver that is measured: `NOMAD_DRIVER_NSPAWN`, or the one that cargo has built with the benchmark.
#[expect(
    clippy::disallowed_methods,
    reason = "ci/bench passes the release build in the environment"
)]
pub(crate) fn driver() -> PathBuf {
    std::env::var_os("NOMAD_DRIVER_NSPAWN").map_or_else(
        || env!("CARGO_BIN_EXE_nomad-driver-nspawn").into(),
        Into::into,
    )
}

/// The runtime of every benchmark that calls the plugin.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

/// A directory in memory, as the default state directory is where a systemd is the host's init. Short, because paths of sockets are limited.
pub(crate) fn in_memory() -> anyhow::Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new()
        .prefix("nd-")
        .tempdir_in("/dev/shm")?)
}

/// Creates a small tree around busybox, with these commands.
pub(crate) fn make_tree(tree: &Path, applets: &[&str]) -> anyhow::Result<()> {
    for directory in ["bin", "sbin", "etc", "usr", "alloc", "local", "secrets"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|path| Path::new(path).exists());
    fs::copy(
        busybox.context("busybox is not installed (Debian: busybox-static)")?,
        tree.join("bin/busybox"),
    )?;
    for applet in applets {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    Ok(fs::write(tree.join("etc/os-release"), "ID=bench\n")?)
}

/// Whether `--check`, the only argument of some of the benchmarks, is among these.
pub(crate) fn is_check(words: impl Iterator<Item = String>) -> anyhow::Result<bool> {
    let mut check = false;
    for word in words {
        match word.as_str() {
            // Passed by cargo.
            "--bench" => {}
            "--check" => check = true,
            other => anyhow::bail!("{other:?} is not --check"),
        }
    }
    Ok(check)
}

/// In milliseconds.
pub(crate) fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
}

/// A field of a file of a process in `/proc` that is given in KiB.
pub(crate) fn kib(pid: i32, file: &str, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let value = text.lines().find_map(|line| {
        line.strip_prefix(field)?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    value.unwrap_or(f64::NAN)
}

/// How many times a process was scheduled: its wake-ups and preemptions.
pub(crate) fn switches(pid: i32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let all = text
        .lines()
        .filter(|line| line.contains("ctxt_switches"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(all.sum())
}

/// CPU time of a process with all its threads, user and system, in the kernel's ticks of 10 ms: fields 14 and 15 of its `stat`. The second
/// field is a name in parentheses that may contain anything.
pub(crate) fn ticks(pid: i32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = text.rsplit(')').next().unwrap_or_default();
    let fields = fields.split_ascii_whitespace().skip(11).take(2);
    Ok(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// A figure for people: with decimals if it is small.
fn short(figure: f64) -> String {
    let decimals = match figure {
        _ if figure.fract() == 0.0 => 0,
        small if small < 3.0 => 2,
        _ => usize::from(figure < 10.0),
    };
    format!("{figure:.decimals$}")
}

/// Prints figures and whether their budgets are met.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) met: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self { met: true }
    }
}

impl Report {
    pub(crate) fn say(&self, line: &str) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    /// Reports whether a budget was met. It counts as exceeded only beyond `limit`.
    pub(crate) fn judge(&mut self, what: &str, figure: f64, budget: f64, limit: f64) {
        let verdict = if figure <= budget {
            "met"
        } else if figure <= limit {
            "exceeded, but within the tolerated noise"
        } else {
            self.met = false;
            "NOT MET"
        };
        let noise = if limit > budget {
            format!(" ({} tolerated)", short(limit))
        } else {
            String::new()
        };
        self.say(&format!(
            "    budget of {what}: {}{noise}, is {}: {verdict}",
            short(budget),
            short(figure)
        ));
    }
}

/// The middle one, or the higher of the two in the middle.
pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}
