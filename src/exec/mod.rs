//! Runs further commands in a container that is up: `nomad alloc exec`, script checks, scripts of templates, and the `exec` command for
//! people. A session is as confined as the task itself. Its processes are started by the container init's program in another mode
//! (`nspawn_init::session_spec`), never by the supervisor, so a session works in containers that an earlier driver started and ends with
//! the plugin. Decides nothing about Nomad's messages.

use std::collections::BTreeMap;

pub use nspawn_init::session_spec::TerminalSize;

pub mod command_line;
mod error;
mod filters;
mod groups;
mod leader;
mod session;
mod start;
mod terminal;

pub use error::ExecError;
pub use filters::FilterCache;
pub use groups::kill_sessions;
pub use session::{Control, End, Ended, Session, Streams};
pub use start::{Host, start};
pub use terminal::Terminal;

/// A command to run in a container.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The command and its arguments, at least one element.
    pub command: Vec<String>,
    /// The size of its terminal at the start; `None`: no terminal, but three pipes.
    pub terminal: Option<TerminalSize>,
    /// `NAME`, `UID`, or one of them and `:GROUP` or `:GID`; `None`: the task's.
    pub user: Option<String>,
    /// Absolute directory inside the container; `None`: the task's.
    pub directory: Option<String>,
    /// Variables that override the task's. Values are secrets.
    pub environment: BTreeMap<String, String>,
}

/// Leaves out the values of variables.
impl std::fmt::Debug for ExecRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecRequest")
            .field("command", &self.command)
            .field("terminal", &self.terminal)
            .field("user", &self.user)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}
