//! The `enter` life of the binary: one step between supervisor and systemd-nspawn. It goes where the container shall be (control
//! group, network namespace), puts off what it inherited, and becomes systemd-nspawn. A process of its own, because a
//! supervisor that went there itself would count against the task's limits and die with it. Makes nothing, waits for nothing.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};

use super::process::close_inherited;
use super::record::Records;
use crate::cgroup::Group;

/// Becomes systemd-nspawn as the order in this directory says. Returns only if that failed, with the reason left beside the
/// order: stderr is the task's by now.
pub fn enter(directory: &Path) -> ExitCode {
    close_inherited();
    let records = Records::at(directory);
    let reason = become_nspawn(&records);
    let _ = records.write_failure(&reason);
    ExitCode::FAILURE
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is where systemd-nspawn is called"
)]
fn become_nspawn(records: &Records) -> String {
    let order = match records.order() {
        Ok(order) => order,
        Err(error) => return format!("the order can't be read: {error}"),
    };
    let environment = match records.take_environment() {
        Ok(environment) => environment,
        Err(error) => return format!("the environment can't be read: {error}"),
    };
    if let Some(place) = &order.place
        && let Err(error) = Group::new(&place.group).enter()
    {
        return format!(
            "can't enter the control group {}: {error}",
            place.group.display()
        );
    }
    if let Some(path) = &order.network_namespace {
        let entered = File::open(path).and_then(|file| Ok(setns(file, CloneFlags::CLONE_NEWNET)?));
        if let Err(error) = entered {
            return format!(
                "can't enter the network namespace {}: {error}",
                path.display()
            );
        }
    }
    umask(Mode::from_bits_truncate(0o022));
    if let Err(error) = SigSet::empty().thread_set_mask() {
        return format!("can't unblock signals: {error}");
    }
    let error = Command::new(&order.program)
        .args(&order.arguments)
        .env_clear()
        .envs(environment)
        .exec();
    format!("can't execute {}: {error}", order.program.display())
}
