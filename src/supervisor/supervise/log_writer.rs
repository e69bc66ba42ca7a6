//! A log of the task that the supervisor writes itself. Never waits for Nomad's log collector: what does not fit into the FIFO is kept up to a
//! limit, and the caller stops producing meanwhile.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::event_loop::{EventLoop, Interest, Source, Token};

/// How much is kept before the producer has to stop.
const FULL_BYTES: usize = 64 * 1024;

/// A log, and what has not been written to it yet.
#[derive(Debug)]
pub(super) struct LogWriter {
    log: Source<File>,
    pending: Vec<u8>,
}

impl LogWriter {
    /// `log` must not block.
    pub(super) fn new(log: File, events: &EventLoop) -> Self {
        Self {
            log: events.source(log, Token::LogWritable),
            pending: Vec::new(),
        }
    }

    /// Whether the producer has to stop until the log can be written again.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= FULL_BYTES
    }

    /// Adds whole lines.
    pub(super) fn push(&mut self, lines: &[u8]) {
        self.pending.extend_from_slice(lines);
        if self.pending.len() >= rustix::pipe::PIPE_BUF {
            self.flush();
        }
    }

    /// Writes as much as the log takes now. While something is left, the event loop reports when it takes more.
    pub(super) fn flush(&mut self) {
        let mut written = 0;
        while written < self.pending.len() {
            match (&*self.log).write(&self.pending[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // A log that can't be written, as on a full disk, must not stop the journal of a running system for good.
                Err(_) => written = self.pending.len(),
            }
        }
        self.pending.drain(..written);
        match self.pending.is_empty() {
            true => {
                self.log.unwatch();
                self.pending.shrink_to(rustix::pipe::PIPE_BUF);
            }
            // Without memory for that, the next line tries again.
            false => drop(self.log.watch(Interest::Writable)),
        }
    }

    /// Waits until everything has been written, or until then. Returns how many bytes are left.
    pub(super) fn finish(&mut self, until: Instant) -> usize {
        self.flush();
        while !self.pending.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !is_ready(&*self.log, PollFlags::OUT, left) {
                break;
            }
            self.flush();
        }
        self.pending.len()
    }
}

/// Waits until a file is ready for this. Returns false if it is not within this time.
pub(super) fn is_ready(file: &impl AsFd, what: PollFlags, within: Duration) -> bool {
    let timeout = Timespec::try_from(within).ok();
    let mut watched = [PollFd::from_borrowed_fd(file.as_fd(), what)];
    poll(&mut watched, timeout.as_ref()).is_ok_and(|ready| ready > 0)
}
