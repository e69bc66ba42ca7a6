//! Errors of the backend: which machine, which step, and the tool's own output. How they become gRPC errors is decided in
//! `driver`.

use std::path::PathBuf;

use crate::container::Cause;
use crate::exec::ExecError;

/// Why the backend could not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This host can't do what the job asks for; another attempt changes nothing.
    #[error("machine {machine}: {reason}")]
    Unsupported {
        /// The machine name.
        machine: String,
        /// Which option, and what it needs.
        reason: String,
    },
    /// The container did not come up.
    #[error("machine {machine}: {step} failed: {reason}")]
    Start {
        /// The machine name.
        machine: String,
        /// What was being done.
        step: &'static str,
        /// What happened, with the tool's exit status and output.
        reason: String,
        /// The kind of cause, which decides whether Nomad may try again.
        cause: Cause,
    },
    /// The container does not exist any more, and its exit status can't be known.
    #[error("machine {machine} is lost: {reason}")]
    Lost {
        /// The machine name.
        machine: String,
        /// How that was detected.
        reason: String,
    },
    /// The container still exists although it should be gone.
    #[error("machine {machine}: {reason}")]
    Stuck {
        /// The machine name.
        machine: String,
        /// What is left.
        reason: String,
    },
    /// A file of the driver's own could not be read or written.
    #[error("{step} {path}")]
    Io {
        /// What was being done, as a verb.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A further command could not be run in the container.
    #[error(transparent)]
    Exec(ExecError),
}

impl BackendError {
    /// The kind of cause of a failed start, which decides whether Nomad may try again.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Start { cause, .. } => *cause,
            Self::Io { .. } => Cause::Resources,
            Self::Stuck { .. } => Cause::Busy,
            Self::Unsupported { .. } | Self::Lost { .. } | Self::Exec(_) => Cause::Config,
        }
    }

    /// Whether another attempt may succeed without a change, so that Nomad may retry under the job's restart policy.
    pub fn is_transient(&self) -> bool {
        self.cause().is_recoverable()
    }
}

/// An error with all its causes in one line, outermost first, for logs and messages. No error's own text repeats that of its
/// source.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
