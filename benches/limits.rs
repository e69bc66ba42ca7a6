//! What limits add to a start: the cgroups of a start with their limits and device policy, and moving a process into them, beside one
//! cgroup without limits, pair by pair in one run. Starts no container. Needs root.
//!
//! `--check` exits with status 1 if the budget is exceeded. On a busy machine the result means little.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nomad_driver_nspawn::cgroup::{CgroupPlan, DeviceRules, Group, Layout, Place};
use nomad_driver_nspawn::container::{Cpu, CpuQuota, Memory, Resources, Swap};

mod figures;

use figures::{is_check, median, ms};

/// Pairs of measurements; the first ones warm the caches and are not counted.
const PAIRS: usize = 24;
const WARM_UP: usize = 5;
/// An upper bound for emptying a cgroup.
const LONG: Duration = Duration::from_secs(10);
/// The budget for all limits of one start, in milliseconds.
const LIMITS: f64 = 1.0;
/// The tolerance on a busy machine.
const NOISE: f64 = 1.5;

fn main() -> anyhow::Result<ExitCode> {
    let check = is_check(std::env::args().skip(1))?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark makes cgroups and needs root"
    );
    let met = compare()?;
    Ok(if met || !check {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Whether the budget was met.
fn compare() -> anyhow::Result<bool> {
    let layout = Layout::of_this_host();
    let place = layout.place(None, "bench-limits").context("no cgroups")?;
    let (plan, unenforced) =
        CgroupPlan::new(&layout, &place, &every_limit(), &DeviceRules::default());
    let process = Process::start()?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for pair in 0..WARM_UP + PAIRS {
        let plain = one_cgroup(&place, &process)?;
        let limited = all_limits(&place, &plan, &process)?;
        if pair >= WARM_UP {
            without.push(ms(plain));
            with.push(ms(limited));
        }
    }
    let more = median(without.iter().zip(&with).map(|(a, b)| b - a).collect());
    let met = more <= LIMITS * NOISE;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "one cgroup, and a process moved into it: {:.2} ms; {} cgroups with all limits: {:.2} ms (medians of {PAIRS} pairs); not on this host: {}",
        median(without),
        plan.joined().len() + 1,
        median(with),
        unenforced.len()
    )?;
    let verdict = match more {
        more if more <= LIMITS => "met",
        _ if met => "exceeded, but within the tolerated noise",
        _ => "NOT MET",
    };
    writeln!(
        out,
        "    budget of the limits of a start, ms: {LIMITS:.1} ({:.1} tolerated), is {more:.2}: {verdict}",
        LIMITS * NOISE
    )?;
    Ok(met)
}

/// A value for every limit that has a file.
fn every_limit() -> Resources {
    let cpu = Cpu {
        shares: Some(500),
        quota: Some(CpuQuota {
            quota: 50_000,
            period: 100_000,
        }),
        cores: None,
    };
    Resources {
        memory: Memory {
            hard: Some(512 << 20),
            reserved: Some(256 << 20),
            swap: Swap::Limit(0),
        },
        cpu,
        pids: Some(1000),
        ..Resources::default()
    }
}

fn one_cgroup(place: &Place, process: &Process) -> anyhow::Result<Duration> {
    let group = &place.tracking.group;
    process.awaken(group)?;
    let begun = Instant::now();
    Group::new(group).create()?;
    process.join(group)?;
    let took = begun.elapsed();
    process.leave(group)?;
    Ok(took)
}

fn all_limits(place: &Place, plan: &CgroupPlan, process: &Process) -> anyhow::Result<Duration> {
    let group = &place.tracking.group;
    process.awaken(group)?;
    let begun = Instant::now();
    let mut refused = plan.create(group)?;
    process.join(group)?;
    for group in plan.joined() {
        process.join(group)?;
    }
    refused.extend(plan.settle());
    let took = begun.elapsed();
    for group in plan.joined().into_iter().chain([group]) {
        process.leave(group)?;
    }
    // Without a container there is no cgroup of the payload in which some are repeated.
    let payload = place.payload();
    let reason = refused
        .iter()
        .find(|one| !one.reason.contains(&*payload.to_string_lossy()));
    ensure!(reason.is_none(), "a limit is refused: {reason:?}");
    Ok(took)
}

/// A process that does nothing, to be moved.
#[derive(Debug)]
struct Process(Child);

impl Process {
    #[expect(clippy::disallowed_methods, reason = "a process to move")]
    fn start() -> anyhow::Result<Self> {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    fn join(&self, group: &Path) -> anyhow::Result<()> {
        let file = group.join("cgroup.procs");
        fs::write(&file, self.0.id().to_string()).with_context(|| file.display().to_string())
    }

    /// Makes the kernel take the lock that it needs to move processes: on an idle host the first one waits milliseconds for it, whatever is
    /// measured.
    fn awaken(&self, group: &Path) -> anyhow::Result<()> {
        self.join(&top(group))
    }

    /// Leaves a cgroup for the top of its hierarchy and removes it.
    fn leave(&self, group: &Path) -> anyhow::Result<()> {
        self.join(&top(group))?;
        let group = Group::new(group);
        group.wait_empty(LONG);
        Ok(group.remove()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The top of the hierarchy of a cgroup in the driver's subtree.
fn top(group: &Path) -> PathBuf {
    group.ancestors().nth(2).unwrap_or(group).to_owned()
}
