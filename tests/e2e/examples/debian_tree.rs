//! Prints the path of the Debian tree that the tests copy, and builds it if it is missing. For `ci/e2e-vm`, which puts it into the guest.

use std::io::{Result, Write, stdout};

fn main() -> Result<()> {
    writeln!(stdout(), "{}", e2e::debian::tree().display())
}
