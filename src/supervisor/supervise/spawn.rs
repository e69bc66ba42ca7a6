//! Starts the exec shim (`enter`) that becomes systemd-nspawn, and passes it the descriptors for systemd-nspawn and for the
//! driver's init, and no others. Runs in the supervisor process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::output::Streams;
use crate::container::Process;
use crate::state::task_dir::{Pid1, TaskDir};
use crate::supervisor::init_channel::InitChannel;
use crate::sys::process::ProcessHandle;

/// Starts the exec shim. Returns the process that becomes systemd-nspawn, and the channel to the driver's init if PID 1 is that.
#[expect(
    clippy::disallowed_methods,
    reason = "the container's own process begins here"
)]
pub(super) fn spawn(
    task_dir: &TaskDir,
    pid1: Pid1,
    Streams { stdout, stderr }: Streams,
) -> io::Result<(Process, Option<InitChannel>)> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("nomad-driver-nspawn")
        .arg("enter")
        .arg(task_dir.path())
        .env_clear();
    let channel = match pid1 {
        Pid1::Image => {
            command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
            None
        }
        Pid1::Driver { streams } => {
            let (channel, descriptors) = descriptors_of_init(&stdout, &stderr)?;
            command.stdin(descriptors);
            match streams {
                true => command
                    .stdout(Stdio::null())
                    .stderr(task_dir.open_nspawn_stderr()?),
                false => command.stdout(stdout).stderr(stderr),
            };
            Some(channel)
        }
    };
    Ok((process_of(&command.spawn()?)?, channel))
}

fn process_of(child: &Child) -> io::Result<Process> {
    let pid = i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData)?;
    // Not reaped yet, so the pid can't have been reused.
    let handle = ProcessHandle::open(pid);
    Ok(handle.map_or(Process { pid, start: 0 }, |handle| handle.process()))
}

/// The channel to the driver's init, and a socket from which the exec shim receives the init's descriptors.
fn descriptors_of_init(stdout: &File, stderr: &File) -> io::Result<(InitChannel, OwnedFd)> {
    let (channel, theirs) = InitChannel::open()?;
    let (give, take) = packets::pair()?;
    let program = io::stdout();
    let descriptors = [
        theirs.as_fd(),
        stdout.as_fd(),
        stderr.as_fd(),
        program.as_fd(),
    ];
    packets::send(give, &packets::encode(&()), &descriptors)?;
    Ok((channel, take))
}
