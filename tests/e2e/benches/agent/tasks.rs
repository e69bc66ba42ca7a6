//! How long tasks take to start and to end, beside raw_exec, pair by pair: by the times of the events that the agent records. Both include
//! Nomad's log collector, a process that the agent starts for every task before the driver is called.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use e2e::agent::Agent;

use crate::{Report, job, median};

/// Pairs of tasks; the first ones warm the caches and are not counted.
const PAIRS: usize = 20;
const WARM_UP: usize = 2;
/// What the agent and the kernel still do after a start or an end must not count for what is measured next.
const PAUSE: Duration = Duration::from_millis(200);
/// The budget from `Task Setup` to `Started`: this many times raw_exec.
const START: f64 = 0.9;
/// The budget from the last line that the command prints to `Terminated`.
const END: f64 = 1.0;

/// Spans of one task, in milliseconds.
struct Spans {
    start: f64,
    end: f64,
}

pub(crate) fn measure(agent: &Agent, image: &str, report: &mut Report) -> anyhow::Result<()> {
    let (mut raw, mut ours) = (Vec::new(), Vec::new());
    for pair in 0..WARM_UP + PAIRS {
        let of_raw = task(agent, "raw-brief", &[])?;
        let of_ours = task(agent, "brief", &[("image", image)])?;
        if pair >= WARM_UP {
            raw.push(of_raw);
            ours.push(of_ours);
        }
    }
    for (what, budget, span) in [
        (
            "Task Setup to Started",
            START,
            (|one| one.start) as fn(&Spans) -> f64,
        ),
        ("the last line to Terminated", END, |one| one.end),
    ] {
        let of_raw = median(raw.iter().map(span).collect());
        let of_ours = median(ours.iter().map(span).collect());
        report.say(&format!(
            "{what}, median of {PAIRS}: raw_exec {of_raw:.1} ms, nspawn {of_ours:.1} ms"
        ));
        report.judge(what, of_ours / of_raw, budget);
    }
    Ok(())
}

/// Runs a task that prints its last line when it is told to.
fn task(agent: &Agent, name: &str, variables: &[(&str, &str)]) -> anyhow::Result<Spans> {
    std::thread::sleep(PAUSE);
    let task = agent.run(&job(name), variables);
    task.printed("up");
    task.running();
    std::thread::sleep(PAUSE);
    let go = task.dir().with_file_name("alloc").join("go");
    let told = SystemTime::now().duration_since(UNIX_EPOCH)?;
    fs::write(go, "go\n")?;
    let codes = task.dead();
    ensure!(codes == [3], "exit codes {codes:?}");
    let at = |kind: &str| -> anyhow::Result<Duration> {
        let event = task.event(kind).with_context(|| format!("no {kind}"))?;
        let time = event["Time"].as_u64();
        Ok(Duration::from_nanos(time.context("no time")?))
    };
    let ms = |span: Option<Duration>| span.map(|span| span.as_secs_f64() * 1000.0);
    let start = ms(at("Started")?.checked_sub(at("Task Setup")?));
    let end = ms(at("Terminated")?.checked_sub(told));
    Ok(Spans {
        start: start.context("started before it was set up")?,
        end: end.context("ended before it was told to")?,
    })
}
