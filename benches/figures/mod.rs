//! Reads process figures from /proc and formats them for the benchmarks, and reads their arguments. Measures nothing itself.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each benchmark uses some of the functions"
)]

use std::fs;
use std::time::Duration;

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
