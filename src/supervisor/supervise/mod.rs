//! The supervisor process (`supervise DIR`): parent of one systemd-nspawn from before its start until after its exit. Outlives
//! plugin and agent, sleeps in the kernel until something happens, and is small on purpose: no async runtime, no gRPC, and no
//! thread besides the main one while the container runs. It starts one for a log FIFO that has no reader yet (`logs`), those that make the
//! network (`network`) and write sysctls (`inside`) before the command runs, one for each change that the host has made to its mounts (`later_mounts`), and one when the container has ended (`release`). It makes no decisions about jobs and reads only its
//! launch spec. This file is the start of the process; the rest is
//!
//! | module | subject |
//! |---|---|
//! | `state` | everything known about the container; its start |
//! | `inside` | what is applied to the container before its command runs |
//! | `network` | the network that the driver makes for it |
//! | `ready` | whether it is ready |
//! | `output`, `console`, `followed_journal`, `log_writer` | what a booted container prints, and the logs it is written to |
//! | `later_mounts` | what the host mounts below its volumes later |
//! | `run`, `event_loop` | the loop; epoll and timers |
//! | `notes` | what the user should know |
//! | `requests`, `clients` | what clients request; how it travels |
//! | `signals` | signals, stop and kill |
//! | `exit`, `exit_status` | the exit; its status |
//! | `release` | what is left to do after it |
//! | `spawn` | the process that becomes systemd-nspawn |
//!
//! ```text
//!         launch spec     leader's datagram           systemd-nspawn exited
//!   preparing ──▶ starting ───────────────▶ running ───────────────────────▶ exited: kill what is left
//!       │             │   init's "ready"       │ the start can't be recorded    │
//!       │             │ nspawn exited,         ▼                                ▼
//!       │             │ or the owner is gone  failing: kill                   releasing, in a thread: clients are still served
//!       └──▶ failed ◀─┴────────────────────────┘   report, release
//! ```
//!
//! An exit is recorded and reported as soon as it is certain: usually a moment before systemd-nspawn exits, otherwise when what is
//! left has been killed.
//!
//! If PID 1 of the container is the driver's init, it runs no command before the start is recorded and the supervisor has sent it "go".

mod cgroups;
mod clients;
mod console;
mod event_loop;
mod exit;
mod exit_status;
mod followed_journal;
mod inside;
mod later_mounts;
mod log_writer;
mod network;
mod notes;
mod output;
mod ready;
mod release;
mod requests;
mod run;
mod signals;
mod spawn;
mod state;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::clients::{Clients, ControlSockets};
use self::event_loop::{EventLoop, Source, Token};
use self::state::{Ending, LeaderState, State, Supervisor};
use crate::failpoint::{self, Failpoint};
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::task_dir::{LaunchSpec, TaskDir};
use crate::supervisor::framing::Framing;
use crate::supervisor::protocol::{Event, StartFailure, StartStep};
use crate::sys::process::{close_inherited, set_oom_score_adj};

/// How long systemd-nspawn may clean up after its container was killed before it is killed too; how long what has outlived it may
/// take to exit once it is killed.
const NSPAWN_CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);

/// The same after the container exited by itself and systemd-nspawn has announced that it is cleaning up: it is alive, and only its own exit
/// status tells what it knows of the container's.
const NSPAWN_ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the supervisor accepts no clients after accept(2) has failed, for example because no descriptors are left; how often it
/// checks what it can't wait for.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How many times in a row waiting may fail.
const MAX_WAIT_ERRORS: u32 = 100;

/// How often to check whether the payload handles its pending signals yet. No event reports that.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Supervises the container whose launch spec is in `directory`. Standard input is the connection to the client that requested the
/// start. Standard output, for which a supervisor has no other use, is the program that becomes PID 1 of the container.
pub fn supervise(directory: &Path) -> ExitCode {
    close_inherited();
    let task_dir = TaskDir::new(directory);
    failpoint::hit(&task_dir, Failpoint::Supervising);
    match begin(&task_dir, take_owner()) {
        Some(mut supervisor) => {
            supervisor.run();
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

/// Starts the container. If that fails, the client that requested the start is sent the reason.
fn begin(task_dir: &TaskDir, owner: Option<OwnedFd>) -> Option<Supervisor> {
    let mut clients = Clients::default();
    let events = match EventLoop::new() {
        Ok(events) => events,
        Err(error) => {
            task_dir.discard_secrets();
            let failed = Event::Failed(failure(StartStep::Notify, &error));
            // A client that is gone does not need it.
            let _ = Framing::Packets.send(owner?, &failed);
            return None;
        }
    };
    if let Some(owner) = owner {
        clients.add(owner, Framing::Packets, &events);
    }
    let started = prepare(task_dir, &events).and_then(|(launch_spec, sockets)| {
        Supervisor::start(task_dir.clone(), launch_spec, sockets, events)
    });
    match started {
        Ok(supervisor) => Some(Supervisor {
            clients,
            ..supervisor
        }),
        Err(failure) => {
            task_dir.discard_secrets();
            clients.broadcast(&Event::Failed(failure));
            None
        }
    }
}

/// The connection to the client that requested the start.
fn take_owner() -> Option<OwnedFd> {
    let owner = io::stdin().as_fd().try_clone_to_owned().ok()?;
    // A client that is dropped must see its connection close, so no other descriptor may keep the connection open.
    let replaced = File::open("/dev/null").and_then(|null| Ok(nix::unistd::dup2_stdin(null)?));
    if let Err(error) = replaced {
        let _ = writeln!(
            io::stderr(),
            "standard input can't be replaced by /dev/null: {error}"
        );
    }
    Some(owner)
}

/// The sources that exist before anything is started. So a supervisor that can't wait for them starts nothing.
#[derive(Debug)]
struct Sockets {
    signals: Source<SignalFd>,
    notify: Source<UnixDatagram>,
    control: ControlSockets,
}

fn prepare(task_dir: &TaskDir, events: &EventLoop) -> Result<(LaunchSpec, Sockets), StartFailure> {
    let launch_spec = task_dir
        .launch_spec()
        .map_err(|error| failure(StartStep::Order, &error))?;
    let sockets = detach()
        .and_then(|signals| listen(task_dir, signals, events))
        .map_err(|error| failure(StartStep::Notify, &error))?;
    Ok((launch_spec, sockets))
}

/// Leaves the session of the process that started this one, and blocks all signals, so that only SIGKILL ends this process.
fn detach() -> io::Result<SignalFd> {
    // Fails for the leader of a process group, which an interactive shell makes of it; then there is no session to leave.
    let _ = nix::unistd::setsid();
    if let Err(error) = std::env::set_current_dir("/") {
        let _ = writeln!(
            io::stderr(),
            "the working directory can't be changed to /: {error}"
        );
    }
    // Only root may access its sockets and files.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // The payload should be the OOM victim, not the supervisor. Only CAP_SYS_RESOURCE allows this value.
    if let Err(error) = set_oom_score_adj(nix::unistd::getpid().as_raw(), -1000)
        && error.kind() != io::ErrorKind::PermissionDenied
    {
        let _ = writeln!(
            io::stderr(),
            "oom_score_adj can't be set, so under memory pressure the kernel may kill this process, and with it the container: {error}"
        );
    }
    nix::sys::prctl::set_child_subreaper(true)?;
    let all = SigSet::all();
    all.thread_block()?;
    let mut children = SigSet::empty();
    children.add(nix::sys::signal::Signal::SIGCHLD);
    Ok(SignalFd::with_flags(
        &children,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

fn listen(task_dir: &TaskDir, signals: SignalFd, events: &EventLoop) -> io::Result<Sockets> {
    let notify = UnixDatagram::bind(task_dir.notify_socket())?;
    notify.set_nonblocking(true)?;
    Ok(Sockets {
        signals: events.register(signals, Token::Signals)?,
        notify: events.register(notify, Token::Notify)?,
        control: ControlSockets::listen(task_dir, events)?,
    })
}

fn failure(step: StartStep, error: &io::Error) -> StartFailure {
    StartFailure::new(step, cause_of_host_error(error), error.to_string())
}
