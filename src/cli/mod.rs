//! The lives of the binary that a person starts. Each subcommand is one file; this one only parses and passes on. The life as
//! a plugin is not here: `main` finds it by the cookie before anything is parsed.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

mod directory;
mod hcl;
mod job;
mod json;
mod run;
mod say;
mod signals;
mod tree;

pub use directory::remove_directories;
pub use run::BOUND_PLUGIN;

/// What a run gives when the task could not be run, as docker does: the task's own codes are all others.
const FAILED: u8 = 125;

/// Runs Nomad tasks in systemd-nspawn containers.
///
/// Nomad starts this program by itself: put it into the agent's plugin_dir. The commands below are for people.
#[derive(Debug, Parser)]
#[command(name = "nomad-driver-nspawn", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one task of a Nomad job file here and now, without Nomad.
    Run(run::Arguments),
}

/// Reads the arguments, the first of which is the program, and does what they say.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // The terminal may be gone; there is nobody to tell then.
            drop(error.print());
            return match error.use_stderr() {
                true => ExitCode::from(2),
                false => ExitCode::SUCCESS,
            };
        }
    };
    match cli.command {
        Some(Command::Run(arguments)) => run::main(&arguments),
        None => {
            let help = Cli::command().render_help();
            say::line(&format!(
                "this is a Nomad plugin: Nomad's agent starts it, with its cookie in the environment\n\n{help}"
            ));
            ExitCode::FAILURE
        }
    }
}
