//! The `enter` life of the binary: one step between supervisor and systemd-nspawn. It goes where the container shall be (control
//! group, network namespace), puts off what it inherited, and becomes systemd-nspawn. A process of its own, because a
//! supervisor that went there itself would count against the task's limits and die with it. Makes nothing, waits for nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};

use super::process::{close_inherited, no_core_dump_of_the_next};
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
    if let Err(error) = no_core_dump_of_the_next() {
        return format!("can't switch core dumps off: {error}");
    }
    let size = size_of_strings(&order.arguments, &environment);
    let error = Command::new(&order.program)
        .args(&order.arguments)
        .env_clear()
        .envs(environment)
        .exec();
    let program = order.program.display();
    if error.raw_os_error() == Some(nix::Error::E2BIG as i32) {
        return too_big(&program.to_string(), size);
    }
    format!("can't execute {program}: {error}")
}

/// What the kernel counts of words and variables: each has an end mark and a pointer.
fn size_of_strings(words: &[String], variables: &BTreeMap<String, String>) -> usize {
    const EACH: usize = 1 + size_of::<usize>();
    let words: usize = words.iter().map(|word| word.len() + EACH).sum();
    let variables: usize = variables
        .iter()
        .map(|(name, value)| name.len() + 1 + value.len() + EACH)
        .sum();
    words + variables
}

/// Names the limit, which the kernel derives from that of the stack.
fn too_big(program: &str, size: usize) -> String {
    use nix::sys::resource::{Resource, getrlimit};
    const MOST: u64 = 6 * 1024 * 1024;
    const LEAST: u64 = 128 * 1024;
    let limit = getrlimit(Resource::RLIMIT_STACK).map_or(LEAST, |(soft, _)| soft / 4);
    format!(
        "can't execute {program}: its arguments and environment have {size} bytes, and the kernel takes at most {} here, \
         a quarter of the stack limit (LimitSTACK=) of Nomad's agent",
        limit.clamp(LEAST, MOST)
    )
}
