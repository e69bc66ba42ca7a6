//! The only place that writes to the terminal. It is not an error if the terminal is gone.

use std::io::{Write, stderr};

/// Writes a line to stderr.
pub(super) fn line(text: &str) {
    drop(writeln!(stderr().lock(), "{text}"));
}
