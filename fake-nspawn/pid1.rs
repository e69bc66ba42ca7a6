//! The leader: the fake's counterpart of the container's PID 1. It runs the payload as an ordinary child, gives signals from outside the
//! meaning that they have for PID 1 of a pid namespace, and kills everything when it exits. Three roles of this program achieve that
//! without privileges:
//!
//! - the *leader* blocks all signals, reads them as events and forwards those that the kernel would deliver;
//! - the *payload* dies with the leader (parent-death signal) and then becomes the command;
//! - the *guard* waits for the leader's end and kills the processes that a SIGKILL to the leader would leave.
//!
//! The leader also represents the payload in `/proc`: it shows handlers for the signals that the payload handles, shortly after the payload
//! has installed them.
//!
//! Known differences from a real container: the payload sees the host's paths and pids, its pid is not 1 (`LISTEN_PID` included), it keeps
//! the caller's user, and a signal that it sends to itself has its usual effect.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getppid, setsid};
use rustix::process::WaitStatus;
use serde::{Deserialize, Serialize};

use crate::call_log::{CallLog, Event, Role};
use crate::notify;
use crate::options::{Mode, Rlimit};
use crate::process::{self, RTMIN};
use crate::scenario::Instead;

/// The process name in each role.
pub(crate) const PID1_NAME: &str = "(sd-stubinit)";
pub(crate) const PAYLOAD_NAME: &str = "(sd-payload)";
pub(crate) const GUARD_NAME: &str = "(sd-guard)";

/// The leader's instructions: its only argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) call_log: PathBuf,
    pub(crate) mode: Mode,
    pub(crate) root: Option<PathBuf>,
    pub(crate) command: Vec<String>,
    /// The payload's.
    pub(crate) rlimits: Vec<Rlimit>,
    /// The host's directory, or the error to print.
    pub(crate) cwd: Result<PathBuf, String>,
    pub(crate) instead: Option<Instead>,
    pub(crate) ignore_signals: Vec<i32>,
    /// The socket on which it waits before it reads any signal.
    pub(crate) late: Option<PathBuf>,
    /// An identity that only this container has; may be empty.
    pub(crate) uuid: String,
    /// The descriptor on which [`End`] is reported.
    pub(crate) sender: i32,
    /// The number of descriptors from 3 on that the payload inherits.
    pub(crate) passed: i32,
    /// The leader's pid; filled in for the roles that it starts.
    pub(crate) leader: i32,
    /// The payload's pid and session; filled in for the guard.
    pub(crate) payload: i32,
}

/// How PID 1 ended, as its parent would see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    Exit(i32),
    /// reboot(2) appears as INT (power-off) and HUP (restart), as in any pid namespace.
    Signal(i32),
}

/// What the leader reports first: from now on no signal is lost or kills it.
pub(crate) const READY: &[u8] = b"ready\n";
/// How often the leader checks which handlers the payload has. There is no notification for it.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

impl End {
    /// The end in a wait status, if the process has ended.
    pub(crate) fn of(status: WaitStatus) -> Option<Self> {
        let exit = status.exit_status().map(Self::Exit);
        exit.or_else(|| status.terminating_signal().map(Self::Signal))
    }
}

/// The core dump flag of a wait status.
const DUMPED: i32 = 0x80;
const POWER_OFF: End = End::Signal(2);
const RESTART: End = End::Signal(1);

/// This program in another role.
pub(crate) fn role(name: &str, plan: &Plan) -> anyhow::Result<Command> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).arg(serde_json::to_string(plan)?);
    Ok(command)
}

/// The leader as a program that ignores every signal that can be ignored. A PID 1 without handlers behaves the same, but only the kernel
/// can provide one. From outside the two look alike except for the mask of ignored signals.
pub(crate) fn ignoring_all_signals(plan: &Plan) -> anyhow::Result<Command> {
    // The shell needs a path to execute, and that path becomes the process name.
    let link = plan.call_log.with_file_name(PID1_NAME);
    if let Err(error) = std::os::unix::fs::symlink(std::env::current_exe()?, &link)
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(error.into());
    }
    let signals: Vec<String> = (1..=64)
        .filter(|number| ![9, 17, 19, 32, 33].contains(number))
        .map(|number: i32| number.to_string())
        .collect();
    let script = format!("trap '' {}; exec \"$@\"", signals.join(" "));
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &script, "sh"])
        .arg(link)
        .arg(serde_json::to_string(plan)?);
    Ok(command)
}

/// Runs the leader. It ends in the same way as the payload, because the kernel shows the end of PID 1 to other processes than its parent
/// too.
pub(crate) fn run_pid1(mut plan: Plan) -> anyhow::Result<i32> {
    let mut sender = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", plan.sender))?;
    close_all_but(&sender, plan.passed)?;
    let mask = SigSet::all();
    if plan.late.is_some() {
        SigSet::empty().thread_set_mask()?;
    } else {
        mask.thread_block()?;
    }
    // Fails for a process group leader, which has its own session already.
    setsid().ok();
    prctl::set_child_subreaper(true)?;
    plan.leader = Pid::this().as_raw();
    let events = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let call_log = CallLog::open(&plan.call_log)?;
    sender.write_all(READY)?;
    if plan.late.is_some() {
        notify::hold(plan.late.as_deref());
        // From here on signals stay pending, ignored or not.
        mask.thread_block()?;
    }
    let place = plan.call_log.parent().map(Path::to_owned);
    let mut dumped = false;
    let end = match early_end(&plan) {
        Some(end) => end,
        None => Pid1::start(plan, events, call_log)?.run(&mut dumped)?,
    };
    process::kill_descendants();
    sender.write_all(&serde_json::to_vec(&end)?)?;
    match end {
        // Only the parent sees what was requested by reboot(2).
        POWER_OFF | RESTART => Ok(0),
        End::Exit(code) => Ok(code),
        End::Signal(number) => {
            // The payload's own core dump is in its working directory; this one goes to the call log's directory, where it disturbs
            // nothing.
            let place = place.filter(|_| dumped);
            match process::die_by(number, place.as_deref())? {}
        }
    }
}

fn close_all_but(keep: &File, passed: i32) -> anyhow::Result<()> {
    use std::os::fd::AsRawFd;
    for number in process::open_descriptors()? {
        if number >= 3 + passed && number != keep.as_raw_fd() {
            nix::unistd::close(number).ok();
        }
    }
    Ok(())
}

/// Failures between the announcement and the first instruction of the command.
#[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
fn early_end(plan: &Plan) -> Option<End> {
    if let Err(message) = &plan.cwd {
        eprintln!("{message}");
        return Some(End::Exit(1));
    }
    let inits = [
        "usr/lib/systemd/systemd",
        "lib/systemd/systemd",
        "sbin/init",
    ];
    let root = plan.root.as_deref().filter(|_| plan.mode == Mode::Boot)?;
    let found = inits
        .iter()
        .any(|path| root.join(path).symlink_metadata().is_ok());
    if found {
        return None;
    }
    eprintln!(
        "execv(/usr/lib/systemd/systemd, /lib/systemd/systemd, /sbin/init) failed: No such file or directory"
    );
    Some(End::Exit(1))
}

struct Pid1 {
    plan: Plan,
    events: SignalFd,
    call_log: CallLog,
    /// The payload's pid; a booted container has none, its init is simulated.
    payload: Option<i32>,
    /// The stub's end once the payload has exited or the time is up.
    ending: Option<(End, Instant)>,
    handlers: Handlers,
}

/// The signals for which the leader shows a handler. The handlers never run: all signals are blocked.
struct Handlers {
    runtime: tokio::runtime::Runtime,
    shown: u64,
}

impl Handlers {
    fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        Ok(Self { runtime, shown: 0 })
    }

    /// Installs handlers for the signals that `payload` handles. They are never removed again; that is harmless, because whether a signal
    /// is forwarded depends on the payload's own handlers.
    fn follow(&mut self, payload: i32) {
        let new = process::caught(payload) & !self.shown;
        let _inside = self.runtime.enter();
        for number in (1..=64).filter(|number| new >> (number - 1) & 1 == 1) {
            self.shown |= 1 << (number - 1);
            let kind = tokio::signal::unix::SignalKind::from_raw(number);
            // Fails only for the few signals of programming errors, such as SIGSEGV.
            tokio::signal::unix::signal(kind).ok();
        }
    }
}

impl Pid1 {
    fn start(mut plan: Plan, events: SignalFd, call_log: CallLog) -> anyhow::Result<Self> {
        let simulated = plan.mode == Mode::Boot
            && !matches!(plan.instead, Some(Instead::Exit(_) | Instead::Signal(_)));
        let mut payload = None;
        if !simulated {
            let mut command = role(PAYLOAD_NAME, &plan)?;
            command.current_dir(plan.cwd.as_deref().unwrap_or_else(|_| Path::new("/")));
            let child = command.spawn()?;
            plan.payload = i32::try_from(child.id())?;
            payload = Some(plan.payload);
        }
        role(GUARD_NAME, &plan)?
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            plan,
            events,
            call_log,
            payload,
            ending: None,
            handlers: Handlers::new()?,
        })
    }

    /// Returns how the container ended, and whether the payload left a core dump.
    fn run(mut self, dumped: &mut bool) -> anyhow::Result<End> {
        loop {
            if let Some(end) = self.reap(dumped) {
                return Ok(end);
            }
            let timeout = match self.ending {
                Some((end, at)) if Instant::now() >= at => return Ok(end),
                Some((_, at)) => {
                    PollTimeout::try_from(at - Instant::now()).unwrap_or(PollTimeout::MAX)
                }
                None => self.mirror_handlers(),
            };
            let mut wanted = [PollFd::new(self.events.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(event) = self.events.read_signal()? {
                let number = i32::try_from(event.ssi_signo)?;
                if number == Signal::SIGCHLD as i32 {
                    continue;
                }
                self.call_log.write(&Event::Signal {
                    role: Role::Leader,
                    signal: number,
                })?;
                if let Some(end) = self.signal(number) {
                    return Ok(end);
                }
            }
        }
    }

    /// In plain mode the payload is PID 1, so its handlers must be visible on the leader.
    fn mirror_handlers(&mut self) -> PollTimeout {
        match self.payload.filter(|_| self.plan.mode == Mode::Plain) {
            Some(payload) => {
                self.handlers.follow(payload);
                PollTimeout::try_from(POLL_INTERVAL).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        }
    }

    /// Reaps ended children; the payload's end is the container's.
    fn reap(&mut self, dumped: &mut bool) -> Option<End> {
        let mut ended = None;
        process::reap(|pid, status| {
            if Some(pid) == self.payload {
                ended = End::of(status);
                *dumped = status.as_raw() & DUMPED != 0;
            }
        });
        let ended = ended?;
        Some(match (self.plan.mode, self.ending, ended) {
            (Mode::AsPid2, Some((end, _)), _) => end,
            // The stub can't pass on a signal number; it exits with this status.
            (Mode::AsPid2, None, End::Signal(_)) => End::Exit(255),
            (_, _, end) => end,
        })
    }

    fn signal(&mut self, number: i32) -> Option<End> {
        match (self.plan.mode, number - RTMIN) {
            (Mode::Plain, _) => {
                let payload = self.payload?;
                if !self.plan.ignore_signals.contains(&number) && process::catches(payload, number)
                {
                    process::send(payload, number);
                }
                None
            }
            (Mode::AsPid2, 3 | 4) => self.stop(POWER_OFF),
            (Mode::AsPid2, 5) => self.stop(RESTART),
            (Mode::AsPid2, _) if number == Signal::SIGINT as i32 => self.stop(RESTART),
            (Mode::Boot, _) if self.plan.ignore_signals.contains(&number) => None,
            (Mode::Boot, 3 | 4) => Some(POWER_OFF),
            (Mode::Boot, 5) => Some(RESTART),
            (Mode::Boot, _) if number == Signal::SIGINT as i32 => Some(RESTART),
            _ => None,
        }
    }

    /// How the stub shuts down: it signals the payload and waits 90 seconds at most.
    fn stop(&mut self, end: End) -> Option<End> {
        let payload = self.payload?;
        self.ending = Some((end, Instant::now() + Duration::from_secs(90)));
        for number in [Signal::SIGTERM as i32, Signal::SIGHUP as i32] {
            if !self.plan.ignore_signals.contains(&number) {
                process::send(payload, number);
            }
        }
        None
    }
}

/// Runs the payload's role up to exec. Returns only if the command could not be executed.
#[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
pub(crate) fn become_payload(plan: &Plan) -> anyhow::Result<i32> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid().as_raw() != plan.leader {
        return Ok(1);
    }
    setsid()?;
    SigSet::empty().thread_set_mask()?;
    match plan.instead {
        Some(Instead::Exit(code)) => return Ok(code),
        Some(Instead::Signal(number)) => match process::die_by(number, None)? {},
        Some(Instead::Sleep(true)) => loop {
            nix::unistd::pause();
        },
        Some(Instead::Sleep(false)) | None => {}
    }
    let (program, mut command) = match plan.command.split_first() {
        Some((program, rest)) => {
            let mut command = Command::new(program);
            command.args(rest);
            (program.as_str(), command)
        }
        None => {
            let mut command = Command::new("/bin/sh");
            command.arg0("-sh");
            ("/bin/sh", command)
        }
    };
    // As late as possible, because this process itself needs descriptors. A booted container has no process that they could be set for.
    for limit in &plan.rlimits {
        process::limit(limit)?;
    }
    let error = command.exec();
    let reason = error
        .raw_os_error()
        .map_or("Invalid argument", |number| Errno::from_raw(number).desc());
    eprintln!("execv({program}) failed: {reason}");
    Ok(1)
}

/// Runs the guard.
pub(crate) fn run_guard(plan: &Plan) -> anyhow::Result<()> {
    setsid()?;
    let Some(leader) = rustix::process::Pid::from_raw(plan.leader) else {
        return Ok(());
    };
    // An error means that the leader has ended already.
    let watched = rustix::process::pidfd_open(leader, rustix::process::PidfdFlags::empty());
    if let Ok(watched) = watched
        && getppid().as_raw() == plan.leader
    {
        let mut wanted = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
        while poll(&mut wanted, PollTimeout::NONE) == Err(Errno::EINTR) {}
    }
    process::kill_members(plan.payload, &plan.uuid);
    Ok(())
}
