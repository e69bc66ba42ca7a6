//! The machine below the driver is in trouble: a full disk, a state directory that goes away or takes nothing, records that can't
//! be read, pipes that nobody empties, no more processes, no more descriptors, a clock that was set back. Each is an error of the
//! tasks it meets, told in words; what runs goes on, its end is told, and when the trouble is over everything works.

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

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nomad_driver_nspawn::host::calls::StartedTask;
use nomad_driver_nspawn::host::{Allocation, HostError, Launch, Logs, Plugin};
use nomad_driver_nspawn::supervisor::failpoint::Failpoint;
use nomad_driver_nspawn::supervisor::task_dir::TaskDir;
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

/// Ends with 5 when `gate` is there.
fn gated(gate: &Path) -> String {
    format!(
        "trap '' TERM INT; echo up; while ! test -e {}; do sleep 0.02; done; exit 5",
        gate.display()
    )
}

/// A start that has not been answered yet, with its logs read.
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

/// A whole life goes well.
async fn all_is_well(host: &Host, plugin: &Plugin) {
    let task = host.start(plugin, host.shell("exit 5")).await;
    assert_eq!(task.wait(plugin).await.code, 5);
    task.destroy(plugin).await;
}

/// It ends with its own code, though there was trouble.
async fn ends_well(plugin: &Plugin, task: &Running, gate: &Path) {
    fs::write(gate, "").unwrap();
    let exit = task.wait(plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    task.destroy(plugin).await;
}
