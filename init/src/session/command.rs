//! The process of a session that becomes the command.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;

use nspawn_init::session_spec::SessionSpec;
use nspawn_init::{StartError, Step};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{chdir, getegid, geteuid, ioctl_tiocsctty, setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::account::Account;
use super::{Streams, confine, failed};
use crate::command::{Environment, execute};

/// Becomes the command; returns only an error.
pub(super) fn run(
    spec: &SessionSpec,
    account: &Account,
    streams: Streams,
) -> Result<Infallible, StartError> {
    setsid().map_err(failed(Step::Fork, ""))?;
    connect(streams).map_err(failed(Step::Streams, ""))?;
    umask(Mode::WGRP | Mode::WOTH);
    become_user(account).map_err(failed(Step::User, ""))?;
    chdir(&*spec.directory).map_err(failed(Step::Directory, &spec.directory))?;
    confine::finish(&spec.confinement)?;
    let environment = environment(&spec.environment, account);
    execute(&spec.command, &environment, |command| Err(command.exec()))
}

/// A terminal becomes the controlling one.
fn connect(streams: Streams) -> Result<(), Errno> {
    match streams {
        Streams::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            dup2_stdin(stdin)?;
            dup2_stdout(stdout)?;
            dup2_stderr(stderr)
        }
        Streams::Terminal(slave) => {
            ioctl_tiocsctty(&slave)?;
            dup2_stdin(&slave)?;
            dup2_stdout(&slave)?;
            dup2_stderr(&slave)
        }
    }
}

/// Changes nothing if this process is that user already: a driver without privileges runs commands as its own user.
fn become_user(account: &Account) -> Result<(), Errno> {
    let (Some(uid), Some(gid)) = (account.uid, account.gid) else {
        return Ok(());
    };
    let root = geteuid().is_root();
    if !root && (geteuid(), getegid()) == (uid, gid) {
        return Ok(());
    }
    set_thread_groups(&account.groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// The variables of the command; those of the user only where there are no others.
fn environment(given: &BTreeMap<String, String>, account: &Account) -> Environment {
    let user = [
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("SHELL", &account.shell),
    ];
    let mut environment: Environment = user
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| (OsString::from(name), OsString::from(value)))
        .collect();
    let given = given.iter();
    environment.extend(given.map(|(name, value)| (name.into(), OsStr::new(value).to_owned())));
    environment
}
