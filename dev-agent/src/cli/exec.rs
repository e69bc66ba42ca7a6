//! The arguments of `exec`. What it does is the driver's: it enters a container without a plugin.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::Args;

/// The arguments of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status: that of the command; 128 + n if signal n ended it; 127 if it does not exist, 126 if it can't be executed; 125 if the \
session could not be started or was lost; 2 for wrong arguments.

The command is as confined as the task, counts against its limits and ends with this program. Needs root and no agent.")]
pub struct Exec {
    /// The task: its allocation id or the beginning of it, ALLOCATION/TASK, or its machine name
    #[arg(value_name = "ID")]
    pub task: String,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, last = true)]
    pub command: Vec<String>,
    /// Run as this user of the container, as NAME, UID, NAME:GROUP or UID:GID; by default the task's
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// Run in this directory of the container; by default the task's
    #[arg(short, long, value_name = "PATH", value_parser = absolute)]
    pub directory: Option<String>,
    /// Set this variable; with NAME alone to the value that it has here, which other users of the host can't read
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub environment: Vec<(String, String)>,
    /// Give the command a terminal, or none; by default if standard input and output are one
    #[arg(short, long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tty: Option<bool>,
    /// The state directory of the plugin
    #[arg(long, value_name = "PATH", default_value = "/run/nomad-driver-nspawn")]
    pub state_dir: PathBuf,
    /// Run without seccomp filters if those of the task can't be read
    #[arg(long)]
    pub unfiltered: bool,
}

fn absolute(text: &str) -> Result<String, String> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err("expected an absolute path".to_owned()),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a variable that the user asks to pass on"
)]
fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    if name.is_empty() {
        return Err("expected NAME=VALUE or NAME".to_owned());
    }
    let own = || std::env::var(OsStr::new(name)).map_err(|_| format!("{name} is not set here"));
    Ok((name.to_owned(), value.map_or_else(own, Ok)?))
}
