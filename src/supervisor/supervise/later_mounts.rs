//! Passes on to the container what the host mounts below its volumes while it runs, where that has to be changed first (`mounts`). The kernel
//! reports every change of the host's mount table. What has changed is looked for in the loop, which reads two tables; copies are made in a
//! thread, because a file system that has been mounted may not answer, and the loop does not wait for that.

use std::fs::File;
use std::io::{self, PipeReader, Write as _};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::Supervisor;
use super::event_loop::{EventLoop, Interest, Source, Token};
use crate::mounts::{LaterMounts, Outcome, Work};

/// How long after a change the table is not read again: a host that mounts without end costs every supervisor no more than this.
const PAUSE: Duration = Duration::from_millis(100);

/// What the host mounts later, as far as it concerns the container.
#[derive(Debug)]
pub(super) struct Follower {
    mounts: LaterMounts,
    table: Source<File>,
    change: Option<Change>,
    /// Whether the last change could not be made.
    has_failed: bool,
}

/// A change that a thread makes.
#[derive(Debug)]
struct Change {
    result: mpsc::Receiver<io::Result<Outcome>>,
    /// Hangs up at the end of the thread.
    _end: Source<PipeReader>,
}

impl Change {
    fn start(work: Work, events: &EventLoop) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let _end = events.register(reader, Token::MountsChanged)?;
        let (sender, result) = mpsc::channel();
        // Not waited for: one that hangs in a file system ends with this process.
        std::thread::Builder::new().spawn(move || {
            // Closed at the end of the thread, even if it panics.
            let _writer = writer;
            let _ = sender.send(work.run());
        })?;
        Ok(Self { result, _end })
    }
}

impl Follower {
    fn new(mounts: LaterMounts, events: &EventLoop) -> io::Result<Self> {
        let table = File::open("/proc/self/mountinfo")?;
        let mut table = events.source(table, Token::MountTable);
        table.watch(Interest::Exceptional)?;
        Ok(Self {
            mounts,
            table,
            change: None,
            has_failed: false,
        })
    }
}

impl Supervisor {
    /// Begins to follow what the host mounts, if the container has a volume below which it appears.
    pub(super) fn follow_mounts(&mut self) {
        let (plan, task_dir) = (&self.launch_spec.mounts, self.task_dir.path());
        let mounts = LaterMounts::of(plan, task_dir, self.nspawn.pid);
        let follower = mounts.and_then(|mounts| {
            let follower = mounts.map(|mounts| Follower::new(mounts, &self.events));
            follower.transpose()
        });
        match follower {
            Ok(follower) => self.follower = follower,
            Err(error) => log(&error),
        }
        // The host may have changed something since the mounts of the start were copied.
        self.look_at_mounts(true);
    }

    /// The mount table of the host has changed.
    pub(super) fn see_mount_table(&mut self) {
        self.look_at_mounts(true);
        self.pause_mounts();
    }

    /// The pause after a change is over.
    pub(super) fn resume_mounts(&mut self) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        if follower.table.watch(Interest::Exceptional).is_err() {
            // The kernel has no memory left for it. Tried again.
            self.pause_mounts();
        }
        // Whatever has changed before it is watched again is not reported any more.
        self.look_at_mounts(false);
    }

    /// The thread that makes a change has ended.
    pub(super) fn see_mounts_changed(&mut self) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        let result = follower
            .change
            .as_ref()
            .map(|change| change.result.try_recv());
        let result = match result {
            None | Some(Err(mpsc::TryRecvError::Empty)) => return,
            Some(Err(mpsc::TryRecvError::Disconnected)) => {
                Err(io::Error::other("the thread that does it has panicked"))
            }
            Some(Ok(result)) => result,
        };
        follower.change = None;
        match &result {
            Ok(outcome) => outcome.notes().for_each(|note| self.notes.add(note)),
            Err(error) => {
                log(error);
                if !follower.has_failed {
                    self.notes.add(format!("{FAILED}: {error}"));
                }
            }
        }
        follower.has_failed = result.is_err();
        follower.mounts.remember(result);
        self.pause_mounts();
        // Meanwhile not every child that exited was waited for.
        self.see_children();
    }

    /// Whether a thread makes a change, and may wait for children of its own.
    pub(super) fn changes_mounts(&self) -> bool {
        let follower = self.follower.as_ref();
        follower.is_some_and(|follower| follower.change.is_some())
    }

    /// Looks what has changed, and begins to pass it on.
    fn look_at_mounts(&mut self, is_reported: bool) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        if follower.change.is_some() {
            return;
        }
        let change = follower.mounts.look(is_reported).and_then(|work| {
            let change = work.map(|work| Change::start(work, &self.events));
            change.transpose()
        });
        match change {
            Ok(change) => follower.change = change,
            Err(error) => log(&error),
        }
        if follower.change.is_some() {
            follower.table.unwatch();
        }
    }

    fn pause_mounts(&mut self) {
        if let Some(follower) = &mut self.follower
            && follower.change.is_none()
        {
            follower.table.unwatch();
            let end = Instant::now() + PAUSE;
            self.events.set_timer(Token::MountPause, Some(end));
        }
    }
}

const FAILED: &str = "what the host has mounted or unmounted below a volume of the task has not been passed on to it";

fn log(error: &io::Error) {
    let _ = writeln!(io::stderr(), "{FAILED}: {error}");
}
