//! The fault matrix on the fake: every cell is a test, which `cargo test --test matrix NAME` selects by a part of its name; prints the
//! table afterwards.

use std::process::ExitCode;

use nomad_driver_nspawn::sys::process::first_child;
use serde_json::json;

#[path = "../integration/harness/mod.rs"]
#[expect(
    dead_code,
    unused_imports,
    reason = "the integration tests use the rest"
)]
mod harness;
#[path = "mod.rs"]
mod suite;

use harness::Host;
use suite::{Moment, World};
use support::trap::Trap;

/// The number of concurrent worlds. A cell spends most of its time waiting for processes.
const AT_ONCE: usize = 6;

impl World for Host {
    fn hold_nspawn(&self, moment: Moment) -> Trap {
        let word = match moment {
            Moment::BeforeNotify => "pause_before_notify",
            Moment::BeforeExit => "pause_before_exit",
        };
        let trap = Trap::named(&self.state(), word);
        self.scenario(&json!({"calls": [{word: trap.socket()}, {}]}));
        trap
    }

    fn init(&self, leader: i32) -> Option<i32> {
        // The fake's leader has the process that acts as the container's PID 1 as its child.
        first_child(leader)
    }
}

fn main() -> ExitCode {
    suite::report(suite::cells(), AT_ONCE, Host::new)
}
