//! The driver beside Nomad's own driver raw_exec, on one agent in one run: how long a task takes to start and to end, and commands in a running
//! task. Needs root and a Nomad agent.
//!
//! `--check` exits with status 1 if a budget is exceeded. On a busy machine the result means little.

mod commands;
mod tasks;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use e2e::agent::Agent;

fn main() -> anyhow::Result<ExitCode> {
    let mut check = false;
    for word in std::env::args().skip(1) {
        match &*word {
            // Passed by cargo.
            "--bench" => {}
            "--check" => check = true,
            other => bail!("{other:?} is not --check"),
        }
    }
    let agent = Agent::beside_raw_exec();
    let mut report = Report { met: true };
    let measured = measure(&agent, &mut report);
    if let Err(error) = &measured {
        writeln!(std::io::stderr(), "{error:#}")?;
    }
    agent.leave();
    measured?;
    Ok(match report.met || !check {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn measure(agent: &Agent, report: &mut Report) -> anyhow::Result<()> {
    let tree = agent.join("tree");
    fs::create_dir(&tree)?;
    e2e::busybox_tree(&tree);
    let image = tree.display().to_string();
    tasks::measure(agent, &image, report)?;
    commands::measure(agent, &image, report)
}

fn job(name: &str) -> PathBuf {
    let jobs = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs");
    jobs.join(format!("{name}.nomad.hcl"))
}

/// Prints figures and whether their budgets are met.
struct Report {
    met: bool,
}

impl Report {
    fn say(&self, line: &str) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    /// A budget as a ratio to raw_exec.
    fn judge(&mut self, what: &str, ratio: f64, budget: f64) {
        let met = ratio <= budget;
        self.met &= met;
        let verdict = if met { "met" } else { "NOT MET" };
        self.say(&format!(
            "    budget of {what}, ratio to raw_exec: {budget}, is {ratio:.2}: {verdict}"
        ));
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
