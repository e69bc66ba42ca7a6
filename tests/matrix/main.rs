//! The fault matrix on the fake: every cell is a test, which `cargo test --test matrix NAME` selects by a part of its name; prints the
//! table afterwards.

use std::path::PathBuf;
use std::process::ExitCode;

use dev_agent::{Plugin, TaskSpec};
use nomad_driver_nspawn::sys::process::first_child;
use serde_json::{Value, json};

#[path = "../integration/harness/mod.rs"]
#[expect(
    dead_code,
    unused_imports,
    reason = "the integration tests use the rest"
)]
mod harness;
#[path = "mod.rs"]
mod suite;

use harness::{Fixture, Host, eventually};
use suite::{Moment, World};
use support::trap::Trap;

/// The number of concurrent worlds. A cell spends most of its time waiting for processes.
const AT_ONCE: usize = 6;

impl World for Host {
    fn state(&self) -> PathBuf {
        Fixture::state(self)
    }

    fn allocations(&self) -> PathBuf {
        self.join("alloc")
    }

    fn config(&self) -> Value {
        Fixture::config(self)
    }

    async fn plugin(&self) -> Plugin {
        Fixture::plugin(self).await
    }

    fn task(&self, text: &str, process_two: bool) -> TaskSpec {
        self.shell(text)
            .with("process_two", json!(process_two))
            .spec
    }

    fn gate(&self) -> (PathBuf, String) {
        let gate = self.join("gate");
        (gate.clone(), gate.display().to_string())
    }

    fn hold_nspawn(&self, moment: Moment) -> Trap {
        let word = match moment {
            Moment::BeforeNotify => "pause_before_notify",
            Moment::BeforeExit => "pause_before_exit",
        };
        let trap = Trap::named(&Fixture::state(self), word);
        self.scenario(&json!({"calls": [{word: trap.socket()}, {}]}));
        trap
    }

    fn init(&self, leader: i32) -> Option<i32> {
        // The fake's leader has the process that acts as the container's PID 1 as its child.
        first_child(leader)
    }

    fn log(&self) -> String {
        Fixture::log(self).text().join("\n")
    }

    async fn assert_clean(&self, plugin: i32) {
        self.quiet(&[plugin]).await;
        for group in self.groups() {
            eventually("the control group is gone", || !group.exists()).await;
        }
    }

    fn leave(self) {}
}

fn main() -> ExitCode {
    suite::report(suite::cells(), AT_ONCE, Host::new)
}
