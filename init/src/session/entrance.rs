//! The process of a session that enters the container. It is not in the container's pid namespace, where only its child is, so nothing
//! in the container can trace it while it still has privileges. Reads files of the container, which are not trusted, with the
//! container's own view.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nspawn_init::session_spec::{SessionEvent, SessionSpec};
use nspawn_init::{StartError, Step};
use rustix::fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{
    ThreadNameSpaceType, move_into_thread_name_spaces, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::account::Account;
use super::{Begin, Reports, Streams, confine, failed, reaper};
use crate::raw;

/// Enters the container and forks the reaper; never returns.
pub(super) fn run(begin: Begin, reports: &Reports) -> ! {
    let status = match prepare(begin, reports) {
        Ok((spec, account, streams)) => match raw::fork_sibling() {
            Ok(Some(_)) => 0,
            Ok(None) => reaper::run(&spec, &account, streams, reports),
            Err(error) => fail(reports, failed(Step::Fork, "")(error)),
        },
        Err(start_error) => fail(reports, start_error),
    };
    raw::exit(status)
}

fn fail(reports: &Reports, start_error: StartError) -> i32 {
    let status = start_error.status();
    reports.send(&SessionEvent::Failed(start_error));
    status
}

/// Everything up to the point at which this process has no more privileges than the container.
fn prepare(begin: Begin, reports: &Reports) -> Result<(SessionSpec, Account, Streams), StartError> {
    let Begin {
        spec,
        leader,
        pipes,
    } = begin;
    confine::raise_limits(&spec.confinement)?;
    join_cgroups(&spec.cgroups.joined)?;
    join_namespaces(&leader, spec.confinement.namespaces)?;
    drop(leader);
    let account = Account::find(spec.user.as_deref())?;
    let streams = match pipes {
        Some([stdin, stdout, stderr]) => Streams::Pipes {
            stdin,
            stdout,
            stderr,
        },
        None => Streams::Terminal(terminal(&spec, &account, reports)?),
    };
    confine::restrict(&spec.confinement)?;
    Ok((spec, account, streams))
}

/// In cgroup v1: `0` in `tasks` is the calling thread, this process's only one. Moving one thread alone needs no lock that the kernel
/// takes milliseconds to get.
fn join_cgroups(groups: &[impl AsRef<Path>]) -> Result<(), StartError> {
    for group in groups {
        let file = group.as_ref().join("tasks");
        fs::write(&file, "0").map_err(failed(Step::Join, &file.to_string_lossy()))?;
    }
    Ok(())
}

/// Joins the namespaces of the container's first process. In its user namespace this process then is root.
fn join_namespaces(leader: &OwnedFd, namespaces: u32) -> Result<(), StartError> {
    let namespaces = ThreadNameSpaceType::from_bits_retain(namespaces);
    if namespaces.is_empty() {
        return Ok(());
    }
    move_into_thread_name_spaces(leader.as_fd(), namespaces).map_err(failed(Step::Join, ""))?;
    if namespaces.contains(ThreadNameSpaceType::USER) {
        set_thread_groups(&[]).map_err(failed(Step::Join, ""))?;
        set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(failed(Step::Join, ""))?;
        set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(failed(Step::Join, ""))?;
        // The change of the user has reset it.
        let _ = nix::sys::prctl::set_dumpable(false);
    }
    Ok(())
}

/// Opens a terminal of the container's own, for this user, and reports its master side. Returns the slave side.
fn terminal(
    spec: &SessionSpec,
    account: &Account,
    reports: &Reports,
) -> Result<OwnedFd, StartError> {
    const MULTIPLEXER: &str = "/dev/ptmx";
    /// What programs such as `wall` and `mesg` expect; systemd-nspawn mounts its file system with 0600 from version 257 on.
    const MODE: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::WGRP);
    let failed = |error: rustix::io::Errno| failed(Step::Terminal, MULTIPLEXER)(error);
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = open(MULTIPLEXER, flags, Mode::empty()).map_err(failed)?;
    unlockpt(&master).map_err(failed)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(failed)?;
    let size = Winsize {
        ws_row: spec.size.rows,
        ws_col: spec.size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&slave, size).map_err(failed)?;
    if let Some(uid) = account.uid {
        fchown(&slave, Some(uid), None).map_err(failed)?;
    }
    fchmod(&slave, MODE).map_err(failed)?;
    reports.send_with(&SessionEvent::Terminal, &[master.as_fd()]);
    Ok(slave)
}
