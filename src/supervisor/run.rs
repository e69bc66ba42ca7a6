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

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nspawn_init::{Trouble, Word};
use rustix::process::{WaitOptions, wait};

use super::ending::{Farewell, Signs, exit_of, foreseen, told};
use super::first::Channel;
use super::line::{Failure, News, Step, Verb};
use super::listeners::Listeners;
use super::pause::{self, Point};
use super::process::{Held, catches, close_inherited, first_child, ignores, myself, takes};
use super::record::{First, Order, Records, Running};
use super::{logs, remains};
use crate::cgroup::{Group, freezer};
use crate::container::{Mode, Process, Started};
use crate::signal::Signal;

/// How long systemd-nspawn may clear up after its container was killed before it is killed too.
const CLEAR_UP: Duration = Duration::from_secs(5);

/// How long nobody is let in after somebody could not be, as when there are no descriptors left.
const BREATH: Duration = Duration::from_millis(100);

/// How many times in a row waiting may fail.
const MOST_BREATHS: u32 = 100;

/// How long an image's init may need before it takes signals. What it does not take then, it never will.
const YOUTH: Duration = Duration::from_secs(60);

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
    let _ = std::env::set_current_dir("/");
    // Its sockets and files are root's alone.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // The payload shall be the victim when memory runs out. Only root may say so.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
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
    Failure {
        step,
        reason: error.to_string(),
        transient: true,
    }
}

/// One container and everything that is known of it.
#[derive(Debug)]
struct Watch {
    records: Records,
    order: Order,
    sockets: Sockets,
    listeners: Listeners,
    nspawn: Process,
    /// To the container's first program, where it is ours.
    first: Option<Channel>,
    /// Why the command does not run, from the first program.
    trouble: Option<Trouble>,
    /// The raw wait status of the command, from the first program.
    status: Option<i32>,
    state: State,
    /// Set when the container lived until it was ended by force: what systemd-nspawn says of the end is then no news.
    forced: bool,
    /// Set when systemd-nspawn itself was killed.
    put_down: bool,
    /// How far the leader's end is seen, where it is waited for.
    leader: Leader,
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
        if let Some(place) = &order.place {
            Group::new(&place.group)
                .create()
                .map_err(|error| failure(Step::Cgroup, &error))?;
        }
        pause::at(&records, Point::CgroupMade);
        remains::clear_the_way(&order.machine);
        let (child, first) = spawn(&records, order.first, stdout, stderr)
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
            first,
            trouble: None,
            status: None,
            state: State::Starting { leader, ready },
            forced: false,
            put_down: false,
            leader: Leader::Lives,
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
            self.leader = awake.leader.unwrap_or(self.leader);
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
                    if let State::Starting { ready, .. } = &mut self.state {
                        *ready = true;
                    }
                }
                Word::Failed(trouble) => self.trouble = Some(trouble),
                Word::Ended { status } => self.status = Some(status),
                Word::Running
                | Word::ExecRunning { .. }
                | Word::ExecFailed { .. }
                | Word::ExecEnded { .. } => {}
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
        let held = match Held::by_pid(leader) {
            Ok(held) => Some(held),
            // A command may have ended before anybody could look at it: then its end is all there is to see.
            Err(error) if is_gone(&error) => None,
            Err(error) => return self.fail(&error),
        };
        let copy = self
            .order
            .copies
            .as_deref()
            .and_then(|copies| remains::copy_of(leader, copies));
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
            cgroup: self.order.place.as_ref().map(|place| place.group.clone()),
            started_at: SystemTime::now(),
            notes: self.order.notes.clone(),
        };
        let running = Running {
            started: started.clone(),
            nspawn: self.nspawn,
            copy,
            uids: remains::uids_of(leader),
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

    /// The process that signals are for.
    fn payload(&self) -> Option<i32> {
        let State::Running {
            leader: Some(leader),
            ..
        } = &self.state
        else {
            return None;
        };
        let pid = leader.process().pid;
        match self.order.mode {
            Mode::Boot | Mode::Plain => Some(pid),
            Mode::ProcessTwo => {
                // Before it has a child, and after, our own program keeps signals or has no use for them.
                let init = self
                    .first
                    .as_ref()
                    .and_then(Channel::speaker)
                    .unwrap_or(pid);
                Some(first_child(init).unwrap_or(init))
            }
        }
    }

    /// The signal that asks this payload to end. systemd has one of its own. A command gets SIGTERM if it has a handler for
    /// it, and else Nomad's default, SIGINT: the first process of a container is deaf to what it has no handler for, and shells
    /// have one for SIGINT that means nothing.
    fn polite(&self) -> Option<Signal> {
        if self.order.mode == Mode::Boot {
            return Some(Signal::POWER_OFF);
        }
        let pid = self.payload()?;
        let term = catches(pid, Signal::TERM) || ignores(pid, Signal::INT);
        Some(if term { Signal::TERM } else { Signal::INT })
    }

    fn signal(&mut self, signal: Option<Signal>) -> io::Result<()> {
        self.rouse_nspawn();
        let (Some(signal), Some(pid)) = (signal, self.payload()) else {
            return Ok(());
        };
        if self.comes_too_early(pid, signal) {
            // One is as good as many: the kernel too keeps a signal once.
            if !self.kept.contains(&signal) {
                self.kept.push(signal);
            }
            return Ok(());
        }
        send(pid, signal)
    }

    /// Whether an image's init would lose a signal that it may take later. systemd-nspawn tells of the start while the first
    /// process is still its own program, and an init needs a moment as well.
    fn comes_too_early(&self, pid: i32, signal: Signal) -> bool {
        let State::Running { since, .. } = self.state else {
            return false;
        };
        // These work without being taken.
        let works = [Signal::NULL, Signal::CONT, Signal::STOP].contains(&signal);
        let young = self.order.mode == Mode::Boot && since.elapsed() < YOUTH;
        young && !works && takes(pid, signal) == Some(false)
    }

    fn send_what_was_kept(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let Some(pid) = self.payload() else {
            return;
        };
        for signal in std::mem::take(&mut self.kept) {
            if self.comes_too_early(pid, signal) {
                self.kept.push(signal);
            } else if let Err(error) = send(pid, signal) {
                let _ = writeln!(io::stderr(), "{signal} can't be sent: {error}");
            }
        }
    }

    /// Ends the container by force, and lets systemd-nspawn see it and clear up.
    fn kill(&mut self) {
        pause::at(&self.records, Point::Killing);
        self.kept.clear();
        let State::Running { leader, .. } = &self.state else {
            self.forced = true;
            self.kill_nspawn();
            return;
        };
        // One that has ended by itself has its own truth.
        let lives = |leader: &Held| !leader.wait(Duration::ZERO);
        self.forced |= leader.as_ref().is_some_and(lives);
        if let Some(place) = &self.order.place {
            Group::new(&place.group).child("payload").kill();
        }
        if let Some(leader) = leader {
            let _ = leader.signal(Signal::KILL);
            freezer::release(leader.process().pid);
        }
        // What is frozen can't clear up.
        if let Some(place) = &self.order.place {
            Group::new(&place.group).thaw();
        }
        self.rouse_nspawn();
        self.patience
            .get_or_insert_with(|| Instant::now() + CLEAR_UP);
    }

    /// A systemd-nspawn that somebody has stopped would not notice the end of its container.
    fn rouse_nspawn(&self) {
        if let Ok(nspawn) = Held::again(self.nspawn) {
            let _ = nspawn.signal(Signal::CONT);
        }
    }

    /// The leader, where its end is told before that of systemd-nspawn: throwing away an ephemeral root may take that seconds.
    /// Any other root stays locked until systemd-nspawn has ended.
    fn leader_to_watch(&self) -> Option<PollFd<'_>> {
        let leader = self.held_leader()?;
        let flags = match self.leader {
            Leader::Lives => PollFlags::POLLIN,
            // The kernel says so unasked when it is waited for, and until then has no other news.
            Leader::Ended => PollFlags::empty(),
            Leader::Reaped => return None,
        };
        let early = !self.told && self.order.copies.is_some();
        early.then(|| PollFd::new(leader.as_fd(), flags))
    }

    /// How systemd-nspawn may be taken to have ended, once the leader has and nothing that it could add would change what is told.
    fn end_known_early(&self) -> Option<ExitStatus> {
        if self.told || self.leader == Leader::Lives {
            return None;
        }
        let by_force = ExitStatus::from_raw(Signal::KILL.number());
        if self.forced || self.status.is_some() || self.trouble.is_some() {
            return Some(by_force);
        }
        foreseen(self.raw_status()?, self.farewell)
    }

    fn held_leader(&self) -> Option<&Held> {
        match &self.state {
            State::Running { leader, .. } => leader.as_ref(),
            State::Starting { .. } | State::Failing(_) => None,
        }
    }

    /// The leader's raw wait status, where the kernel tells it to others than the parent.
    fn raw_status(&self) -> Option<i32> {
        let leader = self.held_leader()?;
        leader
            .raw_status()
            .filter(|_| !pause::kernel_is_old(&self.records))
    }

    /// Records how it ended and tells everybody, once.
    fn tell_end(&mut self, status: ExitStatus) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let place = self.order.place.as_ref();
        let exit = exit_of(&Signs {
            mode: self.order.mode,
            trouble: self.trouble.as_ref(),
            command: self.status,
            leader: self.raw_status(),
            words: &self.records.words(),
            nspawn: status,
            forced: self.forced,
            put_down: self.put_down,
            oom: place.is_some_and(|place| Group::new(&place.group).oom_kills() > 0),
        });
        if let Err(error) = self.records.write_exit(&exit) {
            let _ = writeln!(io::stderr(), "the end can't be recorded: {error}");
        }
        pause::at(&self.records, Point::EndRecorded);
        self.listeners.tell(&News::Exited(exit));
        pause::at(&self.records, Point::EndTold);
    }

    /// Ends everything at once, systemd-nspawn too.
    fn kill_nspawn(&mut self) {
        self.put_down = true;
        // Its own parent has not waited for it yet, so the pid is its own. No descriptor is needed for that.
        let pid = nix::unistd::Pid::from_raw(self.nspawn.pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        if let Some(place) = &self.order.place {
            Group::new(&place.group).kill();
        }
    }

    /// Reaps whoever has ended; the status of systemd-nspawn if it is among them.
    fn reap(&self) -> Option<ExitStatus> {
        pause::at(&self.records, Point::Exited);
        while let Ok(Some(_)) = self.sockets.signals.read_signal() {}
        let mut found = None;
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid.as_raw_nonzero().get() == self.nspawn.pid {
                found = Some(ExitStatus::from_raw(status.as_raw()));
            }
        }
        found
    }

    /// systemd-nspawn has ended: so has the container, or it does now.
    fn end(&mut self, status: ExitStatus) {
        // What was said last may still lie in the sockets: a short command is over before anybody has looked.
        self.hear_nspawn();
        self.hear_first();
        self.start_if_ready();
        self.records.discard_secrets();
        self.kill_the_rest();
        let group = self
            .order
            .place
            .as_ref()
            .map(|place| Group::new(&place.group));
        let running = match &self.state {
            State::Starting { .. } => {
                let failure = self.failed(status);
                self.listeners.tell(&News::Failed(failure));
                None
            }
            State::Failing(failure) => {
                self.listeners.tell(&News::Failed(failure.clone()));
                None
            }
            State::Running { running, .. } => {
                let running = running.clone();
                self.tell_end(status);
                Some(running)
            }
        };
        if let Some(group) = group {
            group.wait_empty(CLEAR_UP);
        }
        if let Err(error) = remains::free(&self.records, &self.order, running.as_deref()) {
            let _ = writeln!(io::stderr(), "not everything could be freed: {error}");
        }
    }

    /// After a systemd-nspawn that was killed the container lives on, without anybody to tell its end.
    fn kill_the_rest(&self) {
        if let State::Running {
            leader: Some(leader),
            ..
        } = &self.state
        {
            let _ = leader.signal(Signal::KILL);
            leader.wait(CLEAR_UP);
            self.reap();
        }
        match &self.order.place {
            Some(place) => {
                let group = Group::new(&place.group);
                if !group.processes().is_empty() {
                    group.kill();
                }
            }
            None => remains::kill_descendants(nix::unistd::getpid().as_raw(), || {
                self.reap();
            }),
        }
    }

    fn failed(&self, status: ExitStatus) -> Failure {
        let trouble = self.trouble.as_ref().map(ToString::to_string);
        let reason = self.records.failure().or(trouble).unwrap_or_else(|| {
            let how = told(status);
            let words = in_one_line(&self.records.words());
            if words.is_empty() {
                format!(
                    "{how} before the container was up; what it said is in the task's stderr log"
                )
            } else {
                format!("{how} before the container was up: {words}")
            }
        });
        Failure {
            step: Step::Nspawn,
            reason,
            transient: false,
        }
    }
}

fn send(pid: i32, signal: Signal) -> io::Result<()> {
    match Held::by_pid(pid) {
        Ok(held) => held.signal(signal),
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether it means that there is no such process.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(nix::Error::ESRCH as i32)
}

fn in_one_line(words: &str) -> String {
    let lines: Vec<&str> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
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

/// Starts the step between this process and systemd-nspawn.
#[expect(
    clippy::disallowed_methods,
    reason = "the container's own process begins here"
)]
fn spawn(
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
