//! The exec shim (`enter DIR`): the process between the supervisor and systemd-nspawn. It enters the container's cgroup and network
//! namespace, reads credentials, mounts what the container gets of the host, drops inherited process state, puts the descriptors for the driver's init at their numbers, and becomes
//! systemd-nspawn. It is a process of its own, because a supervisor that entered the cgroup itself would count against the task's
//! limits and be killed with it. Creates nothing that outlives it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nspawn_init::{DESCRIPTORS, Descriptor};

use super::{credentials, joined_network};
use crate::cgroup::{CgroupPlan, Group};
use crate::failpoint::{self, Failpoint};
use crate::mounts;
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_host_error};
use crate::state::task_dir::{LaunchSpec, Pid1, Refusal, TaskDir};
use crate::sys::process::{
    close_inherited, current_process, no_core_dump_of_the_next, set_oom_score_adj,
};

/// Becomes systemd-nspawn as the launch spec in this directory says. Returns only if that failed, and records the reason in the
/// directory: stderr may be the task's by now.
pub fn enter(directory: &Path) -> ExitCode {
    close_inherited();
    let task_dir = TaskDir::new(directory);
    let refusal = become_nspawn(&task_dir);
    let _ = task_dir.write_failure(&refusal);
    ExitCode::FAILURE
}

/// A step of the driver itself that failed.
fn because(what: &str) -> impl FnOnce(io::Error) -> Refusal {
    move |error| Refusal {
        cause: cause_of_host_error(&error),
        reason: format!("{what}: {error}"),
    }
}

/// Returns only if it failed.
fn become_nspawn(task_dir: &TaskDir) -> Refusal {
    let command = prepared(task_dir);
    let (launch_spec, size, mut command) = match command {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal,
    };
    failpoint::hit(task_dir, Failpoint::Entered);
    let error = command.exec();
    let program = launch_spec.program.display();
    let reason = if error.raw_os_error() == Some(nix::Error::E2BIG as i32) {
        too_big(&program.to_string(), size)
    } else {
        format!("can't execute {program}: {error}")
    };
    Refusal {
        cause: cause_of_exec_error(&error),
        reason,
    }
}

/// Enters the cgroup and the network namespace, and returns the launch spec, the size of the strings that the kernel has to copy,
/// and the command.
#[expect(
    clippy::disallowed_methods,
    reason = "this is where systemd-nspawn is called"
)]
fn prepared(task_dir: &TaskDir) -> Result<(LaunchSpec, usize, Command), Refusal> {
    let launch_spec = task_dir
        .launch_spec()
        .map_err(because("the launch spec can't be read"))?;
    let environment = task_dir
        .take_environment()
        .map_err(because("the environment can't be read"))?;
    enter_cgroup_and_netns(&launch_spec)?;
    // In the namespace of the mounts their files may not be seen any more.
    credentials::pass(&launch_spec.credentials)?;
    mount_all(task_dir, &launch_spec)?;
    if launch_spec.cgroup().is_none() {
        current_process()
            .and_then(|me| task_dir.write_nspawn_pid(&me))
            .map_err(because("the pid of this process can't be recorded"))?;
    }
    let size = size_of_strings(&launch_spec.arguments, &environment);
    let mut command = Command::new(&launch_spec.program);
    command
        .args(&launch_spec.arguments)
        .env_clear()
        .envs(environment);
    if let Pid1::Driver { .. } = launch_spec.first {
        receive_descriptors(task_dir).map_err(because(
            "the descriptors of the container init can't be prepared",
        ))?;
        command
            .env("LISTEN_FDS", DESCRIPTORS.to_string())
            .env("LISTEN_PID", nix::unistd::getpid().to_string());
    }
    Ok((launch_spec, size, command))
}

fn enter_cgroup_and_netns(launch_spec: &LaunchSpec) -> Result<(), Refusal> {
    if let Some(group) = launch_spec.cgroup() {
        let what = format!("can't enter the control group {}", group.display());
        Group::new(group).enter().map_err(because(&what))?;
    }
    for group in launch_spec.cgroups.iter().flat_map(CgroupPlan::joined) {
        let what = format!("can't enter the control group {}", group.display());
        Group::new(group).enter().map_err(because(&what))?;
    }
    // The agent's own may be -1000, with which no limit of memory would end a process. systemd-nspawn can't change it in a user
    // namespace. Lowering it needs CAP_SYS_RESOURCE.
    let _ = set_oom_score_adj(nix::unistd::getpid().as_raw(), launch_spec.oom_score_adj);
    joined_network::enter(launch_spec)?;
    umask(Mode::from_bits_truncate(0o022));
    SigSet::empty()
        .thread_set_mask()
        .map_err(|error| because("can't unblock signals")(error.into()))?;
    no_core_dump_of_the_next().map_err(|error| because("can't switch core dumps off")(error.into()))
}

/// Mounts what systemd-nspawn is to find ready, in a mount namespace of its own.
fn mount_all(task_dir: &TaskDir, launch_spec: &LaunchSpec) -> Result<(), Refusal> {
    if launch_spec.mounts.is_empty() {
        failpoint::hit(task_dir, Failpoint::Mounting);
        return Ok(());
    }
    let attached = mounts::attach(&launch_spec.mounts, task_dir.path());
    attached.map_err(|error| Refusal {
        cause: cause_of_host_error(error.error()),
        reason: error.to_string(),
    })
}

/// Receives the descriptors that are queued on stdin and opens the init spec behind them, each at its number: no other descriptor
/// is open but those of credentials, which have higher ones, so the kernel assigns the lowest numbers in this order.
fn receive_descriptors(task_dir: &TaskDir) -> io::Result<()> {
    let queued = packets::receive(io::stdin())?.descriptors;
    let received = queued.take::<4>().map_err(io::Error::other)?;
    let spec = OwnedFd::from(task_dir.take_init_spec()?);
    let wanted = [
        Descriptor::Channel,
        Descriptor::Stdout,
        Descriptor::Stderr,
        Descriptor::Program,
        Descriptor::Spec,
    ];
    for (have, wanted) in received.into_iter().chain([spec]).zip(wanted) {
        if have.as_raw_fd() != wanted as RawFd {
            let text =
                "the descriptors of the container init do not have the numbers that it expects";
            return Err(io::Error::other(text));
        }
        fcntl(&have, FcntlArg::F_SETFD(FdFlag::empty()))?;
        // From here on the descriptor belongs to the program that this process becomes.
        let _ = have.into_raw_fd();
    }
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(())
}

/// The size of arguments and variables as the kernel counts them: each has a terminating NUL and a pointer.
fn size_of_strings(words: &[String], variables: &BTreeMap<String, String>) -> usize {
    const EACH: usize = 1 + size_of::<usize>();
    let words: usize = words.iter().map(|word| word.len() + EACH).sum();
    let variables: usize = variables
        .iter()
        .map(|(name, value)| name.len() + 1 + value.len() + EACH)
        .sum();
    words + variables
}

/// The message for E2BIG. Names the limit, which the kernel derives from the stack limit.
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
