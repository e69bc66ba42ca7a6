//! Failures of the machine below the driver: a full disk, a state directory that disappears or is read-only, unreadable records, pipes
//! without a reader, no more processes, no more descriptors, a clock that was set back. Each is an error with a message for the affected
//! tasks; running tasks keep running, their exit is reported, and everything works again afterwards.

use std::fs;
use std::io::Read as _;
use std::io::Write as _;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dev_agent::calls::StartedTask;
use dev_agent::{Allocation, HostError, Launch, Logs, Plugin};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nomad_driver_nspawn::failpoint::{Failpoint, WAITS_FAIL};
use nomad_driver_nspawn::state::task_dir::TaskDir;
use rstest::rstest;
use serde_json::{Value, json};
use support::not_applicable;
use tokio::task::JoinHandle;

use crate::harness::{DEADLINE, Host, Running, eventually, is_root, refusal, within};
use crate::lifecycle::nothing_left;
use support::trap::Trap;

mod disk;
mod limits;
mod pipes;
mod records;
mod together;

/// Exits with 5 once `gate` exists.
fn gated(gate: &Path) -> String {
    format!(
        "trap '' TERM INT; echo up; while ! test -e {}; do sleep 0.02; done; exit 5",
        gate.display()
    )
}

/// A pending StartTask, with its logs being read.
struct Starting {
    id: String,
    call: JoinHandle<Result<StartedTask, HostError>>,
    _logs: Logs,
}

async fn starting(plugin: &Arc<Plugin>, allocation: Allocation) -> Starting {
    let logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(plugin));
    Starting {
        id,
        call: tokio::spawn(async move { line.start(config).await }),
        _logs: logs,
    }
}

async fn reached(trap: &mut Trap) -> i32 {
    within("the step", trap.reached()).await.1
}

/// A task starts, exits and is destroyed without errors.
async fn all_is_well(host: &Host, plugin: &Plugin) {
    let task = host.start(plugin, host.shell("exit 5")).await;
    assert_eq!(task.wait(plugin).await.code, 5);
    task.destroy(plugin).await;
}

/// The task exits with its own code in spite of the failure.
async fn ends_well(plugin: &Plugin, task: &Running, gate: &Path) {
    fs::write(gate, "").unwrap();
    let exit = task.wait(plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    task.destroy(plugin).await;
}
