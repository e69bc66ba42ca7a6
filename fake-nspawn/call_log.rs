//! The call log beside the link: one JSON line per event. Each line is written by a single append, so readers never see half a line and
//! writers need no lock. Counts starts, in the file `starts` beside it; interprets nothing else.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

/// The open call log.
#[derive(Debug)]
pub(crate) struct CallLog {
    path: PathBuf,
    file: File,
}

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// A tool was called. Written before anything is checked.
    Call(Box<Call>),
    /// The container was started.
    Started { leader: i32 },
    /// A signal arrived.
    Signal { role: Role, signal: i32 },
    /// The tool is about to exit.
    Exit { status: i32 },
}

/// The process that got a signal.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Nspawn,
    Leader,
}

/// How a tool was called.
#[derive(Debug, Serialize)]
pub(crate) struct Call {
    tool: String,
    /// Counts the starts of systemd-nspawn from 0; `null` for every call that starts nothing.
    number: Option<usize>,
    argv: Vec<String>,
    environment: BTreeMap<String, String>,
    cwd: String,
    /// Descriptor number to its target in `/proc/self/fd`. Without the call log's own descriptor.
    descriptors: BTreeMap<i32, String>,
    /// The content of `/proc/self/cgroup`.
    cgroup: String,
    pid: u32,
    oom_score_adj: i32,
    /// `SigBlk` as hexadecimal digits.
    signal_mask: String,
    /// `SigIgn` as hexadecimal digits without SIGPIPE: Rust's runtime ignores that one before `main`.
    ignored: String,
}

impl CallLog {
    /// Opens the call log in this directory, creates it if it is missing.
    pub(crate) fn beside(directory: &Path) -> anyhow::Result<Self> {
        Self::open(&directory.join("ledger.jsonl"))
    }

    /// Opens this call log.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one event.
    pub(crate) fn write(&mut self, event: &Event) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .with_context(|| self.path.display().to_string())
    }

    /// Appends a call and returns its number among the starts.
    pub(crate) fn call(
        &mut self,
        argv: &[OsString],
        tool: &str,
        starts: bool,
    ) -> anyhow::Result<usize> {
        // Concurrent starts must not get the same number.
        let _turn =
            Flock::lock(File::open(&self.path)?, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        // One byte for each start so far, because reading the whole call log takes long after some hundred starts.
        let mut counted = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path.with_file_name("starts"))?;
        let number = usize::try_from(counted.metadata()?.len())?;
        if starts {
            counted.write_all(b"\n")?;
        }
        // Before the descriptors are listed.
        drop(counted);
        let call = Call::observe(argv, tool, starts.then_some(number))?;
        self.write(&Event::Call(Box::new(call)))?;
        Ok(number)
    }
}

impl Call {
    fn observe(argv: &[OsString], tool: &str, number: Option<usize>) -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let ignored = proc_files::signal_mask(&status, "SigIgn").context("no SigIgn")?;
        Ok(Self {
            tool: tool.to_owned(),
            number,
            argv: argv
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect(),
            environment: std::env::vars_os()
                .map(|(name, value)| {
                    (
                        name.to_string_lossy().into_owned(),
                        value.to_string_lossy().into_owned(),
                    )
                })
                .collect(),
            cwd: std::env::current_dir()?.display().to_string(),
            descriptors: descriptors()?,
            cgroup: fs::read_to_string("/proc/self/cgroup")?,
            pid: std::process::id(),
            oom_score_adj: fs::read_to_string("/proc/self/oom_score_adj")?
                .trim()
                .parse()?,
            signal_mask: proc_files::status_field(&status, "SigBlk")
                .unwrap_or_default()
                .to_owned(),
            ignored: format!("{:016x}", ignored & !(1 << 12)),
        })
    }
}

fn descriptors() -> anyhow::Result<BTreeMap<i32, String>> {
    let mut found = BTreeMap::new();
    for number in crate::process::open_descriptors()? {
        let Ok(target) = fs::read_link(format!("/proc/self/fd/{number}")) else {
            continue;
        };
        if target.file_name().is_none_or(|name| name != "ledger.jsonl") {
            found.insert(number, target.display().to_string());
        }
    }
    Ok(found)
}
