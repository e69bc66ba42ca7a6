//! The scenario file beside the link: what differs in a test from a plain, healthy host. Without the file the host is healthy;
//! an unknown key in it is an error and never ignored. Holds data only and acts on nothing.
//!
//! ```json
//! {
//!   "version": 257,
//!   "legacy_cgroups": false,
//!   "calls": [{ "refuse": { "status": 1, "stderr": "Failed to fork: out of luck" } }, { "exit_status": 7 }]
//! }
//! ```

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Scenario {
    /// The systemd version to simulate, 244 to 262. Options that it lacks are refused.
    pub(crate) version: u32,
    /// `--version` never returns.
    pub(crate) version_hangs: bool,
    /// The host has cgroup v1 or both: 258 and later refuse to run.
    pub(crate) legacy_cgroups: bool,
    /// The host has udev, which images need up to 257.
    pub(crate) udev: bool,
    /// The host has a system bus, which is required unless `--keep-unit --register=no` is given.
    pub(crate) bus: bool,
    /// What each start does: the first start takes the first entry and so on; the last entry serves all further starts. `--version` and
    /// `--help` are not starts.
    pub(crate) calls: Vec<Call>,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            version: 252,
            version_hangs: false,
            legacy_cgroups: false,
            udev: true,
            bus: false,
            calls: Vec::new(),
        }
    }
}

/// What one start does. Without any field it is a healthy start.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Call {
    /// Exits immediately, after the arguments have been accepted and before anything is started.
    pub(crate) refuse: Option<Refuse>,
    /// Milliseconds before the container is started and announced. TERM and INT end the wait.
    pub(crate) delay_before_notify_ms: u64,
    /// Milliseconds between the container's end and the exit of nspawn.
    pub(crate) delay_before_exit_ms: u64,
    /// Starts the container but never sends the ready notification.
    pub(crate) never_notify: bool,
    /// nspawn dies by this signal number before the container is started.
    pub(crate) die_before_notify: Option<i32>,
    /// Waits between the start of the container and its ready notification, until the listener on this socket closes the connection: see
    /// [`crate::notify::hold`].
    pub(crate) pause_before_notify: Option<PathBuf>,
    /// The same between the container's end and the exit of nspawn.
    pub(crate) pause_before_exit: Option<PathBuf>,
    /// Until the listener on this socket closes the connection, signals to the leader are lost, as they are for a PID 1 that has no handlers yet.
    /// With `--boot`.
    pub(crate) pause_before_signals: Option<PathBuf>,
    /// nspawn's exit status, whatever the container's was.
    pub(crate) exit_status: Option<i32>,
    /// Signal numbers that the leader never forwards to the payload, handler or not.
    pub(crate) ignore_signals: Vec<i32>,
    /// What the payload (with `--boot`: the init) does instead of its work.
    pub(crate) instead: Option<Instead>,
}

/// A failure to start.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Refuse {
    /// The exit status.
    pub(crate) status: i32,
    /// One line or more on stderr.
    pub(crate) stderr: String,
}

/// In place of the command: `{"sleep": true}`, `{"exit": 3}` or `{"signal": 11}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Instead {
    /// `true`: does nothing, has no signal handlers, runs until it is killed. `false`: runs the command after all.
    Sleep(bool),
    /// Exits with this status.
    Exit(i32),
    /// Dies by this signal.
    Signal(i32),
}

impl Scenario {
    /// Reads `scenario.json` in this directory.
    pub(crate) fn beside(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join("scenario.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// The entry for the start with this number, counted from 0.
    pub(crate) fn call(&self, number: usize) -> Call {
        let entry = self.calls.get(number).or_else(|| self.calls.last());
        entry.cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_call_is_used_for_all_further_ones() {
        let scenario: Scenario =
            serde_json::from_str(r#"{"calls": [{"exit_status": 1}, {"exit_status": 2}]}"#).unwrap();
        let seen: Vec<_> = (0..4).map(|n| scenario.call(n).exit_status).collect();
        assert_eq!(seen, [Some(1), Some(2), Some(2), Some(2)]);
        assert_eq!(Scenario::default().call(3).exit_status, None);
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        assert!(serde_json::from_str::<Scenario>(r#"{"verison": 257}"#).is_err());
        assert!(serde_json::from_str::<Scenario>(r#"{"calls": [{"exit": 1}]}"#).is_err());
    }
}
