//! The door: which of the binary's lives is this?

use std::process::ExitCode;

fn main() -> ExitCode {
    // The lives that a program starts, plugin and supervisor, are asked for first, by what their starters pass.
    nomad_driver_nspawn::cli::main(std::env::args_os())
}
