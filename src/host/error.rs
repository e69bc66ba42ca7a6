//! What can go wrong between the host and a plugin.

use std::io;
use std::path::PathBuf;

use super::configure::ConfigureError;
use super::log::LogLine;

/// Why the host could not do its part, or the plugin did not do its own.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The plugin's program did not start.
    #[error("can't start the plugin {binary}")]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The plugin did not introduce itself as the protocol wants.
    #[error("handshake of the plugin: {reason}{}", last_words(.stderr))]
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
        /// Why not.
        #[source]
        source: tonic::transport::Error,
    },
    /// A call was answered with an error.
    #[error("{method}: {} ({:?})", status.message(), status.code())]
    Call {
        /// The method.
        method: &'static str,
        /// The answer.
        status: Box<tonic::Status>,
    },
    /// An answer lacks what the protocol demands.
    #[error("{method}: the answer has no {what}")]
    Answer {
        /// The method.
        method: &'static str,
        /// The missing part.
        what: &'static str,
    },
    /// The driver does not take tasks on this machine.
    #[error("the driver is {health}: {reason}")]
    Unhealthy {
        /// `undetected` or `unhealthy`.
        health: &'static str,
        /// The driver's own words.
        reason: String,
    },
    /// Something did not happen in its time.
    #[error("{what} took longer than {} s", deadline.as_secs_f64())]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        deadline: std::time::Duration,
    },
    /// The run was asked to stop before the task was started.
    #[error("stopped before the task was started")]
    Stopped,
    /// The task's output could not be written, so the task was stopped.
    #[error("write the task's {stream}")]
    Output {
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A configuration does not fit the plugin's schema.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// A file or process operation of the host's own failed.
    #[error("{step} {path}")]
    Io {
        /// What was being done, as a verb.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
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
    format!("; its last words: {}", lines.join(" | "))
}
