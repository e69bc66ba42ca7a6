//! What a booted container prints: its journal and the console of its PID 1 become lines of the task's logs. The journal is on the container's
//! disk, so nothing of it is lost while the log collector is slow: reading stops until the log takes more. The console is always read,
//! because PID 1 would wait for it; what does not fit is left out and counted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::time::{ClockId, clock_gettime};

use super::console::{ConsoleLines, is_unit_status};
use super::event_loop::{EventLoop, Source, Token};
use super::followed_journal::FollowedJournal;
use super::log_writer::{LogWriter, is_ready};
use super::{Supervisor, inside};
use crate::container::SystemOutput;
use crate::supervisor::logs;

/// How many entries of the journal are handled before other events are.
const MAX_ENTRIES: usize = 256;
/// How long the exit of a container waits for the log collector to take the last lines.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the console may be silent after the exit before nothing more is expected.
const CONSOLE_SILENCE: Duration = Duration::from_millis(50);
/// How many lines of the console are remembered, and how much of each.
const MAX_LAST_LINES: usize = 4;
const MAX_SHOWN_CHARS: usize = 300;
/// How much of what the init said about its failure is shown with the exit.
const MAX_FAILURE_BYTES: usize = 500;
/// The last line of a systemd that can't go on.
const EXIT_LINE: &str = "Exiting PID 1...";
/// The last lines of systemd-shutdown.
const SHUTDOWN_LINES: [&str; 4] = [
    "Powering off.",
    "Halting system.",
    "Rebooting.",
    "Exiting container.",
];
/// Errors (3) and worse go to stderr.
const ERROR: u8 = 3;

/// The output of one booted container.
#[derive(Debug)]
pub(super) struct Output {
    stdout: LogWriter,
    stderr: LogWriter,
    console: Option<Console>,
    journal: Option<FollowedJournal>,
}

/// What a booted system has said at its end.
#[derive(Debug, Default)]
pub(super) struct FinalMessages {
    /// Why its init could not go on, by its own words.
    pub(super) failure: Option<String>,
    /// How it has shut down, by its own words.
    pub(super) shutdown: Option<String>,
}

#[derive(Debug)]
struct Console {
    pipe: Source<PipeReader>,
    lines: ConsoleLines,
    /// Whether systemd-nspawn has closed it.
    is_closed: bool,
    /// The last lines that are not about the state of a unit, as far as they can be shown.
    last_lines: VecDeque<String>,
    /// Lines that were left out since the last one that was written.
    left_out: u64,
}

/// Where systemd-nspawn writes.
#[derive(Debug)]
pub(super) struct Streams {
    pub(super) stdout: File,
    pub(super) stderr: File,
}

impl Output {
    /// Opens the logs of the task. Returns the streams of systemd-nspawn, and what else is to be written to the logs, if anything is.
    pub(super) fn open(
        output: &SystemOutput,
        (stdout, stderr): (File, File),
        nspawn_stderr: impl FnOnce() -> io::Result<File>,
        events: &EventLoop,
    ) -> io::Result<(Streams, Option<Self>)> {
        if output.is_empty() {
            return Ok((Streams { stdout, stderr }, None));
        }
        let writer = |log: &File| Ok::<_, io::Error>(LogWriter::new(logs::reopen(log)?, events));
        let mut own = Self {
            stdout: writer(&stdout)?,
            stderr: writer(&stderr)?,
            console: None,
            journal: output.journal.clone().map(FollowedJournal::new),
        };
        if !output.console {
            return Ok((Streams { stdout, stderr }, Some(own)));
        }
        let (reader, writer) = io::pipe()?;
        rustix::io::ioctl_fionbio(&reader, true)?;
        own.console = Some(Console {
            pipe: events.register(reader, Token::Console)?,
            lines: ConsoleLines::default(),
            is_closed: false,
            last_lines: VecDeque::new(),
            left_out: 0,
        });
        let stdout = File::from(OwnedFd::from(writer));
        let stderr = nspawn_stderr()?;
        Ok((Streams { stdout, stderr }, Some(own)))
    }

    /// Follows the journal of the container with this root directory.
    fn follow(&mut self, root: OwnedFd, events: &EventLoop) {
        if let Some(journal) = &mut self.journal {
            journal.follow(root, events);
        }
        self.read_journal();
    }

    /// When the journal is looked at without an event.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.journal.as_ref().and_then(FollowedJournal::next_look)
    }

    /// Reads the console.
    pub(super) fn read_console(&mut self) {
        // So that a line which the journal has already is known to be in it.
        self.read_journal();
        let mut buffer = [0; 4096];
        // A few times at most, so that a system that prints without end does not keep other events from being handled.
        for _ in 0..16 {
            let Some(console) = &mut self.console else {
                return;
            };
            match (&*console.pipe).read(&mut buffer) {
                Ok(0) => {
                    console.pipe.unwatch();
                    console.is_closed = true;
                    break;
                }
                Ok(length) => {
                    let lines = console.lines.lines_of(&buffer[..length]);
                    lines.into_iter().for_each(|line| self.print(line));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.stdout.flush();
    }

    fn print(&mut self, line: Vec<u8>) {
        let Some(console) = &mut self.console else {
            return;
        };
        let follows = self
            .journal
            .as_ref()
            .is_some_and(|journal| journal.last().is_some());
        let is_unit_status = is_unit_status(&line);
        if follows && is_unit_status {
            return console.lines.keep(line, now());
        }
        if !is_unit_status {
            console.remember(&line);
        }
        if self.stdout.is_full() {
            console.left_out += 1;
            return;
        }
        let left_out = console.left_out_line();
        left_out
            .into_iter()
            .for_each(|line| self.stdout.push(&line));
        self.stdout.push(&line);
    }

    /// Writes the new entries of the journal as long as the logs take them.
    pub(super) fn read_journal(&mut self) {
        let Some(journal) = &mut self.journal else {
            return;
        };
        journal.look(false);
        for count in 0.. {
            if self.stdout.is_full() || self.stderr.is_full() {
                // The log reports when it takes more.
                break;
            }
            if count == MAX_ENTRIES {
                journal.look_again_at_once();
                break;
            }
            let Some(entry) = journal.next_entry() else {
                break;
            };
            if let Some(line) = journal.line(&entry) {
                match entry.priority() <= ERROR {
                    true => self.stderr.push(&line),
                    false => self.stdout.push(&line),
                }
            }
        }
        self.stdout.flush();
        self.stderr.flush();
    }

    /// The logs take more.
    pub(super) fn resume(&mut self) {
        self.stdout.flush();
        self.stderr.flush();
        self.read_journal();
    }

    /// Reads the console until systemd-nspawn has closed it, or is silent: it copies what a terminal still holds when the container has exited.
    fn read_rest_of_console(&mut self, until: Instant) {
        loop {
            self.read_console();
            let Some(console) = &self.console else {
                return;
            };
            let silence = until
                .saturating_duration_since(Instant::now())
                .min(CONSOLE_SILENCE);
            if console.is_closed || !is_ready(&*console.pipe, PollFlags::IN, silence) {
                return;
            }
        }
    }

    /// The units that the system has asked to stop and not reported as stopped.
    pub(super) fn stopping_units(&self) -> &[String] {
        let journal = self.journal.as_ref();
        journal.map_or(&[], FollowedJournal::stopping_units)
    }

    /// The container has exited: writes what is left.
    fn finish(mut self) -> FinalMessages {
        let until = Instant::now() + FINISH_TIMEOUT;
        if let Some(journal) = &mut self.journal {
            journal.look(true);
        }
        self.read_rest_of_console(until);
        let line = self
            .console
            .as_mut()
            .and_then(|console| console.lines.take_line());
        line.into_iter().for_each(|line| self.print(line));
        loop {
            self.read_journal();
            let is_full = self.stdout.is_full() || self.stderr.is_full();
            let has_more = self
                .next_look()
                .is_some_and(|again| again <= Instant::now());
            if !is_full && !has_more {
                break;
            }
            let left = self.stdout.finish(until) + self.stderr.finish(until);
            if left > 0 || Instant::now() >= until {
                break;
            }
        }
        let last = self
            .journal
            .as_ref()
            .and_then(FollowedJournal::last)
            .unwrap_or(0);
        if let Some(console) = &mut self.console {
            for line in console.lines.take_kept_after(last) {
                self.stdout.push(&line);
            }
            let left_out = console.left_out_line();
            left_out
                .into_iter()
                .for_each(|line| self.stdout.push(&line));
        }
        let left = self.stdout.finish(until) + self.stderr.finish(until);
        if left > 0 {
            let _ = writeln!(
                io::stderr(),
                "the last {left} bytes of the container's output are lost: the log collector has not read them within {} s",
                FINISH_TIMEOUT.as_secs()
            );
        }
        self.final_messages()
    }

    fn final_messages(&self) -> FinalMessages {
        let emergencies = self.journal.as_ref().map(FollowedJournal::emergencies);
        let console = self.console.as_ref();
        let mut failure = emergencies.unwrap_or_default().join("; ");
        if failure.is_empty() {
            failure = console.and_then(Console::failure).unwrap_or_default();
        }
        failure.truncate(failure.floor_char_boundary(MAX_FAILURE_BYTES));
        let last = console.and_then(|console| console.last_lines.back());
        FinalMessages {
            failure: Some(failure).filter(|text| !text.is_empty()),
            shutdown: last
                .filter(|line| SHUTDOWN_LINES.contains(&line.as_str()))
                .cloned(),
        }
    }
}

impl Console {
    fn remember(&mut self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let shown = text.chars().filter(|letter| !letter.is_control());
        if self.last_lines.len() == MAX_LAST_LINES {
            self.last_lines.pop_front();
        }
        self.last_lines
            .push_back(shown.take(MAX_SHOWN_CHARS).collect());
    }

    /// Why systemd could not go on before it had a journal. Other inits have no such mark, and the last line of one may be about anything.
    fn failure(&self) -> Option<String> {
        let mut lines: Vec<_> = self.last_lines.iter().map(String::as_str).collect();
        let last = lines.pop()?;
        (last == EXIT_LINE).then(|| lines.join("; "))
    }

    /// What says how many lines are missing, if any are.
    fn left_out_line(&mut self) -> Option<Vec<u8>> {
        match std::mem::take(&mut self.left_out) {
            0 => None,
            count => Some(format!("[{count} lines of the console are left out]\n").into_bytes()),
        }
    }
}

impl Supervisor {
    /// Follows the journal of the container, unless that has exited.
    pub(super) fn follow_journal(&mut self) {
        let root = self.leader_handle().map(inside::root_of);
        if let (Some(Ok(Some(root))), Some(output)) = (root, &mut self.output) {
            output.follow(root, &self.events);
        }
    }

    /// Handles an event of the output.
    pub(super) fn copy_output(&mut self, event: impl FnOnce(&mut Output)) {
        let Some(output) = &mut self.output else {
            return;
        };
        event(output);
        let journal = output.journal.as_mut();
        let notes = journal.map(FollowedJournal::notes).unwrap_or_default();
        notes.into_iter().for_each(|note| self.notes.add(note));
    }

    /// The system is up: its journal says which units have failed.
    pub(super) fn note_units(&mut self) {
        self.copy_output(|output| {
            output.read_journal();
            output.journal.as_mut().map(FollowedJournal::set_up);
        });
    }

    /// Writes the rest of the output, before the exit is reported: the log collector may be stopped afterwards.
    pub(super) fn finish_output(&mut self) {
        if let Some(output) = self.output.take() {
            self.exit.messages = output.finish();
        }
    }
}

/// The time of the clock from which journald takes the times of entries, in microseconds.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let microseconds = time.tv_sec * 1_000_000 + time.tv_nsec / 1000;
    u64::try_from(microseconds).unwrap_or_default()
}
