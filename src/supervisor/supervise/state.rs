//! Everything a supervisor knows about its container, and its start: what is prepared, what systemd-nspawn and the driver's init
//! report, and the record of the start. Runs in the supervisor process.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Instant, SystemTime};

use nspawn_init::{InitEvent, StartError};

use super::cgroups::{self, Cgroups};
use super::clients::Clients;
use super::event_loop::{EventLoop, Pollable, Source, Token};
use super::exit_status::NspawnFinalStatus;
use super::later_mounts::Follower;
use super::network::{self, Preparation, Services};
use super::notes::Notes;
use super::output::{FinalMessages, Output};
use super::ready::{self, Readiness, Said};
use super::release::ReleaseThread;
use super::{Sockets, failure, spawn};
use crate::container::{Cause, Process, Started};
use crate::failpoint::{self, Failpoint};
use crate::lease::{self, SharedLocks, UidRange};
use crate::seccomp::{self, Store};
use crate::signal::Signal;
use crate::state::task_dir::{LaunchSpec, Pid1, Running, TaskDir};
use crate::supervisor::init_channel::InitChannel;
use crate::supervisor::logs;
use crate::supervisor::protocol::{Event, StartFailure, StartStep};
use crate::sys::process::{
    ProcessHandle, child_by_inner_pid, current_process, seccomp_filter_count,
};

/// One container and all the supervisor knows about it.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) task_dir: TaskDir,
    pub(super) launch_spec: LaunchSpec,
    pub(super) events: EventLoop,
    pub(super) sockets: Sockets,
    pub(super) clients: Clients,
    pub(super) nspawn: Process,
    pub(super) cgroups: Cgroups,
    /// What further commands have in common with the task's own: a file without a name, so that it takes no memory of this process.
    pub(super) exec_defaults: File,
    /// The network that is being prepared, until the container is connected to it.
    pub(super) network: Option<Preparation>,
    /// What serves the connected container.
    pub(super) services: Services,
    /// Follows what the host mounts, once the container runs.
    pub(super) follower: Option<Follower>,
    /// The lock of the range of ids that was picked for the container.
    pub(super) uid_range: Option<SharedLocks>,
    /// The locks of a tree that other containers share, until systemd-nspawn holds them.
    pub(super) tree: Option<SharedLocks>,
    /// What the system or the command says about itself.
    pub(super) said: Said,
    /// The wait for a container that has to say that it is ready.
    pub(super) readiness: Option<Readiness>,
    /// What a booted container prints, until its exit is reported.
    pub(super) output: Option<Output>,
    /// What the user should know.
    pub(super) notes: Notes,
    /// Channel to PID 1 of the container, if that is the driver's init.
    pub(super) init_channel: Option<Source<InitChannel>>,
    /// The process that receives signals with `process_two`: the init, which forwards them, until it has reported the command's
    /// pid; then the command.
    pub(super) command: Option<ProcessHandle>,
    pub(super) state: State,
    /// Signals that the image's init does not handle yet.
    pub(super) pending_signals: Vec<Signal>,
    /// When a plugin last asked the container to end, or sent it a signal.
    pub(super) asked_at: Option<Instant>,
    pub(super) exit: ExitFacts,
    pub(super) ending: Ending,
}

#[derive(Debug)]
pub(super) enum State {
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
        leader: Option<Source<ProcessHandle>>,
        since: Instant,
    },
}

/// What is known about the exit of the container, and when to wait for it no longer.
#[derive(Debug, Default)]
pub(super) struct ExitFacts {
    /// Why the command does not run, as reported by the driver's init.
    pub(super) start_error: Option<StartError>,
    /// The raw wait status of the command, as reported by the driver's init.
    pub(super) command_status: Option<i32>,
    /// How much of the leader's exit has been seen.
    pub(super) leader: LeaderState,
    /// The leader's raw wait status as wait(2) gives it to the parent: read before the parent has waited, or by this process once the leader has
    /// become its child.
    pub(super) waited: Option<i32>,
    /// The last final status that systemd-nspawn has sent.
    pub(super) nspawn_status: Option<NspawnFinalStatus>,
    /// What a booted system has said at its end.
    pub(super) messages: FinalMessages,
    /// Set if the container was still alive when it was killed: the status that systemd-nspawn then reports adds nothing.
    pub(super) killed: bool,
    /// Set when systemd-nspawn itself was killed.
    pub(super) nspawn_killed: bool,
    /// When systemd-nspawn is killed, after the container has been killed.
    pub(super) kill_deadline: Option<Instant>,
    /// When the container was seen to have exited by itself, if systemd-nspawn is to exit soon after it.
    pub(super) leader_exited_at: Option<Instant>,
    /// The last event, once it has been sent to all clients: how the container exited or why it did not come up. A client that connects
    /// later is sent it too.
    pub(super) reported: Option<Event>,
}

/// How much of the exit of the container's PID 1 has been seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum LeaderState {
    #[default]
    Alive,
    /// It has exited; its status is not available yet.
    Ended,
    /// Its parent has waited for it. Kernels before 6.9 do not report this.
    Reaped,
}

/// How far the end has come.
#[derive(Debug)]
pub(super) enum Ending {
    /// systemd-nspawn has not exited.
    NspawnRuns,
    /// It has exited with this status. What has outlived it is killed, and waited for until then.
    KillingRest { status: ExitStatus, until: Instant },
    /// The exit has been reported, and a thread releases the resources.
    Releasing(ReleaseThread),
    /// Everything has been released, or can't be.
    Released,
}

impl Pollable for InitChannel {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        InitChannel::descriptor(self)
    }
}

impl Supervisor {
    pub(super) fn start(
        task_dir: TaskDir,
        launch_spec: LaunchSpec,
        sockets: Sockets,
        events: EventLoop,
    ) -> Result<Self, StartFailure> {
        let step = |step| move |error: io::Error| failure(step, &error);
        let exec_defaults = task_dir.take_exec_defaults();
        let exec_defaults = exec_defaults.map_err(step(StartStep::Order))?;
        let open = |path: &Option<_>| logs::open(path.as_deref());
        let logs = open(&launch_spec.stdout).and_then(|out| Ok((out, open(&launch_spec.stderr)?)));
        let (streams, output) = logs
            .and_then(|logs| {
                let nspawn_stderr = || task_dir.open_nspawn_stderr();
                Output::open(&launch_spec.output, logs, nspawn_stderr, &events)
            })
            .map_err(step(StartStep::Logs))?;
        let readiness = readiness(&task_dir, &launch_spec, &events);
        let readiness = readiness.map_err(step(StartStep::Notify))?;
        let cgroups = Cgroups::create(&launch_spec, &events)?;
        failpoint::hit(&task_dir, Failpoint::CgroupMade);
        lease::remove_leaked_mounts(&launch_spec.machine);
        let uid_range = launch_spec.uid_range().map(UidRange::hold).transpose();
        let uid_range = uid_range.map_err(|error| {
            cgroups::remove(&launch_spec);
            StartFailure::new(StartStep::Nspawn, Cause::Busy, error.to_string())
        })?;
        let tree = launch_spec.tree_lock();
        let tree = tree.and_then(|lock| lock.prepare(task_dir.path()));
        let network = network::prepare(launch_spec.network())
            .inspect_err(|_| cgroups::remove(&launch_spec))
            .map_err(step(StartStep::Network))?;
        let (nspawn, init_channel) = spawn::spawn(&task_dir, launch_spec.first, streams)
            .inspect_err(|_| cgroups::remove(&launch_spec))
            .map_err(step(StartStep::Nspawn))?;
        failpoint::hit(&task_dir, Failpoint::Spawned);
        let (leader, ready) = (None, init_channel.is_none());
        let mut supervisor = Self {
            task_dir,
            launch_spec,
            events,
            sockets,
            clients: Clients::default(),
            nspawn,
            cgroups,
            exec_defaults,
            network,
            services: Services::default(),
            follower: None,
            uid_range: uid_range.flatten(),
            tree,
            said: Said::default(),
            readiness,
            output,
            notes: Notes::default(),
            init_channel: None,
            command: None,
            state: State::Starting { leader, ready },
            pending_signals: Vec::new(),
            asked_at: None,
            exit: ExitFacts::default(),
            ending: Ending::NspawnRuns,
        };
        supervisor.watch_init(init_channel);
        Ok(supervisor)
    }

    /// Registers the channel to the init. Without it, what becomes of the start is unknown.
    fn watch_init(&mut self, channel: Option<InitChannel>) {
        let source = channel.map(|channel| self.events.register(channel, Token::InitChannel));
        match source.transpose() {
            Ok(source) => self.init_channel = source,
            Err(error) => self.fail(&error),
        }
    }

    /// Reads what systemd-nspawn and the driver's init have sent. If that completes the start, it is recorded.
    pub(super) fn read_reports(&mut self) {
        let was_awaited = self.is_awaited();
        self.read_notify_socket();
        self.read_init_channel();
        if was_awaited {
            self.announce_ready();
        }
        if let State::Starting {
            leader: Some(leader),
            ready: true,
        } = self.state
        {
            self.record_start(leader);
        }
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
            self.hear_system(&text);
            if let (Some(pid), State::Starting { leader, .. }) = (pid, &mut self.state) {
                leader.get_or_insert(pid);
            }
            self.exit.nspawn_status = text
                .lines()
                .find_map(NspawnFinalStatus::of)
                .or(self.exit.nspawn_status);
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
                InitEvent::Failed(start_error) => self.exit.start_error = Some(start_error),
                InitEvent::Ended { status } => self.exit.command_status = Some(status),
                InitEvent::Running { pid } => {
                    let init = channel.peer_pid();
                    let command = init.and_then(|init| child_by_inner_pid(init, pid));
                    self.command = command.or_else(|| self.command.take());
                }
            }
        }
    }

    fn record_start(&mut self, leader: i32) {
        self.tree = None;
        let handle = match self.open_leader(leader) {
            Ok(handle) => handle,
            Err(error) => return self.fail(&error),
        };
        self.protect_nspawn();
        if let Err(failure) = self.cgroups.settle(&self.launch_spec) {
            return self.fail_with(failure);
        }
        if let Err(error) = self.settle_filters(handle.as_deref()) {
            return self.fail_with(failure(StartStep::Filters, &error));
        }
        if !self.connect_network(handle.as_deref()) {
            return;
        }
        if !self.apply_inside(handle.as_deref()) {
            return;
        }
        let running = self.running_record(leader, handle.as_deref());
        self.state = State::Running {
            running: Box::new(running.clone()),
            leader: handle,
            since: Instant::now(),
        };
        failpoint::hit(&self.task_dir, Failpoint::Heard);
        if let Err(error) = self.task_dir.write_running(&running) {
            // A container that could not be found again must not run.
            let _ = writeln!(
                io::stderr(),
                "the record running can't be written, so the container is killed: {error}"
            );
            return self.fail(&error);
        }
        failpoint::hit(&self.task_dir, Failpoint::Recorded);
        // Before the command can change the owner of a source.
        self.follow_mounts();
        if let Some(init_channel) = &self.init_channel {
            init_channel.send_go();
        }
        self.announce_start();
        // A persistent journal of earlier boots takes a moment.
        self.follow_journal();
        self.release_nspawn();
    }

    /// The record of a container that is up. Its leader has no handle if it has exited already.
    fn running_record(&self, leader: i32, handle: Option<&ProcessHandle>) -> Running {
        let copies = self.launch_spec.copies();
        let copy = copies
            .and_then(|copies| lease::ephemeral_root_of(leader, copies))
            // The container may have mounted something over its root whose name is that of another container's copy.
            .filter(|copy| is_root_of(leader, copy));
        let (pid, start) = (leader, 0);
        let leader_process = handle.map_or(Process { pid, start }, ProcessHandle::process);
        Running {
            started: self.started(leader_process, self.filters(handle)),
            nspawn: self.nspawn,
            copy,
            uids: lease::first_uid_of(leader),
            alloc_dir: self.launch_spec.alloc_dir.clone(),
        }
    }

    /// Keeps the filters that systemd-nspawn has installed, for later starts; or fails if those that were kept are not installed. A leader
    /// that has exited runs no command.
    fn settle_filters(&self, leader: Option<&ProcessHandle>) -> io::Result<()> {
        let (Some(leader), Some(state_dir)) = (leader, self.task_dir.path().parent()) else {
            return Ok(());
        };
        match &self.launch_spec.seccomp {
            seccomp::Source::Nspawn => {}
            seccomp::Source::Captured { count, bounding } => {
                seccomp::verify(leader, *count, *bounding)?;
            }
            seccomp::Source::Capture(kind) => {
                let captured = seccomp::capture(kind, self.nspawn, leader);
                let kept = captured.and_then(|captured| match captured {
                    Some(captured) => Store::of(state_dir).save(&captured),
                    None => Ok(()),
                });
                if let Err(error) = kept {
                    let _ = writeln!(
                        io::stderr(),
                        "the seccomp filters of this container are not kept for later starts: {error}"
                    );
                }
            }
        }
        Ok(())
    }

    /// How many seccomp filters systemd-nspawn has installed. A command that is waited for has not installed any yet; an image's own init
    /// may have.
    fn filters(&self, leader: Option<&ProcessHandle>) -> Option<u32> {
        self.init_channel.as_ref()?;
        seccomp_filter_count(leader?.process().pid)
    }

    fn started(&self, leader: Process, filters: Option<u32>) -> Started {
        let launch_spec = &self.launch_spec;
        Started {
            id: launch_spec.id.clone(),
            machine: launch_spec.machine.clone(),
            state: self.task_dir.path().to_owned(),
            boot: launch_spec.boot.clone(),
            supervisor: current_process().unwrap_or(Process { pid: 0, start: 0 }),
            leader,
            mode: launch_spec.mode,
            cgroup: launch_spec.cgroup().map(Path::to_owned),
            controllers: self.controllers(),
            filters,
            network: launch_spec.network().map(network::started).map(Box::new),
            started_at: SystemTime::now(),
            notes: [&launch_spec.notes, self.cgroups.notes()].concat(),
        }
    }

    /// The leader, registered. `None` if it has exited before it could be opened: then its exit is all there is to see.
    fn open_leader(&self, pid: i32) -> io::Result<Option<Source<ProcessHandle>>> {
        match ProcessHandle::open(pid) {
            Ok(handle) => self.events.register(handle, Token::Leader).map(Some),
            Err(error) if no_such_process(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn leader_handle(&self) -> Option<&ProcessHandle> {
        match &self.state {
            State::Running { leader, .. } => leader.as_deref(),
            State::Starting { .. } | State::Failing(_) => None,
        }
    }

    /// Undoes the start.
    fn fail(&mut self, error: &io::Error) {
        self.fail_with(failure(StartStep::Watch, error));
    }

    /// The same with this failure.
    pub(super) fn fail_with(&mut self, failure: StartFailure) {
        self.state = State::Failing(failure);
        // The driver's init runs no command without the channel, and what follows may need its descriptor.
        self.init_channel = None;
        self.kill();
    }
}

/// The readiness of a container that has to say that it is ready: a system says it to systemd-nspawn, a command to a socket of its own.
fn readiness(
    task_dir: &TaskDir,
    launch_spec: &LaunchSpec,
    events: &EventLoop,
) -> io::Result<Option<Readiness>> {
    let Some(limit) = launch_spec.ready_within else {
        return Ok(None);
    };
    let socket = match launch_spec.first {
        Pid1::Image => None,
        Pid1::Driver { .. } => Some(ready::listen(&task_dir.ready_socket(), events)?),
    };
    Ok(Some(Readiness::new(limit, socket)))
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
