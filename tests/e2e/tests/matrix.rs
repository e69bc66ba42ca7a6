//! The part of the fault matrix that runs on the real systemd-nspawn, more than a third. The cells, their expected results and the code
//! that runs them are shared with the hermetic matrix (`tests/matrix/`); this file provides the machine. Needs a debug build of the driver:
//! only a debug build can be held at a step.

use std::path::PathBuf;
use std::process::ExitCode;

use dev_agent::{Plugin, TaskSpec};
use e2e::stage::{Stage, within};
use serde_json::{Value, json};

#[path = "../../matrix/mod.rs"]
mod suite;

use suite::{Moment, World};
use support::trap::Trap;

/// The number of concurrent worlds. A cell spends most of its time waiting for processes.
const AT_ONCE: usize = 3;

struct Machine(Stage);

impl World for Machine {
    fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    fn allocations(&self) -> PathBuf {
        self.0.join("alloc")
    }

    fn config(&self) -> Value {
        json!({"state_dir": self.state()})
    }

    async fn plugin(&self) -> Plugin {
        self.0.plugin().await
    }

    fn task(&self, text: &str, process_two: bool) -> TaskSpec {
        self.0.shell(text).with("process_two", process_two).spec
    }

    fn gate(&self) -> (PathBuf, String) {
        (self.0.join("tree/srv/gate"), "/srv/gate".to_owned())
    }

    fn hold_nspawn(&self, moment: Moment) -> Trap {
        panic!("the real systemd-nspawn can't be held at {moment:?}");
    }

    fn init(&self, leader: i32) -> Option<i32> {
        Some(leader)
    }

    fn log(&self) -> String {
        self.0.log()
    }

    async fn assert_clean(&self, plugin: i32) {
        let own = format!("process {plugin} ");
        let others = || {
            let mut left = self.0.marks().left();
            left.retain(|line| !line.starts_with(&own));
            left
        };
        within("an empty machine", async {
            while !others().is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    fn leave(self) {
        self.0.leave();
    }
}

/// A machine for one cell. Listing the cells needs neither root nor a driver, running them does.
fn machine() -> Machine {
    e2e::needs_root();
    let driver = e2e::driver();
    let program = std::fs::read(&driver).expect("the driver");
    assert!(
        program.windows(6).any(|bytes| bytes == b".pause"),
        "{} is no debug build and can't be held at a step",
        driver.display()
    );
    Machine(Stage::new())
}

fn main() -> ExitCode {
    let mut cells = suite::cells();
    let all = cells.len();
    cells.retain(|cell| cell.is_for_real());
    assert!(3 * cells.len() >= all, "{} of {all} cells", cells.len());
    suite::report(cells, AT_ONCE, machine)
}
