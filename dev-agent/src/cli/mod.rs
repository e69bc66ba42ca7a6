//! The subcommands of the binary that a user starts. Each subcommand is one file; this one only parses the arguments
//! and dispatches. The plugin is not here: `main` recognizes it by the cookie before it parses anything.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches as _, Parser, Subcommand};

mod directory;
mod exec;
mod hcl;
mod job;
mod json;
mod read;
mod run;
mod say;
mod signals;
mod tree;
mod verdict;

pub use directory::remove_directories;
pub use exec::Exec;
pub use job::Job;
pub use run::BOUND_PLUGIN;
pub use tree::JobError;

/// The exit code when the task could not be run, as in docker: it differs from the codes that tasks use.
const FAILED: u8 = 125;

/// What the commands need to know about the driver that they are built into.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    /// The version that `--version` prints.
    pub version: &'static str,
    /// The longest path of its state directory, in bytes.
    pub max_state_dir: usize,
    /// How the error of an exit begins whose code and signal the driver did not see.
    pub unknown_end: &'static str,
    /// Runs a command in a task that runs already.
    pub exec: fn(Exec) -> ExitCode,
}

/// Runs Nomad tasks in systemd-nspawn containers.
///
/// Nomad's agent starts this program itself: put it into the agent's plugin_dir. The commands below are for interactive
/// use.
#[derive(Debug, Parser)]
#[command(name = "nomad-driver-nspawn")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one task of a Nomad job file directly, without Nomad.
    Run(run::Arguments),
    /// Run a command in a task that runs already, without Nomad.
    Exec(Exec),
}

/// Parses the arguments, the first of which is the program, and runs the subcommand.
pub fn main(args: impl IntoIterator<Item = OsString>, driver: Driver) -> ExitCode {
    let parsed = Cli::command()
        .version(driver.version)
        .try_get_matches_from(args)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Fails if the terminal is gone, and then there is no other place to report to.
            drop(error.print());
            return match error.use_stderr() {
                true => ExitCode::from(2),
                false => ExitCode::SUCCESS,
            };
        }
    };
    match cli.command {
        Some(Command::Run(arguments)) => run::main(&arguments, driver),
        Some(Command::Exec(arguments)) => (driver.exec)(arguments),
        None => {
            let help = Cli::command().render_help();
            say::line(&format!(
                "this is a Nomad plugin: Nomad's agent starts it, with its cookie in the environment\n\n{help}"
            ));
            ExitCode::FAILURE
        }
    }
}
