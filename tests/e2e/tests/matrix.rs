//! The part of the fault matrix that runs on the real systemd-nspawn, more than a third. The cells, their expected results and the code
//! that runs them are shared with the hermetic matrix (`tests/matrix/`); this file provides the machine. Needs a debug build of the driver:
//! only a debug build can be held at a step.

use std::process::ExitCode;

use e2e::stage::Stage;

#[path = "../../matrix/mod.rs"]
mod suite;

use suite::{Moment, World};
use support::trap::Trap;

/// The number of concurrent worlds. A cell spends most of its time waiting for processes.
const AT_ONCE: usize = 3;

impl World for Stage {
    fn hold_nspawn(&self, moment: Moment) -> Trap {
        panic!("the real systemd-nspawn can't be held at {moment:?}");
    }

    fn init(&self, leader: i32) -> Option<i32> {
        Some(leader)
    }
}

/// A machine for one cell. Listing the cells needs neither root nor a driver, running them does.
fn machine() -> Stage {
    e2e::needs_root();
    let driver = e2e::driver();
    let program = std::fs::read(&driver).expect("the driver");
    assert!(
        program.windows(6).any(|bytes| bytes == b".pause"),
        "{} is no debug build and can't be held at a step",
        driver.display()
    );
    Stage::new()
}

fn main() -> ExitCode {
    let mut cells = suite::cells();
    let all = cells.len();
    cells.retain(|cell| cell.is_for_real());
    assert!(3 * cells.len() >= all, "{} of {all} cells", cells.len());
    suite::report(cells, AT_ONCE, machine)
}
