//! The journal of a booted container as its supervisor follows it: the lines of its entries, and what they say about the units.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::event_loop::{EventLoop, Interest, Pollable, Source, Token};
use crate::container::Journal;
use crate::journal::{self, Entry, Follower, UnitChange};

/// How often the journal is looked at if the kernel can't report changes of it.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How many units are remembered as failed, and how many messages of PID 1.
const MAX_REMEMBERED: usize = 32;
/// How many units are remembered as stopping: nearly all are asked at once.
const MAX_STOPPING: usize = 1024;
/// How much of each: no name of a unit is longer.
const MAX_REMEMBERED_BYTES: usize = 256;

#[derive(Debug)]
pub(super) struct FollowedJournal {
    options: Journal,
    follower: Option<Source<Follower>>,
    /// The time of the last entry, in microseconds.
    last: Option<u64>,
    /// The units that PID 1 has reported as failed, by their names.
    failed_units: Vec<String>,
    /// The units that PID 1 has asked to stop and not reported as stopped.
    stopping_units: Vec<String>,
    /// What PID 1 has said about its own end.
    emergencies: Vec<String>,
    /// Whether the system is up.
    is_up: bool,
    /// Whether its units have been reported.
    is_noted: bool,
    /// When to look at it again without an event.
    again: Option<Instant>,
}

impl FollowedJournal {
    pub(super) fn new(options: Journal) -> Self {
        Self {
            options,
            follower: None,
            last: None,
            failed_units: Vec::new(),
            stopping_units: Vec::new(),
            emergencies: Vec::new(),
            is_up: false,
            is_noted: false,
            again: None,
        }
    }

    /// The time of the last entry, in microseconds of the monotonic clock; `None` if there was none.
    pub(super) fn last(&self) -> Option<u64> {
        self.last
    }

    /// When to look at it without an event.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.again
    }

    /// The units that PID 1 has asked to stop and not reported as stopped.
    pub(super) fn stopping_units(&self) -> &[String] {
        &self.stopping_units
    }

    /// What PID 1 has said about its own end.
    pub(super) fn emergencies(&self) -> &[String] {
        &self.emergencies
    }

    /// There is more to read than was read.
    pub(super) fn look_again_at_once(&mut self) {
        self.again = Some(Instant::now());
    }

    /// The system is up, as somebody other than the journal has said.
    pub(super) fn set_up(&mut self) {
        self.is_up = true;
    }

    /// Follows the journal of the container with this root directory.
    pub(super) fn follow(&mut self, root: OwnedFd, events: &EventLoop) {
        let mut source = events.source(Follower::new(root), Token::Journal);
        // One that can't be registered is looked at every second.
        let _ = source.watch(Interest::Readable);
        if !source.is_watched() {
            let _ = writeln!(
                io::stderr(),
                "the kernel can't report changes of the journal (see fs.inotify.max_user_instances), so it is read every second"
            );
        }
        self.follower = Some(source);
    }

    /// The next entry, if there is one.
    pub(super) fn next_entry(&mut self) -> Option<Entry> {
        let follower = self.follower.as_mut()?;
        let entry = follower.next_entry();
        if let Some(fault) = follower.take_fault() {
            let _ = writeln!(
                io::stderr(),
                "entries of the journal are missing in the logs: {fault}"
            );
        }
        let entry = entry?;
        self.last = self.last.max(Some(entry.monotonic));
        self.is_up |= entry.is_startup_finished();
        match entry.unit_change() {
            Some((UnitChange::Failed, unit)) => {
                remember(&mut self.failed_units, unit, MAX_REMEMBERED)
            }
            Some((UnitChange::Stopping, unit)) => {
                remember(&mut self.stopping_units, unit, MAX_STOPPING)
            }
            Some((UnitChange::Stopped, unit)) => self.stopping_units.retain(|known| known != unit),
            None => {}
        }
        if let Some(message) = entry.emergency() {
            remember(&mut self.emergencies, message, MAX_REMEMBERED);
        }
        Some(entry)
    }

    /// What the user should know about the units, once, when the system is up: those that have failed, and those that the job names and the
    /// system does not have.
    pub(super) fn notes(&mut self) -> Vec<String> {
        if !self.is_up || std::mem::replace(&mut self.is_noted, true) {
            return Vec::new();
        }
        let failed = (!self.failed_units.is_empty()).then(|| {
            let units = self.failed_units.join(", ");
            format!("the system is up, and these units have failed: {units}")
        });
        let wanted = &self.options.units;
        let missing = self
            .follower
            .as_ref()
            .map(|follower| follower.without_file(wanted));
        let missing = missing.filter(|units| !units.is_empty());
        let missing = missing.map(|units| {
            let units = units.join(", ");
            format!("config.journal_units: the system has no units with these names: {units}")
        });
        failed.into_iter().chain(missing).collect()
    }

    /// Takes in what has changed, and plans when to look again without an event.
    pub(super) fn look(&mut self, at_once: bool) {
        let Some(follower) = &mut self.follower else {
            return;
        };
        follower.look(at_once);
        let poll = (!follower.is_watched()).then(|| Instant::now() + POLL_INTERVAL);
        self.again = [poll, follower.next_look()].into_iter().flatten().min();
    }

    /// The line of an entry, if it is wanted.
    pub(super) fn line(&self, entry: &Entry) -> Option<Vec<u8>> {
        let units = &self.options.units;
        let is_wanted = units.is_empty() || entry.is_of_unit(units);
        is_wanted
            .then(|| journal::line(entry, self.options.format))
            .flatten()
    }
}

/// Adds a text that is not known yet, as far as it can be shown, unless there are too many.
fn remember(known: &mut Vec<String>, text: &str, limit: usize) {
    let text = &text[..text.floor_char_boundary(MAX_REMEMBERED_BYTES)];
    let text: String = text.chars().filter(|letter| !letter.is_control()).collect();
    if known.len() < limit && !known.contains(&text) {
        known.push(text);
    }
}

impl Pollable for Follower {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Follower::descriptor(self)
    }
}
