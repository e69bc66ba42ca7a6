//! The interface of an exec session: a command that is run in a container that is already up. The plugin starts this program with
//! [`SESSION`] as its argument and the channel as its stdin. The first packet on the channel is an [`Order`]; then the program sends
//! [`SessionEvent`]s. Closing the channel ends the session with everything that it has started.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Filter, StartError};

/// The argument that selects an exec session.
pub const SESSION: &str = "session";

/// The first packet. Its descriptors: the [`SessionSpec`] as a file that is read from offset 0, a pidfd of the container's first process,
/// and without a terminal the command's stdin, stdout and stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Three streams come with the packet.
    Pipes,
    /// The command gets a terminal of the container.
    Terminal,
}

/// What is run, and how it is confined. Contains secrets, so it is passed by descriptor only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSpec {
    /// The command and its arguments, at least one element.
    pub command: Vec<String>,
    /// The complete environment, except that `HOME`, `USER`, `LOGNAME` and `SHELL` are those of the user where they are missing.
    /// Values are secrets.
    pub environment: BTreeMap<String, String>,
    /// Absolute working directory, as a path inside the container.
    pub directory: String,
    /// `NAME`, `UID`, or one of them and `:GROUP` or `:GID`, from the user database of the container; `None` is root.
    pub user: Option<String>,
    /// The size of the terminal when the command starts.
    pub size: TerminalSize,
    /// The cgroups of the session.
    pub cgroups: SessionCgroups,
    /// What the command has in common with the container's first process.
    pub confinement: Confinement,
}

/// Leaves out the values of variables.
impl std::fmt::Debug for SessionSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionSpec")
            .field("command", &self.command)
            .field("directory", &self.directory)
            .field("user", &self.user)
            .field("size", &self.size)
            .field("cgroups", &self.cgroups)
            .finish_non_exhaustive()
    }
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// That of a terminal whose size nobody knows.
impl Default for TerminalSize {
    fn default() -> Self {
        Self {
            rows: 24,
            columns: 80,
        }
    }
}

/// The cgroups of a session, as paths on the host. All of them exist.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionCgroups {
    /// In cgroup v2: the cgroup that the command is created in. Nothing else is in it.
    pub unified: Option<PathBuf>,
    /// In cgroup v1: those that the command joins.
    pub joined: Vec<PathBuf>,
    /// Those of the above that are the session's own: what is left in them is killed, and they are removed, when it ends.
    pub own: Vec<PathBuf>,
}

/// What a process of the container is restricted by.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The namespaces to join, as `CLONE_NEW…` flags: those that differ from the plugin's.
    pub namespaces: u32,
    /// Capabilities that can be gained at all, one bit for each.
    pub bounding: u64,
    /// Capabilities that are kept when a program is executed that may have them.
    pub inheritable: u64,
    /// Capabilities that are kept when any program is executed.
    pub ambient: u64,
    /// Whether programs gain no privileges when they are executed.
    pub no_new_privileges: bool,
    /// seccomp programs, in the order in which they are installed.
    pub filters: Vec<Filter>,
    /// Resource limits by number (`RLIMIT_…`): soft and hard; `None` is unlimited.
    pub limits: Vec<(u32, Option<u64>, Option<u64>)>,
    /// The badness adjustment.
    pub oom_score_adj: i32,
}

impl std::fmt::Debug for Confinement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Confinement")
            .field("namespaces", &format_args!("{:#x}", self.namespaces))
            .field("bounding", &format_args!("{:#x}", self.bounding))
            .field("filters", &self.filters.len())
            .finish_non_exhaustive()
    }
}

/// What an exec session reports, in this order. `Failed` takes the place of every later event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionEvent {
    /// Only with a terminal: the terminal is open. One descriptor comes with it, that of the master side.
    Terminal,
    /// The command runs.
    Running,
    /// The command does not run.
    Failed(StartError),
    /// The command has exited with this raw wait status. Processes that it has started may still run.
    Ended {
        /// As returned by `wait(2)`.
        status: i32,
    },
}
