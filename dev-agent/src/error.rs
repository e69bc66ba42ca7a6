//! Errors between the host and a plugin.

use std::io;
use std::path::PathBuf;

use super::configure::ConfigureError;
use super::log::LogLine;

/// Why the host or the plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The plugin's program could not be started.
    #[error("can't start the plugin {binary}")]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The plugin's handshake does not follow the protocol.
    #[error("plugin handshake: {reason}{}", last_words(.stderr))]
    Handshake {
        /// What was wrong.
        reason: String,
        /// The last lines of its stderr.
        stderr: Vec<String>,
    },
    /// The plugin's socket can't be reached.
    #[error("can't connect to the plugin at {address}")]
    Connect {
        /// The socket.
        address: PathBuf,
        /// The cause.
        #[source]
        source: tonic::transport::Error,
    },
    /// An RPC returned an error.
    #[error("{method}: {} ({:?})", status.message(), status.code())]
    Call {
        /// The method.
        method: &'static str,
        /// The returned status.
        status: Box<tonic::Status>,
    },
    /// A response lacks a part that the protocol requires.
    #[error("{method}: the answer has no {what}")]
    Answer {
        /// The method.
        method: &'static str,
        /// The missing part.
        what: &'static str,
    },
    /// The driver does not accept tasks on this machine.
    #[error("the driver is {health}: {reason}")]
    Unhealthy {
        /// `undetected` or `unhealthy`.
        health: &'static str,
        /// The driver's own description.
        reason: String,
    },
    /// Something took longer than its time limit.
    #[error("{what} took longer than {} s", deadline.as_secs_f64())]
    Deadline {
        /// What the host was waiting for.
        what: &'static str,
        /// The time limit.
        deadline: std::time::Duration,
    },
    /// A stop was requested before the task was started.
    #[error("stopped before the task was started")]
    Stopped,
    /// The task's output could not be written, so the task was stopped.
    #[error("write the task's {stream}")]
    Output {
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A configuration does not fit the plugin's schema.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// A file or process operation of the host itself failed.
    #[error("{step} {path}")]
    Io {
        /// The operation, as a verb.
        step: &'static str,
        /// The path that it was applied to.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The task reserves more processors than there are.
    #[error("resources: {wanted} cores can't be reserved, because this machine has {has}")]
    Cores {
        /// The number of the job.
        wanted: u32,
        /// The number of this machine.
        has: usize,
    },
    /// The allocation directory can't be removed without deleting through a mount.
    #[error("{dir} is not removed: {mount} is still mounted")]
    Mounted {
        /// The directory.
        dir: PathBuf,
        /// The mount point below it.
        mount: PathBuf,
    },
}

impl HostError {
    pub(crate) fn call(method: &'static str) -> impl FnOnce(tonic::Status) -> Self {
        move |status| Self::Call {
            method,
            status: Box::new(status),
        }
    }

    pub(crate) fn io(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { step, path, source }
    }
}

fn last_words(lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let lines: Vec<_> = lines
        .iter()
        .map(|line| LogLine::parse(line).to_string())
        .collect();
    format!("; the last lines of its stderr: {}", lines.join(" | "))
}
