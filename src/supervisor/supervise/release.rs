//! Releases what a container held on the host, in a thread, because that can take minutes: an ephemeral copy of gigabytes has to be
//! removed, or another process holds the lock of a zone. Meanwhile the event loop serves its clients, and the process exits when
//! the thread has ended. It first waits for the cgroup to become empty, and after a few seconds releases what it can.

use std::io::{self, PipeReader, Write};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::NSPAWN_CLEANUP_TIMEOUT;
use super::event_loop::{EventLoop, Source, Token};
use crate::cgroup::Group;
use crate::cleanup;
use crate::failpoint::{self, Failpoint};
use crate::lease::SharedLocks;
use crate::state::task_dir::{LaunchSpec, Running, TaskDir};

/// The thread that releases everything.
#[derive(Debug)]
pub(super) struct ReleaseThread {
    thread: JoinHandle<()>,
    /// Hangs up at the end of the thread.
    _end: Source<PipeReader>,
}

impl ReleaseThread {
    /// Whether it has ended, for a caller that can't wait for that.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Everything that is left to do once the exit has been reported.
#[derive(Debug)]
pub(super) struct Release {
    pub(super) task_dir: TaskDir,
    pub(super) launch_spec: LaunchSpec,
    /// Only of a container that came up.
    pub(super) running: Option<Running>,
    /// The lock of the range of ids.
    pub(super) uid_range: Option<SharedLocks>,
    /// Whether systemd-nspawn exited by itself, and so has released its locks.
    pub(super) by_itself: bool,
}

impl Release {
    /// Releases everything in a thread, whose end is the event [`Token::Released`]. `None` if the process may start no thread: then
    /// everything has been released already.
    pub(super) fn start(self, events: &EventLoop) -> Option<ReleaseThread> {
        let release = Arc::new(self);
        let started = Arc::clone(&release).spawn(events);
        started
            .inspect_err(|error| {
                let _ = writeln!(
                    io::stderr(),
                    "no thread can be started to release resources, so no request is answered meanwhile: {error}"
                );
                release.run();
            })
            .ok()
    }

    fn spawn(self: Arc<Self>, events: &EventLoop) -> io::Result<ReleaseThread> {
        let (reader, writer) = io::pipe()?;
        let _end = events.register(reader, Token::Released)?;
        let thread = std::thread::Builder::new().spawn(move || {
            // Closed at the end of the thread, even if it panics.
            let _writer = writer;
            self.run();
        })?;
        Ok(ReleaseThread { thread, _end })
    }

    fn run(&self) {
        if let Some(group) = self.launch_spec.cgroup() {
            Group::new(group).wait_empty(NSPAWN_CLEANUP_TIMEOUT);
        }
        if self.by_itself
            && let Err(error) = self.task_dir.write_released()
        {
            let _ = writeln!(
                io::stderr(),
                "the record released can't be written, so the locks of systemd-nspawn are checked once more: {error}"
            );
        }
        failpoint::hit(&self.task_dir, Failpoint::Releasing);
        // Before everything counts as released. The plugin holds it too until it has heard how the start ended.
        if let Some(range) = &self.uid_range {
            range.release_last();
        }
        let running = self.running.as_ref();
        if let Err(error) = cleanup::release(&self.task_dir, &self.launch_spec, running) {
            let _ = writeln!(
                io::stderr(),
                "not all resources could be released, DestroyTask tries again: {error}"
            );
        }
    }
}
