//! The `supervise` life of the binary: the parent of one systemd-nspawn from before its start until after its end. Outlives
//! plugin and agent, sleeps in the kernel until something happens, and is small on purpose: no async runtime, no threads, no
//! gRPC. It decides nothing about jobs and reads nothing but its order.
//!
//! ```text
//!            order        leader's datagram           systemd-nspawn ended
//!   preparing ──▶ starting ───────────────▶ running ───────────────────────▶ ended: record, tell, free
//!       │             │   first's "ready"      │ the start can't be recorded
//!       │             │ nspawn ended,          ▼
//!       │             │ or the asker is gone  failing: kill
//!       └──▶ failed ◀─┴────────────────────────┘   tell, free
//! ```
//!
//! Where the container's first program is ours, it runs no command before the start is on record and it has been told so.

mod exit;
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

use super::clients::Clients;
use super::exit_status::NspawnFinalStatus;
use super::failpoint::{self, Failpoint};
use super::init_channel::InitChannel;
use super::process::{ProcessHandle, child_by_inner_pid, close_inherited, current_process};
use super::protocol::{Action, Event, StartFailure, StartStep};
use super::task_dir::{LaunchSpec, Running, TaskDir};
use super::tree_lock::SharedLocks;
use super::{logs, resource};
use crate::cgroup::Group;
use crate::container::{Process, Started};
use crate::nspawn::refusal::cause_of_host_error;
use crate::signal::Signal;

/// How long systemd-nspawn may clear up after its container was killed before it is killed too.
const NSPAWN_CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long nobody is let in after somebody could not be, as when there are no descriptors left.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How many times in a row waiting may fail.
const MAX_POLL_ERRORS: u32 = 100;

/// How often it is looked whether it takes what is kept for it. Nothing tells it.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Watches over the container whose order lies in `directory`. Standard input is the lifeline of whoever asks for it; standard
/// output, of which a supervisor has no other use, is the program that becomes the container's first.
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
        // A client that is dropped sees the end of its connection, so no other descriptor may keep that open.
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

/// What can be woken up by.
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

/// Leaves the session of whoever started this process, and becomes the one that nothing but SIGKILL ends.
fn detach() -> io::Result<SignalFd> {
    // Fails for the leader of a process group, which is what a person's shell makes of it; then there is nothing to leave.
    let _ = nix::unistd::setsid();
    if let Err(error) = std::env::set_current_dir("/") {
        let _ = writeln!(io::stderr(), "/ can't be the working directory: {error}");
    }
    // Its sockets and files are root's alone.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // The payload shall be the victim when memory runs out. Only CAP_SYS_RESOURCE allows it.
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

/// One container and everything that is known of it.
#[derive(Debug)]
struct Supervisor {
    task_dir: TaskDir,
    launch_spec: LaunchSpec,
    sockets: Sockets,
    clients: Clients,
    nspawn: Process,
    /// The locks of a tree that others use too, until systemd-nspawn has them.
    tree: Option<SharedLocks>,
    /// To the container's first program, where it is ours.
    init_channel: Option<InitChannel>,
    /// Why the command does not run, from the first program.
    start_error: Option<StartError>,
    /// The process that signals are for with `process_two`: the first program, which passes them on, until it has said which
    /// process the command is; then the command.
    command: Option<ProcessHandle>,
    /// The raw wait status of the command, from the first program.
    command_status: Option<i32>,
    state: State,
    /// Set when the container lived until it was ended by force: what systemd-nspawn says of the end is then no news.
    killed: bool,
    /// Set when systemd-nspawn itself was killed.
    nspawn_killed: bool,
    /// How far the leader's end is seen.
    leader: LeaderState,
    /// The leader's raw wait status, once it has become a child of this process and has been reaped.
    reaped: Option<i32>,
    /// What systemd-nspawn has said last.
    nspawn_status: Option<NspawnFinalStatus>,
    /// When systemd-nspawn itself is killed, after its container was.
    nspawn_deadline: Option<Instant>,
    /// Until when nobody is let in. Who knocks waits, and keeps nobody awake.
    accept_paused_until: Option<Instant>,
    /// Signals that the image's init does not take yet.
    pending_signals: Vec<Signal>,
    /// Whether the end has been recorded and told.
    exit_reported: bool,
}

/// How far the end of the container's first process is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaderState {
    Alive,
    /// Its status is known to nobody yet.
    Ended,
    /// Its parent has waited for it. Kernels before 6.9 do not tell.
    Reaped,
}

#[derive(Debug)]
enum State {
    Starting {
        /// As systemd-nspawn tells it.
        leader: Option<i32>,
        /// Whether the first program waits for the word to go. The image's own waits for nothing.
        ready: bool,
    },
    /// It came up and must not stay.
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
        resource::remove_leaked_mounts(&launch_spec.machine);
        let tree = launch_spec.shared_tree();
        let tree = tree.map(|tree| SharedLocks::take(&task_dir, tree));
        let (child, init_channel) = spawn::spawn(&task_dir, launch_spec.first, stdout, stderr)
            .map_err(|error| failure(StartStep::Nspawn, &error))?;
        let pid = i32::try_from(child.id())
            .map_err(|_| failure(StartStep::Nspawn, &io::ErrorKind::InvalidData.into()))?;
        // Not reaped yet, so the pid is its own.
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
            nspawn_deadline: None,
            accept_paused_until: None,
            pending_signals: Vec::new(),
            exit_reported: false,
        })
    }

    /// Sleeps until something happens, and deals with it, until systemd-nspawn has ended.
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
                .nspawn_deadline
                .is_some_and(|end| Instant::now() >= end)
            {
                self.nspawn_deadline = None;
                self.kill_nspawn();
            }
            self.accept_paused_until = self.accept_paused_until.filter(|end| Instant::now() < *end);
        };
        self.finish(status);
    }

    /// The kernel lets nobody wait, as when this process may have fewer descriptors than it has. For a while everything is looked
    /// at now and then instead; a container that can't be watched must not run.
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
        let ends = [self.nspawn_deadline, self.accept_paused_until, look];
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

    /// Reads what systemd-nspawn says. The pid of the leader is the start, and its farewell says that nothing but clearing up is
    /// left to it; everything else is small talk.
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

    /// Reads what the container's first program says, where it is ours.
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
            // A command may have ended before anybody could look at it: then its end is all there is to see.
            Err(error) if no_such_process(&error) => None,
            Err(error) => return self.fail(&error),
        };
        let copy = self
            .launch_spec
            .copies()
            .and_then(|copies| resource::ephemeral_root_of(leader, copies))
            // The container may have mounted something over its root whose name is that of another one's copy.
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
            uids: resource::first_uid_of(leader),
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
        // Our own first program runs nothing without it, and what follows may need its descriptor.
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
                // As a signal like others it would end the container too, but systemd-nspawn would tell another end.
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
            // Whoever asked for the start has died and will ask again; two of the same must not run.
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

/// Whether it means that there is no such process.
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
    /// Anything may have happened.
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
