//! What a booted container prints, and what becomes of it; when a task is ready.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which entries of the journal of a booted container become lines of its logs, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The format of a line.
    pub format: JournalFormat,
    /// The units whose entries are written; empty for all entries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<String>,
}

/// A format of journalctl.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalFormat {
    /// Time, host name, program, process and message.
    #[default]
    Short,
    /// The message alone.
    Cat,
    /// All fields as an object.
    Json,
}

/// When a task counts as started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Readiness {
    /// When the container is up.
    #[default]
    Started,
    /// When the system or the command has said so, which may take this long from then on.
    Notify(Duration),
}

impl Readiness {
    /// How long it may take.
    pub fn limit(self) -> Duration {
        match self {
            Self::Started => Duration::ZERO,
            Self::Notify(limit) => limit,
        }
    }
}

/// What the supervisor of a booted container writes to the logs of the task itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemOutput {
    /// The journal; `None` if it is not followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<Journal>,
    /// Whether the supervisor reads the console of PID 1, instead of systemd-nspawn writing it to the log.
    #[serde(default)]
    pub console: bool,
}

impl SystemOutput {
    /// Whether it writes nothing.
    pub fn is_empty(&self) -> bool {
        self.journal.is_none() && !self.console
    }
}
