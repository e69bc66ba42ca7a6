//! A fake systemd-nspawn for the hermetic tests: it behaves like the real one without privileges, systemd or network, and logs its calls.
//! Never shipped.
//!
//! Tests use it through a link or a copy that has the tool's name. Beside that link are `scenario.json` (what should go differently, see
//! [`scenario`]) and `ledger.jsonl` (what happened, see [`call_log`]); the fake has no environment variables of its own. Its refusals and
//! exit statuses were measured on the real tools; `ci/compare-fake` measures again. [`pid1`] lists the known differences from the real one.

#![expect(
    clippy::disallowed_methods,
    reason = "systemd-nspawn reads its environment and starts programs"
)]

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

mod call_log;
mod credentials;
mod notify;
mod nspawn;
mod options;
mod pid1;
mod process;
mod rootfs;
mod scenario;
mod tree_lock;
mod values;

/// The exit status for errors of the fake itself, for example a scenario that it can't read.
const OWN_FAULT: u8 = 70;

#[expect(clippy::print_stderr, reason = "errors of the fake go to stderr")]
fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    match run(&words) {
        // The kernel keeps the low eight bits, as for any process.
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
