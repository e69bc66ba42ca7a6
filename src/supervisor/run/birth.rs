//! The step between a supervisor and systemd-nspawn is started here, and gets what systemd-nspawn and the container's first program
//! shall have: their descriptors and nothing else.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::super::first::Channel;
use super::super::record::{First, Records};

/// Starts the step between this process and systemd-nspawn.
#[expect(
    clippy::disallowed_methods,
    reason = "the container's own process begins here"
)]
pub(super) fn spawn(
    records: &Records,
    first: First,
    stdout: File,
    stderr: File,
) -> io::Result<(Child, Option<Channel>)> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("nomad-driver-nspawn")
        .arg("enter")
        .arg(records.path())
        .env_clear();
    let First::Ours { streams } = first else {
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        return Ok((command.spawn()?, None));
    };
    let (channel, theirs) = Channel::open()?;
    let (give, take) = UnixStream::pair()?;
    let program = io::stdout().as_fd().try_clone_to_owned()?;
    hand_over(
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
        command.stdout(Stdio::null()).stderr(records.open_words()?);
    } else {
        command.stdout(stdout).stderr(stderr);
    }
    Ok((command.spawn()?, Some(channel)))
}

/// Sends descriptors to whoever holds the other end.
fn hand_over(give: &UnixStream, descriptors: [OwnedFd; 4]) -> io::Result<()> {
    let numbers = descriptors.each_ref().map(AsRawFd::as_raw_fd);
    let rights = [ControlMessage::ScmRights(&numbers)];
    let byte = [IoSlice::new(&[0])];
    sendmsg::<()>(give.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None)?;
    Ok(())
}
