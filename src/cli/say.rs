//! The one place that writes to the terminal. A terminal that is gone is nobody's error.

use std::io::{Write, stderr};

/// Writes a line to stderr.
pub(super) fn line(text: &str) {
    drop(writeln!(stderr().lock(), "{text}"));
}
