//! What can go wrong between a wish and the host: on which machine, in which step, in the tool's own words. Decides nothing
//! about gRPC; `driver` does.

use std::path::PathBuf;

use crate::container::Cause;

/// Why the backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This host can't do what the job asks for; trying again changes nothing.
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
        /// What happened, with the tool's status and words.
        reason: String,
        /// Why, as far as that decides whether Nomad may try again.
        cause: Cause,
    },
    /// The container is not there any more and how it ended can't be known.
    #[error("machine {machine} is lost: {reason}")]
    Lost {
        /// The machine name.
        machine: String,
        /// How that was seen.
        reason: String,
    },
    /// The container is still there although it should be gone.
    #[error("machine {machine}: {reason}")]
    Stuck {
        /// The machine name.
        machine: String,
        /// What is still there.
        reason: String,
    },
    /// A file of the driver's own could not be read or written.
    #[error("{step} {path}")]
    Io {
        /// What was being done, as a verb.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl BackendError {
    /// Why a start failed, as far as that decides whether Nomad may try again.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Start { cause, .. } => *cause,
            Self::Io { .. } => Cause::Resources,
            Self::Stuck { .. } => Cause::Busy,
            Self::Unsupported { .. } | Self::Lost { .. } => Cause::Config,
        }
    }

    /// Whether another attempt may succeed with nothing changed, so that Nomad may retry under the job's restart policy.
    pub fn is_transient(&self) -> bool {
        self.cause().is_recoverable()
    }
}

/// An error with all its causes in one line, outermost first. For those who print: a message never repeats its source.
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
