//! The `enter` life of the binary: one step between supervisor and systemd-nspawn. It goes where the container shall be (control
//! group, network namespace), puts off what it inherited, lines up the descriptors that the container's first program finds, and
//! becomes systemd-nspawn. A process of its own, because a supervisor that went there itself would count against the task's
//! limits and die with it. Makes nothing, waits for nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::{Mode, umask};
use nspawn_init::{DESCRIPTORS, Descriptor};

use super::process::{close_inherited, no_core_dump_of_the_next};
use super::record::{First, Order, Records};
use crate::cgroup::Group;

/// Becomes systemd-nspawn as the order in this directory says. Returns only if that failed, with the reason left beside the
/// order: stderr may be the task's by now.
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
    if let Err(reason) = go_there(&order) {
        return reason;
    }
    let size = size_of_strings(&order.arguments, &environment);
    let mut command = Command::new(&order.program);
    command.args(&order.arguments).env_clear().envs(environment);
    if let First::Ours { .. } = order.first {
        if let Err(error) = line_up(records) {
            return format!("the container's first program can't be handed over: {error}");
        }
        command
            .env("LISTEN_FDS", DESCRIPTORS.to_string())
            .env("LISTEN_PID", nix::unistd::getpid().to_string());
    }
    let error = command.exec();
    let program = order.program.display();
    if error.raw_os_error() == Some(nix::Error::E2BIG as i32) {
        return too_big(&program.to_string(), size);
    }
    format!("can't execute {program}: {error}")
}

fn go_there(order: &Order) -> Result<(), String> {
    if let Some(place) = &order.place
        && let Err(error) = Group::new(&place.group).enter()
    {
        let group = place.group.display();
        return Err(format!("can't enter the control group {group}: {error}"));
    }
    if let Some(path) = &order.network_namespace {
        let entered = File::open(path).and_then(|file| Ok(setns(file, CloneFlags::CLONE_NEWNET)?));
        entered.map_err(|error| {
            let path = path.display();
            format!("can't enter the network namespace {path}: {error}")
        })?;
    }
    umask(Mode::from_bits_truncate(0o022));
    let unblocked = SigSet::empty().thread_set_mask();
    unblocked.map_err(|error| format!("can't unblock signals: {error}"))?;
    let limited = no_core_dump_of_the_next();
    limited.map_err(|error| format!("can't switch core dumps off: {error}"))
}

/// Takes the descriptors that wait on stdin and puts the order behind them, each at its number: nothing else is open, so the
/// kernel gives the lowest ones in their order.
fn line_up(records: &Records) -> io::Result<()> {
    let mut buffer = [0];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let stdin = io::stdin();
    let received = recvmsg::<()>(
        stdin.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let handed: Vec<RawFd> = received
        .cmsgs()?
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(handed) => Some(handed),
            _ => None,
        })
        .flatten()
        .collect();
    let order = records.take_init()?;
    let wanted = [
        Descriptor::Channel,
        Descriptor::Stdout,
        Descriptor::Stderr,
        Descriptor::Program,
        Descriptor::Order,
    ];
    let have = handed.into_iter().chain([order.as_raw_fd()]);
    if !have.eq(wanted.map(|descriptor| descriptor as RawFd)) {
        return Err(io::Error::other(
            "the descriptors are not where they belong",
        ));
    }
    fcntl(&order, FcntlArg::F_SETFD(FdFlag::empty()))?;
    // From here on it belongs to what this process becomes.
    let _ = std::os::fd::IntoRawFd::into_raw_fd(order);
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(())
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
