//! A stand-in for systemd-nspawn in the hermetic tests: it acts as it, without privileges, systemd or network, and keeps a ledger
//! of what it was asked. Never shipped.
//!
//! It is used through a link or a copy named as the tool. Beside that link lie `scenario.json` (what should go differently, see
//! [`scenario`]) and `ledger.jsonl` (what happened, see [`call_log`]); it has no environment variables of its own. What it refuses
//! and how it ends was measured on the real tools; `ci/compare-fake` measures again. What it can't be like the real one in
//! is listed in [`pid1`].

#![expect(
    clippy::disallowed_methods,
    reason = "a tool reads its environment and starts what it is told"
)]

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

mod call_log;
mod notify;
mod nspawn;
mod options;
mod pid1;
mod process;
mod rootfs;
mod scenario;
mod tree_lock;
mod values;

/// The exit status when the stand-in itself is at fault, for instance over a scenario that it can't read.
const OWN_FAULT: u8 = 70;

#[expect(clippy::print_stderr, reason = "there is nobody else to tell")]
fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    match run(&words) {
        // The kernel keeps the low eight bits, as of any process.
        Ok(status) => ExitCode::from(status.to_le_bytes()[0]),
        Err(error) => {
            eprintln!("fake-nspawn: {error:#}");
            ExitCode::from(OWN_FAULT)
        }
    }
}

fn run(words: &[OsString]) -> anyhow::Result<i32> {
    let called = Path::new(words.first().context("called without a name")?);
    let tool = called
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let directory = called.parent().unwrap_or_else(|| Path::new("."));
    let plan = || -> anyhow::Result<pid1::Plan> {
        let text = words
            .get(1)
            .and_then(|word| word.to_str())
            .context("a role without a plan")?;
        Ok(serde_json::from_str(text)?)
    };
    match tool {
        "systemd-nspawn" => nspawn::run(directory, words),
        pid1::PID1_NAME => pid1::run_pid1(plan()?),
        pid1::PAYLOAD_NAME => pid1::become_payload(&plan()?),
        pid1::GUARD_NAME => pid1::run_guard(&plan()?).map(|()| 0),
        other => anyhow::bail!("{other:?} is not systemd-nspawn"),
    }
}
