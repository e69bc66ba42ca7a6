//! The supervisor process (`supervise DIR`): parent of one systemd-nspawn from before its start until after its exit. Outlives
//! plugin and agent, sleeps in `poll` until something happens, and is small on purpose: no async runtime, no threads, no gRPC. It
//! makes no decisions about jobs and reads only its launch spec.
//!
//! ```text
//!         launch spec     leader's datagram           systemd-nspawn exited
//!   preparing ──▶ starting ───────────────▶ running ───────────────────────▶ exited: record, report, release
//!       │             │   init's "ready"       │ the start can't be recorded
//!       │             │ nspawn exited,         ▼
//!       │             │ or the owner is gone  failing: kill
//!       └──▶ failed ◀─┴────────────────────────┘   report, release
//! ```
//!
//! If PID 1 of the container is the driver's init, it runs no command before the start is recorded and the supervisor has sent it "go".

mod clients;
mod exit;
mod exit_status;
mod logs;
mod signals;
mod spawn;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nspawn_init::{InitEvent, StartError};

use self::clients::Clients;
use self::exit_status::NspawnFinalStatus;
use crate::cgroup::Group;
use crate::container::{Process, Started};
use crate::failpoint::{self, Failpoint};
use crate::lease::{self, SharedLocks};
use crate::nspawn::refusal::cause_of_host_error;
use crate::signal::Signal;
use crate::state::task_dir::{LaunchSpec, Running, TaskDir};
use crate::supervisor::init_channel::InitChannel;
use crate::supervisor::protocol::{Action, Event, StartFailure, StartStep};
use crate::sys::process::{ProcessHandle, child_by_inner_pid, close_inherited, current_process};

/// How long systemd-nspawn may clean up after its container was killed before it is killed too.
const NSPAWN_CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);

/// The same after the container exited by itself and systemd-nspawn has announced that it is cleaning up: it is alive, and only its own exit
/// status tells what it knows of the container's.
const NSPAWN_ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the supervisor accepts no clients after accept(2) has failed, for example because no descriptors are left.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How many times in a row `poll` may fail.
const MAX_POLL_ERRORS: u32 = 100;

/// How often to check whether the payload handles its pending signals yet. No event reports that.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Supervises the container whose launch spec is in `directory`. Standard input is the connection to the client that requested the
/// start. Standard output, for which a supervisor has no other use, is the program that becomes PID 1 of the container.
pub fn supervise(directory: &Path) -> ExitCode {
    close_inherited();
    let task_dir = TaskDir::new(directory);
    failpoint::hit(&task_dir, Failpoint::Supervising);
    let owner = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from);
    let mut clients = Clients::default();
    if let Ok(owner) = owner {
        clients.add(owner);
        // A client that is dropped must see its connection close, so no other descriptor may keep the connection open.
        let accept_paused_until =
            File::open("/dev/null").and_then(|null| Ok(nix::unistd::dup2_stdin(null)?));
        if let Err(error) = accept_paused_until {
            let _ = writeln!(io::stderr(), "standard input can't be closed: {error}");
        }
    }
    match prepare(&task_dir).and_then(|(launch_spec, sockets)| {
        Supervisor::start(task_dir.clone(), launch_spec, sockets)
    }) {
        Ok(mut supervisor) => {
            supervisor.clients = clients;
            supervisor.run();
            ExitCode::SUCCESS
        }
        Err(failure) => {
            task_dir.discard_secrets();
            clients.broadcast(&Event::Failed(failure));
            ExitCode::FAILURE
        }
    }
}

/// The descriptors that wake up the supervisor.
#[derive(Debug)]
struct Sockets {
    signals: SignalFd,
    notify: UnixDatagram,
    control_socket: UnixListener,
}

fn prepare(task_dir: &TaskDir) -> Result<(LaunchSpec, Sockets), StartFailure> {
    let launch_spec = task_dir
        .launch_spec()
        .map_err(|error| failure(StartStep::Order, &error))?;
    let sockets = detach()
        .and_then(|signals| listen(task_dir, signals))
        .map_err(|error| failure(StartStep::Notify, &error))?;
    Ok((launch_spec, sockets))
}

/// Leaves the session of the process that started this one, and blocks all signals, so that only SIGKILL ends this process.
fn detach() -> io::Result<SignalFd> {
    // Fails for the leader of a process group, which an interactive shell makes of it; then there is no session to leave.
    let _ = nix::unistd::setsid();
    if let Err(error) = std::env::set_current_dir("/") {
        let _ = writeln!(io::stderr(), "/ can't be the working directory: {error}");
    }
    // Only root may access its sockets and files.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // The payload should be the OOM victim, not the supervisor. Only CAP_SYS_RESOURCE allows this value.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000")
        && error.kind() != io::ErrorKind::PermissionDenied
    {
        let _ = writeln!(
            io::stderr(),
            "oom_score_adj can't be set: the kernel may end this process for want of memory, and the container with it: {error}"
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

fn listen(task_dir: &TaskDir, signals: SignalFd) -> io::Result<Sockets> {
    let notify = UnixDatagram::bind(task_dir.notify_socket())?;
    let control_socket = UnixListener::bind(task_dir.control_socket())?;
    notify.set_nonblocking(true)?;
    control_socket.set_nonblocking(true)?;
    Ok(Sockets {
        signals,
        notify,
        control_socket,
    })
}

fn failure(step: StartStep, error: &io::Error) -> StartFailure {
    StartFailure::new(step, cause_of_host_error(error), error.to_string())
}

/// One container and all the supervisor knows about it.
#[derive(Debug)]
struct Supervisor {
    task_dir: TaskDir,
    launch_spec: LaunchSpec,
    sockets: Sockets,
    clients: Clients,
    nspawn: Process,
    /// The locks of a tree that other containers share, until systemd-nspawn holds them.
    tree: Option<SharedLocks>,
    /// Channel to PID 1 of the container, if that is the driver's init.
    init_channel: Option<InitChannel>,
    /// Why the command does not run, as reported by the driver's init.
    start_error: Option<StartError>,
    /// The process that receives signals with `process_two`: the init, which forwards them, until it has reported the command's
    /// pid; then the command.
    command: Option<ProcessHandle>,
    /// The raw wait status of the command, as reported by the driver's init.
    command_status: Option<i32>,
    state: State,
    /// Set if the container was still alive when it was killed: the status that systemd-nspawn then reports adds nothing.
    killed: bool,
    /// Set when systemd-nspawn itself was killed.
    nspawn_killed: bool,
    /// How much of the leader's exit has been seen.
    leader: LeaderState,
    /// The leader's raw wait status, once the leader has become a child of this process and has been reaped.
    reaped: Option<i32>,
    /// The last final status that systemd-nspawn has sent.
    nspawn_status: Option<NspawnFinalStatus>,
    /// When systemd-nspawn is killed, after the container has been killed.
    kill_deadline: Option<Instant>,
    /// When the container was seen to have exited by itself, if systemd-nspawn is to exit soon after it.
    leader_exited_at: Option<Instant>,
    /// Until when no clients are accepted. Their connections stay in the backlog and do not wake up the supervisor.
    accept_paused_until: Option<Instant>,
    /// Signals that the image's init does not handle yet.
    pending_signals: Vec<Signal>,
    /// Whether the exit has been recorded and reported.
    exit_reported: bool,
}

/// How much of the exit of the container's PID 1 has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaderState {
    Alive,
    /// It has exited; its status is not available yet.
    Ended,
    /// Its parent has waited for it. Kernels before 6.9 do not report this.
    Reaped,
}

#[derive(Debug)]
enum State {
    Starting {
        /// As reported by systemd-nspawn.
        leader: Option<i32>,
        /// Whether the driver's init waits for "go". An image's own init waits for nothing, so this is always true for it.
        ready: bool,
    },
    /// It came up but must not keep running.
    Failing(StartFailure),
    Running {
        running: Box<Running>,
        leader: Option<ProcessHandle>,
        since: Instant,
    },
}

impl Supervisor {
    fn start(
        task_dir: TaskDir,
        launch_spec: LaunchSpec,
        sockets: Sockets,
    ) -> Result<Self, StartFailure> {
        let stdout = logs::open(launch_spec.stdout.as_deref())
            .map_err(|error| failure(StartStep::Logs, &error))?;
        let stderr = logs::open(launch_spec.stderr.as_deref())
            .map_err(|error| failure(StartStep::Logs, &error))?;
        if let Some(group) = launch_spec.cgroup() {
            Group::new(group)
                .create()
                .map_err(|error| failure(StartStep::Cgroup, &error))?;
        }
        failpoint::hit(&task_dir, Failpoint::CgroupMade);
        lease::remove_leaked_mounts(&launch_spec.machine);
        let tree = launch_spec.shared_tree();
        let tree = tree.map(|tree| SharedLocks::take(task_dir.path(), tree));
        let (child, init_channel) = spawn::spawn(&task_dir, launch_spec.first, stdout, stderr)
            .map_err(|error| failure(StartStep::Nspawn, &error))?;
        let pid = i32::try_from(child.id())
            .map_err(|_| failure(StartStep::Nspawn, &io::ErrorKind::InvalidData.into()))?;
        // Not reaped yet, so the pid can't have been reused.
        let nspawn =
            ProcessHandle::open(pid).map_or(Process { pid, start: 0 }, |handle| handle.process());
        failpoint::hit(&task_dir, Failpoint::Spawned);
        let clients = Clients::default();
        let (leader, ready) = (None, init_channel.is_none());
        Ok(Self {
            task_dir,
            launch_spec,
            sockets,
            clients,
            nspawn,
            tree,
            init_channel,
            start_error: None,
            command: None,
            command_status: None,
            state: State::Starting { leader, ready },
            killed: false,
            nspawn_killed: false,
            leader: LeaderState::Alive,
            reaped: None,
            nspawn_status: None,
            kill_deadline: None,
            leader_exited_at: None,
            accept_paused_until: None,
            pending_signals: Vec::new(),
            exit_reported: false,
        })
    }

    /// Waits for events and handles them until systemd-nspawn has exited.
    fn run(&mut self) {
        let mut poll_errors = 0;
        let status = loop {
            let ready = match self.poll() {
                Ok(ready) => {
                    poll_errors = 0;
                    ready
                }
                Err(error) => {
                    poll_errors += 1;
                    self.on_poll_error(poll_errors, error);
                    Ready::all()
                }
            };
            if ready.notify {
                self.read_notify_socket();
            }
            self.read_init_channel();
            self.start_if_ready();
            if ready.control_socket {
                self.accept_clients();
            }
            self.handle_requests();
            self.flush_pending_signals();
            if let Some(leader) = ready.leader {
                self.see_leader(leader);
            }
            if let Some(status) = self.early_exit_status() {
                self.report_exit(status);
            }
            if ready.signals
                && let Some(status) = self.reap()
            {
                break status;
            }
            if self
                .nspawn_deadline()
                .is_some_and(|end| Instant::now() >= end)
            {
                self.kill_deadline = None;
                self.leader_exited_at = None;
                self.kill_nspawn();
            }
            self.accept_paused_until = self.accept_paused_until.filter(|end| Instant::now() < *end);
        };
        self.finish(status);
    }

    /// `poll` failed, for example because RLIMIT_NOFILE was lowered below the number of open descriptors. For a while everything is
    /// checked every 100 ms instead; if `poll` keeps failing, the container is killed, because a container that can't be supervised
    /// must not run.
    fn on_poll_error(&mut self, times: u32, error: nix::Error) {
        match times {
            1 => drop(writeln!(io::stderr(), "waiting failed: {error}")),
            MAX_POLL_ERRORS => {
                let _ = writeln!(io::stderr(), "waiting still fails: the container is ended");
                self.kill();
            }
            _ => {}
        }
        std::thread::sleep(RETRY_DELAY);
    }

    fn poll(&self) -> nix::Result<Ready> {
        let door = match self.accept_paused_until {
            None => PollFlags::POLLIN,
            Some(_) => PollFlags::empty(),
        };
        let mut descriptors = vec![
            PollFd::new(self.sockets.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.sockets.notify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.sockets.control_socket.as_fd(), door),
        ];
        let init = self.init_channel.as_ref().and_then(InitChannel::descriptor);
        descriptors.extend(
            self.clients
                .descriptors()
                .chain(init)
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN)),
        );
        let last = descriptors.len();
        descriptors.extend(self.leader_poll_fd());
        let look = (!self.pending_signals.is_empty()).then(|| Instant::now() + POLL_INTERVAL);
        let ends = [self.nspawn_deadline(), self.accept_paused_until, look];
        let limit = match ends.into_iter().flatten().min() {
            None => PollTimeout::NONE,
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut descriptors, limit) {
            Err(nix::Error::EINTR) => return Ok(Ready::default()),
            other => other?,
        };
        let ready = |index: usize| descriptors[index].any().unwrap_or(true);
        let leader = descriptors.get(last).and_then(PollFd::revents);
        Ok(Ready {
            leader: leader.and_then(|seen| match seen {
                seen if seen.contains(PollFlags::POLLHUP) => Some(LeaderState::Reaped),
                seen if seen.contains(PollFlags::POLLIN) => Some(LeaderState::Ended),
                _ => None,
            }),
            signals: ready(0),
            notify: ready(1),
            control_socket: ready(2),
        })
    }

    /// Reads the notifications of systemd-nspawn. The leader's pid means that the container has started; the final status means
    /// that only cleanup is left to do. Everything else is ignored.
    fn read_notify_socket(&mut self) {
        let mut datagram = [0; 4096];
        while let Ok(length) = self.sockets.notify.recv(&mut datagram) {
            let text = String::from_utf8_lossy(&datagram[..length]);
            let pid = text
                .lines()
                .find_map(|line| line.strip_prefix("X_NSPAWN_LEADER_PID=")?.parse().ok());
            if let (Some(pid), State::Starting { leader, .. }) = (pid, &mut self.state) {
                leader.get_or_insert(pid);
            }
            self.nspawn_status = text
                .lines()
                .find_map(NspawnFinalStatus::of)
                .or(self.nspawn_status);
        }
    }

    /// Reads the events of the driver's init, if the container has one.
    fn read_init_channel(&mut self) {
        let Some(channel) = &mut self.init_channel else {
            return;
        };
        while let Some(event) = channel.recv() {
            match event {
                InitEvent::Ready => {
                    let init = channel.peer_pid();
                    self.command = init.and_then(|init| ProcessHandle::open(init).ok());
                    if let State::Starting { ready, .. } = &mut self.state {
                        *ready = true;
                    }
                }
                InitEvent::Failed(start_error) => self.start_error = Some(start_error),
                InitEvent::Ended { status } => self.command_status = Some(status),
                InitEvent::Running { pid } => {
                    let init = channel.peer_pid();
                    let command = init.and_then(|init| child_by_inner_pid(init, pid));
                    self.command = command.or_else(|| self.command.take());
                }
                InitEvent::ExecRunning { .. }
                | InitEvent::ExecFailed { .. }
                | InitEvent::ExecEnded { .. } => {}
            }
        }
    }

    fn start_if_ready(&mut self) {
        if let State::Starting {
            leader: Some(leader),
            ready: true,
        } = self.state
        {
            self.record_start(leader);
        }
    }

    fn record_start(&mut self, leader: i32) {
        self.tree = None;
        let handle = match ProcessHandle::open(leader) {
            Ok(handle) => Some(handle),
            // A command may have exited before it could be looked up: then its exit is all there is to see.
            Err(error) if no_such_process(&error) => None,
            Err(error) => return self.fail(&error),
        };
        let copy = self
            .launch_spec
            .copies()
            .and_then(|copies| lease::ephemeral_root_of(leader, copies))
            // The container may have mounted something over its root whose name is that of another container's copy.
            .filter(|copy| is_root_of(leader, copy));
        let started = Started {
            id: self.launch_spec.id.clone(),
            machine: self.launch_spec.machine.clone(),
            state: self.task_dir.path().to_owned(),
            boot: self.launch_spec.boot.clone(),
            supervisor: current_process().unwrap_or(Process { pid: 0, start: 0 }),
            leader: handle.as_ref().map_or(
                Process {
                    pid: leader,
                    start: 0,
                },
                ProcessHandle::process,
            ),
            mode: self.launch_spec.mode,
            cgroup: self.launch_spec.cgroup().map(Path::to_owned),
            started_at: SystemTime::now(),
            notes: self.launch_spec.notes.clone(),
        };
        let running = Running {
            started: started.clone(),
            nspawn: self.nspawn,
            copy,
            uids: lease::first_uid_of(leader),
            alloc_dir: self.launch_spec.alloc_dir.clone(),
        };
        self.state = State::Running {
            running: Box::new(running.clone()),
            leader: handle,
            since: Instant::now(),
        };
        failpoint::hit(&self.task_dir, Failpoint::Heard);
        if let Err(error) = self.task_dir.write_running(&running) {
            // A container that could not be found again must not run.
            let _ = writeln!(io::stderr(), "the start can't be recorded: {error}");
            return self.fail(&error);
        }
        failpoint::hit(&self.task_dir, Failpoint::Recorded);
        if let Some(init_channel) = &self.init_channel {
            init_channel.send_go();
        }
        self.clients.broadcast(&Event::Started(started));
    }

    /// Undoes the start.
    fn fail(&mut self, error: &io::Error) {
        self.state = State::Failing(failure(StartStep::Watch, error));
        // The driver's init runs no command without the channel, and what follows may need its descriptor.
        self.init_channel = None;
        self.kill();
    }

    fn accept_clients(&mut self) {
        loop {
            let stream = match self.sockets.control_socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.accept_paused_until = Some(Instant::now() + RETRY_DELAY);
                    return;
                }
            };
            let event = match &self.state {
                State::Starting { .. } | State::Failing(_) => None,
                State::Running { running, .. } => Some(Event::Started(running.started.clone())),
            };
            self.clients.add(stream);
            if let Some(event) = event {
                self.clients.send_to_last(&event);
            }
        }
    }

    fn handle_requests(&mut self) {
        for (index, request) in self.clients.requests() {
            let error = match request.verb {
                // Sent like any other signal, SIGKILL would end the container too, but systemd-nspawn would report a different
                // exit.
                Action::Signal(number) if number == Signal::KILL.number() => {
                    self.kill();
                    Ok(())
                }
                Action::Signal(number) => self.signal(Signal::from_number(number)),
                Action::Stop => {
                    let stop_signal = self.stop_signal();
                    self.signal(stop_signal)
                }
                Action::Kill => {
                    self.kill();
                    Ok(())
                }
            };
            failpoint::hit(&self.task_dir, Failpoint::Signalled);
            let error = error.err().map(|error| error.to_string());
            let request = request.request;
            self.clients.answer(index, &Event::Done { request, error });
        }
        let owner_is_gone = self.clients.drop_disconnected();
        if owner_is_gone && matches!(self.state, State::Starting { .. }) {
            // The client that requested the start is gone and will request it again; the same container must not run twice.
            self.kill();
        }
    }
}

/// Whether this directory is the root directory of a process.
fn is_root_of(pid: i32, directory: &Path) -> bool {
    let root = std::fs::metadata(format!("/proc/{pid}/root"));
    let directory = std::fs::symlink_metadata(directory);
    root.is_ok_and(|root| {
        directory.is_ok_and(|other| (root.dev(), root.ino()) == (other.dev(), other.ino()))
    })
}

/// Whether the error means that there is no such process.
fn no_such_process(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(nix::Error::ESRCH as i32)
}

#[derive(Debug, Default)]
struct Ready {
    signals: bool,
    notify: bool,
    control_socket: bool,
    leader: Option<LeaderState>,
}

impl Ready {
    /// Treats every descriptor as ready.
    fn all() -> Self {
        Self {
            signals: true,
            notify: true,
            control_socket: true,
            leader: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_known_by_its_device_and_number() {
        let scratch = tempfile::tempdir().unwrap();
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        let me = nix::unistd::getpid().as_raw();
        assert!(is_root_of(me, Path::new("/")));
        for other in [scratch.path(), &link, Path::new("/nowhere")] {
            assert!(!is_root_of(me, other), "{}", other.display());
        }
    }
}
