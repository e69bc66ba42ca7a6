//! `leftovers DIR`: fails if anything on this machine still carries the mark of the run with this directory, or if the directory is not
//! empty. For `ci/e2e`, after all tests have ended.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let dir = std::env::args_os().nth(1).expect("a directory");
    let marks = e2e::leftovers::Marks::new(Path::new(&dir));
    marks.assert_none_left();
    let files = std::fs::read_dir(&dir).expect("the run's directory");
    let files: Vec<_> = files.flatten().map(|entry| entry.path()).collect();
    assert!(files.is_empty(), "left behind: {files:?}");
    ExitCode::SUCCESS
}
