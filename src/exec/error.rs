//! Why a command could not be run in a container.

use std::io;

use nspawn_init::StartError;

/// Why a command could not be run in a container. The first line of each message says the essential in a few words: Nomad shows a user at
/// most 85 bytes of it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The request has no command.
    #[error("the command is empty")]
    EmptyCommand,
    /// The command itself can't be run, for a reason inside the container.
    #[error("{0}")]
    NotRun(StartError),
    /// The container has ended.
    #[error("the task is not running")]
    NotRunning,
    /// The seccomp filters of the task can't be read.
    #[error("the task's seccomp filters can't be read")]
    Filters(#[source] io::Error),
    /// A step on the host failed.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The session ended before the command ran.
    #[error("the session was killed before its command ran")]
    Lost,
}
