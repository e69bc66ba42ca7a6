//! The process of a session that stays on the host. Ends the session when the plugin closes the channel or is gone, and leaves nothing
//! of it behind. Trusts the plugin, and nothing that comes out of the container.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nspawn_init::session_spec::{Order, SessionCgroups, SessionEvent, SessionSpec};
use nspawn_init::{StartError, Step};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Pid, Signal, WaitOptions, kill_process};
use rustix::stdio::dup2_stdin;

use super::{Begin, Reports, entrance, failed, wait};
use crate::command::start_error;
use crate::{raw, read};

/// How long, in milliseconds, the reaper may take to kill what is left of the session. Then the cgroup is killed.
const REAPER_TIMEOUT: i64 = 2000;
/// How long killed processes may take to leave the cgroup, which can be removed only then, and to be waited for.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn run() -> ExitCode {
    raw::close_inherited();
    let _ = SigSet::all().thread_block();
    let _ = prctl::set_dumpable(false);
    let _ = prctl::set_name(c"nspawn-session");
    // A signal to the plugin's process group must not end a session before the plugin does.
    let _ = nix::unistd::setsid();
    let Ok(channel) = take_stdin() else {
        return ExitCode::FAILURE;
    };
    wait([&channel], None);
    let begin = match begin(&channel) {
        Ok(begin) => begin,
        Err(error) => {
            let start_error = start_error(Step::Order, "", &error);
            Reports(channel).send(&SessionEvent::Failed(start_error));
            return ExitCode::FAILURE;
        }
    };
    let cgroups = begin.spec.cgroups.clone();
    match fork(&cgroups) {
        Ok((Some(_), session, theirs)) => {
            // Copies here would keep this process from seeing the end of the session.
            drop((theirs, begin));
            watch(&channel, &session);
        }
        Ok((None, session, theirs)) => {
            drop((channel, session));
            entrance::run(begin, &Reports(theirs));
        }
        Err(start_error) => Reports(channel).send(&SessionEvent::Failed(start_error)),
    }
    remove(&cgroups);
    reap();
    ExitCode::SUCCESS
}

/// The channel, which is replaced by `/dev/null` as stdin.
fn take_stdin() -> io::Result<OwnedFd> {
    let channel = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(channel)
}

fn begin(channel: &OwnedFd) -> io::Result<Begin> {
    let packet = packets::receive(channel)?;
    let malformed = |_| io::Error::from_raw_os_error(nix::libc::EBADMSG);
    let order: Order = packet.message().map_err(malformed)?;
    let wrong = |_| io::Error::from_raw_os_error(nix::libc::EBADF);
    let (spec, leader, pipes) = match order {
        Order::Pipes => {
            let [spec, leader, stdin, stdout, stderr] = packet.descriptors.take().map_err(wrong)?;
            (spec, leader, Some([stdin, stdout, stderr]))
        }
        Order::Terminal => {
            let [spec, leader] = packet.descriptors.take().map_err(wrong)?;
            (spec, leader, None)
        }
    };
    let spec: SessionSpec = read(&File::from(spec))?;
    Ok(Begin {
        spec,
        leader,
        pipes,
    })
}

/// Forks the process that enters the container, in the session's cgroup; `None` in that process. Also returns both ends of the socket on
/// which the session reports: it is closed when the last of its processes but the command has ended.
fn fork(cgroups: &SessionCgroups) -> Result<(Option<Pid>, OwnedFd, OwnedFd), StartError> {
    let (session, theirs) = packets::pair().map_err(failed(Step::Fork, ""))?;
    let group = cgroups.unified.as_deref();
    let join = |error: io::Error| {
        let file = group.unwrap_or_else(|| Path::new(""));
        start_error(Step::Join, file, &error)
    };
    let directory = group.map(File::open).transpose().map_err(join)?;
    let child = raw::fork_into(directory.as_ref().map(AsFd::as_fd)).map_err(join)?;
    Ok((child, session, theirs))
}

/// Passes the events of the session on until the plugin or the session has ended. Then waits for the reaper to kill and wait for
/// everything that is left: the cgroup is killed only after it, because what outlives the reaper becomes a zombie of a first process that
/// may not wait for it.
fn watch(channel: &OwnedFd, session: &OwnedFd) {
    loop {
        let [from_plugin, from_session] = wait([channel, session], None);
        // There are no requests, so what comes from the plugin is the end.
        if from_session && !pass_on(channel, session) || from_plugin {
            break;
        }
    }
    let _ = shutdown(session, Shutdown::Write);
    let end = Instant::now() + Duration::from_millis(REAPER_TIMEOUT.unsigned_abs());
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis();
        let [closed] = wait([session], Some(i64::try_from(left).unwrap_or_default()));
        if !closed || packets::receive(session).is_err() {
            return;
        }
    }
}

/// Passes an event on. `false` once the session has ended, or nobody receives its events any more.
fn pass_on(channel: &OwnedFd, session: &OwnedFd) -> bool {
    let packet = match packets::receive(session) {
        Ok(packet) => packet,
        Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
    };
    let Ok(event) = packet.message::<SessionEvent>() else {
        return false;
    };
    let reports = packets::encode(&event);
    let sent = match event {
        SessionEvent::Terminal => match packet.descriptors.take::<1>() {
            Ok([master]) => packets::send(channel, &reports, &[master.as_fd()]),
            Err(_) => return false,
        },
        _ => packets::send(channel, &reports, &[]),
    };
    // At most three events are sent in a session, so there is always space, unless the container sends more.
    sent.is_ok()
}

/// Kills what is left in the session's own cgroups, and removes them.
fn remove(cgroups: &SessionCgroups) {
    let end = Instant::now() + REMOVE_TIMEOUT;
    for group in &cgroups.own {
        kill(group);
        while fs::remove_dir(group).is_err_and(|error| error.kind() != io::ErrorKind::NotFound)
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(1));
            kill(group);
        }
    }
}

/// Waits for the processes of the session. One of them is in the container's pid namespace, which does not end before somebody has waited
/// for it, and the host's first process may do that late or never.
fn reap() {
    let end = Instant::now() + REMOVE_TIMEOUT;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

fn kill(group: &Path) {
    if fs::write(group.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // cgroup v1, or a kernel before 5.14. The processes are members now, so their pids can't have been reused for longer than this takes.
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
