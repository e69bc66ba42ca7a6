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

mod birth;
mod over;
mod stopping;

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
use nspawn_init::{Trouble, Word};

use super::ending::Farewell;
use super::first::Channel;
use super::line::{Failure, News, Step, Verb};
use super::listeners::Listeners;
use super::pause::{self, Point};
use super::process::{Held, child_by_inner_pid, close_inherited, myself};
use super::record::{Order, Records, Running};
use super::tree_lock::SharedLocks;
use super::{logs, resource};
use crate::cgroup::Group;
use crate::container::{Process, Started};
use crate::nspawn::refusal::cause_of_host_error;
use crate::signal::Signal;

/// How long systemd-nspawn may clear up after its container was killed before it is killed too.
const CLEAR_UP: Duration = Duration::from_secs(5);

/// How long nobody is let in after somebody could not be, as when there are no descriptors left.
const BREATH: Duration = Duration::from_millis(100);

/// How many times in a row waiting may fail.
const MOST_BREATHS: u32 = 100;

/// How often it is looked whether it takes what is kept for it. Nothing tells it.
const LOOK: Duration = Duration::from_millis(10);

/// Watches over the container whose order lies in `directory`. Standard input is the lifeline of whoever asks for it; standard
/// output, of which a supervisor has no other use, is the program that becomes the container's first.
pub fn supervise(directory: &Path) -> ExitCode {
    close_inherited();
    let records = Records::at(directory);
    pause::at(&records, Point::Supervising);
    let asker = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from);
    let mut listeners = Listeners::default();
    if let Ok(asker) = asker {
        listeners.add(asker);
        // A client that is dropped sees the end of its connection, so no other descriptor may keep that open.
        let closed = File::open("/dev/null").and_then(|null| Ok(nix::unistd::dup2_stdin(null)?));
        if let Err(error) = closed {
            let _ = writeln!(io::stderr(), "standard input can't be closed: {error}");
        }
    }
    match prepare(&records)
        .and_then(|(order, sockets)| Watch::start(records.clone(), order, sockets))
    {
        Ok(mut watch) => {
            watch.listeners = listeners;
            watch.run();
            ExitCode::SUCCESS
        }
        Err(failure) => {
            records.discard_secrets();
            listeners.tell(&News::Failed(failure));
            ExitCode::FAILURE
        }
    }
}

/// What can be woken up by.
#[derive(Debug)]
struct Sockets {
    signals: SignalFd,
    notify: UnixDatagram,
    lifeline: UnixListener,
}

fn prepare(records: &Records) -> Result<(Order, Sockets), Failure> {
    let order = records
        .order()
        .map_err(|error| failure(Step::Order, &error))?;
    let sockets = detach()
        .and_then(|signals| listen(records, signals))
        .map_err(|error| failure(Step::Notify, &error))?;
    Ok((order, sockets))
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

fn listen(records: &Records, signals: SignalFd) -> io::Result<Sockets> {
    let notify = UnixDatagram::bind(records.notify())?;
    let lifeline = UnixListener::bind(records.lifeline())?;
    notify.set_nonblocking(true)?;
    lifeline.set_nonblocking(true)?;
    Ok(Sockets {
        signals,
        notify,
        lifeline,
    })
}

fn failure(step: Step, error: &io::Error) -> Failure {
    Failure::new(step, cause_of_host_error(error), error.to_string())
}

/// One container and everything that is known of it.
#[derive(Debug)]
struct Watch {
    records: Records,
    order: Order,
    sockets: Sockets,
    listeners: Listeners,
    nspawn: Process,
    /// The locks of a tree that others use too, until systemd-nspawn has them.
    tree: Option<SharedLocks>,
    /// To the container's first program, where it is ours.
    first: Option<Channel>,
    /// Why the command does not run, from the first program.
    trouble: Option<Trouble>,
    /// The process that signals are for with `process_two`: the first program, which passes them on, until it has said which
    /// process the command is; then the command.
    command: Option<Held>,
    /// The raw wait status of the command, from the first program.
    status: Option<i32>,
    state: State,
    /// Set when the container lived until it was ended by force: what systemd-nspawn says of the end is then no news.
    forced: bool,
    /// Set when systemd-nspawn itself was killed.
    put_down: bool,
    /// How far the leader's end is seen.
    leader: Leader,
    /// The leader's raw wait status, once it has become a child of this process and has been reaped.
    reaped: Option<i32>,
    /// What systemd-nspawn has said last.
    farewell: Option<Farewell>,
    /// When systemd-nspawn itself is killed, after its container was.
    patience: Option<Instant>,
    /// Until when nobody is let in. Who knocks waits, and keeps nobody awake.
    closed: Option<Instant>,
    /// Signals that the image's init does not take yet.
    kept: Vec<Signal>,
    /// Whether the end has been recorded and told.
    told: bool,
}

/// How far the end of the container's first process is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leader {
    Lives,
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
    Failing(Failure),
    Running {
        running: Box<Running>,
        leader: Option<Held>,
        since: Instant,
    },
}

impl Watch {
    fn start(records: Records, order: Order, sockets: Sockets) -> Result<Self, Failure> {
        let stdout =
            logs::open(order.stdout.as_deref()).map_err(|error| failure(Step::Logs, &error))?;
        let stderr =
            logs::open(order.stderr.as_deref()).map_err(|error| failure(Step::Logs, &error))?;
        if let Some(group) = order.cgroup() {
            Group::new(group)
                .create()
                .map_err(|error| failure(Step::Cgroup, &error))?;
        }
        pause::at(&records, Point::CgroupMade);
        resource::clear_the_way(&order.machine);
        let tree = order.shared_tree();
        let tree = tree.map(|tree| SharedLocks::take(&records, tree));
        let (child, first) = birth::spawn(&records, order.first, stdout, stderr)
            .map_err(|error| failure(Step::Nspawn, &error))?;
        let pid = i32::try_from(child.id())
            .map_err(|_| failure(Step::Nspawn, &io::ErrorKind::InvalidData.into()))?;
        // Not reaped yet, so the pid is its own.
        let nspawn = Held::by_pid(pid).map_or(Process { pid, start: 0 }, |held| held.process());
        pause::at(&records, Point::Spawned);
        let listeners = Listeners::default();
        let (leader, ready) = (None, first.is_none());
        Ok(Self {
            records,
            order,
            sockets,
            listeners,
            nspawn,
            tree,
            first,
            trouble: None,
            command: None,
            status: None,
            state: State::Starting { leader, ready },
            forced: false,
            put_down: false,
            leader: Leader::Lives,
            reaped: None,
            farewell: None,
            patience: None,
            closed: None,
            kept: Vec::new(),
            told: false,
        })
    }

    /// Sleeps until something happens, and deals with it, until systemd-nspawn has ended.
    fn run(&mut self) {
        let mut sleepless = 0;
        let status = loop {
            let awake = match self.sleep() {
                Ok(awake) => {
                    sleepless = 0;
                    awake
                }
                Err(error) => {
                    sleepless += 1;
                    self.bear(sleepless, error);
                    Awake::by_itself()
                }
            };
            if awake.notify {
                self.hear_nspawn();
            }
            self.hear_first();
            self.start_if_ready();
            if awake.lifeline {
                self.welcome();
            }
            self.hear_listeners();
            self.send_what_was_kept();
            if let Some(leader) = awake.leader {
                self.see_leader(leader);
            }
            if let Some(status) = self.end_known_early() {
                self.tell_end(status);
            }
            if awake.signals
                && let Some(status) = self.reap()
            {
                break status;
            }
            if self.patience.is_some_and(|end| Instant::now() >= end) {
                self.patience = None;
                self.kill_nspawn();
            }
            self.closed = self.closed.filter(|end| Instant::now() < *end);
        };
        self.end(status);
    }

    /// The kernel lets nobody wait, as when this process may have fewer descriptors than it has. For a while everything is looked
    /// at now and then instead; a container that can't be watched must not run.
    fn bear(&mut self, times: u32, error: nix::Error) {
        match times {
            1 => drop(writeln!(io::stderr(), "waiting failed: {error}")),
            MOST_BREATHS => {
                let _ = writeln!(io::stderr(), "waiting still fails: the container is ended");
                self.kill();
            }
            _ => {}
        }
        std::thread::sleep(BREATH);
    }

    fn sleep(&self) -> nix::Result<Awake> {
        let door = match self.closed {
            None => PollFlags::POLLIN,
            Some(_) => PollFlags::empty(),
        };
        let mut descriptors = vec![
            PollFd::new(self.sockets.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.sockets.notify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.sockets.lifeline.as_fd(), door),
        ];
        let first = self.first.as_ref().and_then(Channel::descriptor);
        descriptors.extend(
            self.listeners
                .descriptors()
                .chain(first)
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN)),
        );
        let last = descriptors.len();
        descriptors.extend(self.leader_to_watch());
        let look = (!self.kept.is_empty()).then(|| Instant::now() + LOOK);
        let ends = [self.patience, self.closed, look];
        let limit = match ends.into_iter().flatten().min() {
            None => PollTimeout::NONE,
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut descriptors, limit) {
            Err(nix::Error::EINTR) => return Ok(Awake::default()),
            other => other?,
        };
        let ready = |index: usize| descriptors[index].any().unwrap_or(true);
        let leader = descriptors.get(last).and_then(PollFd::revents);
        Ok(Awake {
            leader: leader.and_then(|seen| match seen {
                seen if seen.contains(PollFlags::POLLHUP) => Some(Leader::Reaped),
                seen if seen.contains(PollFlags::POLLIN) => Some(Leader::Ended),
                _ => None,
            }),
            signals: ready(0),
            notify: ready(1),
            lifeline: ready(2),
        })
    }

    /// Reads what systemd-nspawn says. The pid of the leader is the start, and its farewell says that nothing but clearing up is
    /// left to it; everything else is small talk.
    fn hear_nspawn(&mut self) {
        let mut datagram = [0; 4096];
        while let Ok(length) = self.sockets.notify.recv(&mut datagram) {
            let text = String::from_utf8_lossy(&datagram[..length]);
            let told = text
                .lines()
                .find_map(|line| line.strip_prefix("X_NSPAWN_LEADER_PID=")?.parse().ok());
            if let (Some(pid), State::Starting { leader, .. }) = (told, &mut self.state) {
                leader.get_or_insert(pid);
            }
            self.farewell = text.lines().find_map(Farewell::of).or(self.farewell);
        }
    }

    /// Reads what the container's first program says, where it is ours.
    fn hear_first(&mut self) {
        let Some(channel) = &mut self.first else {
            return;
        };
        while let Some(word) = channel.hear() {
            match word {
                Word::Ready => {
                    let init = channel.speaker();
                    self.command = init.and_then(|init| Held::by_pid(init).ok());
                    if let State::Starting { ready, .. } = &mut self.state {
                        *ready = true;
                    }
                }
                Word::Failed(trouble) => self.trouble = Some(trouble),
                Word::Ended { status } => self.status = Some(status),
                Word::Running { pid } => {
                    let init = channel.speaker();
                    let command = init.and_then(|init| child_by_inner_pid(init, pid));
                    self.command = command.or_else(|| self.command.take());
                }
                Word::ExecRunning { .. } | Word::ExecFailed { .. } | Word::ExecEnded { .. } => {}
            }
        }
    }

    fn start_if_ready(&mut self) {
        if let State::Starting {
            leader: Some(leader),
            ready: true,
        } = self.state
        {
            self.started(leader);
        }
    }

    fn started(&mut self, leader: i32) {
        self.tree = None;
        let held = match Held::by_pid(leader) {
            Ok(held) => Some(held),
            // A command may have ended before anybody could look at it: then its end is all there is to see.
            Err(error) if is_gone(&error) => None,
            Err(error) => return self.fail(&error),
        };
        let copy = self
            .order
            .copies()
            .and_then(|copies| resource::copy_of(leader, copies))
            // The container may have mounted something over its root whose name is that of another one's copy.
            .filter(|copy| is_root_of(leader, copy));
        let started = Started {
            id: self.order.id.clone(),
            machine: self.order.machine.clone(),
            state: self.records.path().to_owned(),
            boot: self.order.boot.clone(),
            supervisor: myself().unwrap_or(Process { pid: 0, start: 0 }),
            leader: held.as_ref().map_or(
                Process {
                    pid: leader,
                    start: 0,
                },
                Held::process,
            ),
            mode: self.order.mode,
            cgroup: self.order.cgroup().map(Path::to_owned),
            started_at: SystemTime::now(),
            notes: self.order.notes.clone(),
        };
        let running = Running {
            started: started.clone(),
            nspawn: self.nspawn,
            copy,
            uids: resource::uids_of(leader),
            alloc_dir: self.order.alloc_dir.clone(),
        };
        self.state = State::Running {
            running: Box::new(running.clone()),
            leader: held,
            since: Instant::now(),
        };
        pause::at(&self.records, Point::Heard);
        if let Err(error) = self.records.write_running(&running) {
            // A container that could not be found again must not run.
            let _ = writeln!(io::stderr(), "the start can't be recorded: {error}");
            return self.fail(&error);
        }
        pause::at(&self.records, Point::Recorded);
        if let Some(first) = &self.first {
            first.go();
        }
        self.listeners.tell(&News::Started(started));
    }

    /// Undoes the start.
    fn fail(&mut self, error: &io::Error) {
        self.state = State::Failing(failure(Step::Watch, error));
        // Our own first program runs nothing without it, and what follows may need its descriptor.
        self.first = None;
        self.kill();
    }

    fn welcome(&mut self) {
        loop {
            let stream = match self.sockets.lifeline.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.closed = Some(Instant::now() + BREATH);
                    return;
                }
            };
            let news = match &self.state {
                State::Starting { .. } | State::Failing(_) => None,
                State::Running { running, .. } => Some(News::Started(running.started.clone())),
            };
            self.listeners.add(stream);
            if let Some(news) = news {
                self.listeners.tell_newcomer(&news);
            }
        }
    }

    fn hear_listeners(&mut self) {
        for (index, request) in self.listeners.requests() {
            let error = match request.verb {
                // As a signal like others it would end the container too, but systemd-nspawn would tell another end.
                Verb::Signal(number) if number == Signal::KILL.number() => {
                    self.kill();
                    Ok(())
                }
                Verb::Signal(number) => self.signal(Signal::from_number(number)),
                Verb::Stop => {
                    let polite = self.polite();
                    self.signal(polite)
                }
                Verb::Kill => {
                    self.kill();
                    Ok(())
                }
            };
            pause::at(&self.records, Point::Signalled);
            let error = error.err().map(|error| error.to_string());
            let request = request.request;
            self.listeners.answer(index, &News::Done { request, error });
        }
        let asker_is_gone = self.listeners.forget_the_gone();
        if asker_is_gone && matches!(self.state, State::Starting { .. }) {
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
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(nix::Error::ESRCH as i32)
}

#[derive(Debug, Default)]
struct Awake {
    signals: bool,
    notify: bool,
    lifeline: bool,
    leader: Option<Leader>,
}

impl Awake {
    /// Anything may have happened.
    fn by_itself() -> Self {
        Self {
            signals: true,
            notify: true,
            lifeline: true,
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
