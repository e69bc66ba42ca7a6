//! Starts the exec shim (`enter`) that becomes systemd-nspawn, and passes it the descriptors for systemd-nspawn and for the
//! driver's init, and no others. Runs in the supervisor process.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::state::task_dir::{Pid1, TaskDir};
use crate::supervisor::init_channel::InitChannel;

/// Starts the exec shim.
#[expect(
    clippy::disallowed_methods,
    reason = "the container's own process begins here"
)]
pub(super) fn spawn(
    task_dir: &TaskDir,
    pid1: Pid1,
    stdout: File,
    stderr: File,
) -> io::Result<(Child, Option<InitChannel>)> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("nomad-driver-nspawn")
        .arg("enter")
        .arg(task_dir.path())
        .env_clear();
    let Pid1::Driver { streams } = pid1 else {
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        return Ok((command.spawn()?, None));
    };
    let (channel, theirs) = InitChannel::open()?;
    let (give, take) = UnixStream::pair()?;
    let program = io::stdout().as_fd().try_clone_to_owned()?;
    send_descriptors(
        &give,
        [
            theirs,
            stdout.try_clone()?.into(),
            stderr.try_clone()?.into(),
            program,
        ],
    )?;
    command.stdin(OwnedFd::from(take));
    if streams {
        command
            .stdout(Stdio::null())
            .stderr(task_dir.open_nspawn_stderr()?);
    } else {
        command.stdout(stdout).stderr(stderr);
    }
    Ok((command.spawn()?, Some(channel)))
}

/// Sends descriptors to the peer of the socket.
fn send_descriptors(give: &UnixStream, descriptors: [OwnedFd; 4]) -> io::Result<()> {
    let numbers = descriptors.each_ref().map(AsRawFd::as_raw_fd);
    let rights = [ControlMessage::ScmRights(&numbers)];
    let byte = [IoSlice::new(&[0])];
    sendmsg::<()>(give.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None)?;
    Ok(())
}
