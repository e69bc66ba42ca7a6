//! The door: which of the binary's lives is this?

use std::path::Path;
use std::process::ExitCode;

use nomad_driver_nspawn::supervisor;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    match words.as_slice() {
        ["supervise", directory] => supervisor::run::supervise(Path::new(directory)),
        ["enter", directory] => supervisor::enter::enter(Path::new(directory)),
        _ => ExitCode::FAILURE,
    }
}
