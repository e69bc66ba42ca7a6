//! Whether the container is ready, for tasks that count as started only then: the system or the command has sent `READY=1`. A system tells
//! systemd-nspawn, which passes it on; a command has a socket of the supervisor. What else is said meanwhile explains a start that takes
//! long or fails.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use super::event_loop::{EventLoop, Source, Token};
use super::{LeaderState, State, Supervisor};
use crate::container::{Cause, Exit, Mode};
use crate::supervisor::protocol::{Event, StartFailure, StartStep};

/// How long a start may take before a task event says what it waits for.
const SILENCE: Duration = Duration::from_secs(5);
/// How much of a status is repeated.
const MAX_STATUS_CHARS: usize = 200;

/// What the system or the command says about itself.
#[derive(Debug, Default)]
pub(super) struct Said {
    is_ready: bool,
    /// What was said last about what it does.
    status: Option<String>,
}

impl Said {
    /// Takes in what was sent.
    fn hear(&mut self, message: &str) {
        for line in message.lines() {
            if line == "READY=1" {
                self.is_ready = true;
            }
            // systemd-nspawn says that itself.
            let is_of_nspawn =
                ["STATUS=Container running.", "STATUS=Container started."].contains(&line);
            if let Some(status) = line.strip_prefix("STATUS=").filter(|_| !is_of_nspawn) {
                // What systemd-nspawn puts in front of the system's own words.
                let status = status.strip_prefix("Container running: ").unwrap_or(status);
                let shown = status.chars().filter(|letter| !letter.is_control());
                let shown: String = shown.take(MAX_STATUS_CHARS).collect();
                self.status = Some(shown).filter(|status| !status.is_empty());
            }
        }
    }

    /// Forgets the last status, which is about something else than what follows.
    pub(super) fn forget_status(&mut self) {
        self.status = None;
    }

    /// The last status, to be put after a sentence.
    pub(super) fn last_status(&self) -> String {
        let status = self.status.as_ref();
        status.map_or_else(String::new, |status| {
            format!(". The last it said: {status}")
        })
    }
}

/// The wait for a container that has to say that it is ready.
#[derive(Debug)]
pub(super) struct Readiness {
    limit: Duration,
    /// Where a command says it.
    socket: Option<Source<UnixDatagram>>,
    /// When the container was up.
    since: Option<Instant>,
    /// Whether an event has named what it waits for.
    is_explained: bool,
}

impl Readiness {
    pub(super) fn new(limit: Duration, socket: Option<Source<UnixDatagram>>) -> Self {
        Self {
            limit,
            socket,
            since: None,
            is_explained: false,
        }
    }

    /// What a command has sent since the last call.
    fn messages(&self) -> Vec<String> {
        let mut datagram = [0; 4096];
        let mut messages = Vec::new();
        while let Some(Ok(length)) = self
            .socket
            .as_ref()
            .map(|socket| socket.recv(&mut datagram))
        {
            messages.push(String::from_utf8_lossy(&datagram[..length]).into_owned());
        }
        messages
    }

    /// When there is something to do although nothing was said.
    fn next_step(&self) -> Option<Instant> {
        let step = match self.is_explained {
            true => self.limit,
            false => self.limit.min(SILENCE),
        };
        Some(self.since? + step)
    }
}

impl Supervisor {
    /// Whether the container is up and has not said that it is ready.
    pub(super) fn is_awaited(&self) -> bool {
        let is_up = matches!(self.state, State::Running { .. });
        is_up && self.readiness.is_some() && !self.said.is_ready
    }

    /// The container is up: tells the clients, unless they wait until it is ready.
    pub(super) fn announce_start(&mut self) {
        if let Some(readiness) = &mut self.readiness {
            readiness.since = Some(Instant::now());
        }
        self.announce_ready();
    }

    /// Reads what a command has said.
    pub(super) fn read_ready_socket(&mut self) {
        let was_awaited = self.is_awaited();
        if let Some(readiness) = &self.readiness {
            let messages = readiness.messages();
            messages.iter().for_each(|message| self.said.hear(message));
        }
        if was_awaited {
            self.announce_ready();
        }
    }

    /// Takes in what systemd-nspawn passes on from the system. A command has a socket of its own.
    pub(super) fn hear_system(&mut self, message: &str) {
        if self.launch_spec.mode == Mode::Boot {
            self.said.hear(message);
        }
    }

    /// Tells the clients that the task has started, if it has.
    pub(super) fn announce_ready(&mut self) {
        if self.is_awaited() || self.exit.reported.is_some() {
            return;
        }
        if self.readiness.is_some() {
            self.note_units();
        }
        if let State::Running { running, .. } = &self.state {
            let started = running.started.clone();
            self.clients.broadcast(&Event::Started(started));
        }
    }

    /// When to look after a container that does not say that it is ready.
    pub(super) fn next_ready_step(&self) -> Option<Instant> {
        let readiness = self.readiness.as_ref().filter(|_| self.is_awaited())?;
        // Once it has exited, that is what there is to report.
        let is_alive = self.exit.leader == LeaderState::Alive;
        readiness.next_step().filter(|_| is_alive)
    }

    /// The container has been silent for a while, or for too long.
    pub(super) fn on_ready_step(&mut self) {
        if !self.is_awaited() || self.exit.leader != LeaderState::Alive {
            return;
        }
        let Some(readiness) = &mut self.readiness else {
            return;
        };
        let waited = readiness
            .since
            .map_or(Duration::ZERO, |since| since.elapsed());
        if waited >= readiness.limit {
            let limit = readiness.limit.as_secs_f64();
            let reason = format!(
                "the task was not ready within {limit} s (config.ready_timeout){}",
                self.said.last_status()
            );
            // systemd-nspawn is to clean up after it.
            self.kill();
            self.state =
                State::Failing(StartFailure::new(StartStep::Ready, Cause::Unknown, reason));
            self.init_channel = None;
            return;
        }
        if waited >= SILENCE && !readiness.is_explained {
            readiness.is_explained = true;
            let note = format!(
                "the task is not ready after {} s{}",
                SILENCE.as_secs(),
                self.said.last_status()
            );
            self.notes.add(note);
        }
    }

    /// Why a container that has exited counts as not started.
    pub(super) fn exited_unready(&self, exit: &Exit) -> StartFailure {
        let how = match (&exit.error, exit.code) {
            _ if exit.oom_killed => "an OOM kill".to_owned(),
            (Some(error), code) => format!("exit code {code}: {error}"),
            (None, code) => format!("exit code {code}"),
        };
        let reason = format!(
            "the task has ended before it was ready, with {how}{}",
            self.said.last_status()
        );
        StartFailure::new(StartStep::Ready, Cause::Unknown, reason)
    }
}

/// Registers the socket on which a command says that it is ready. Any user of the container may write to it; only the container has it.
pub(super) fn listen(path: &Path, events: &EventLoop) -> io::Result<Source<UnixDatagram>> {
    let socket = UnixDatagram::bind(path)?;
    socket.set_nonblocking(true)?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    events.register(socket, Token::Ready)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn heard(messages: &[&str]) -> Said {
        let mut said = Said::default();
        messages.iter().for_each(|message| said.hear(message));
        said
    }

    #[rstest]
    #[case(&["READY=1\n"], true, "")]
    #[case(&["STATUS=Container running: Ready.\nREADY=1"], true, ". The last it said: Ready.")]
    #[case(&["STATUS=a", "STATUS=b\x1b[1m"], false, ". The last it said: b[1m")]
    #[case(&["STATUS=a", "STATUS="], false, "")]
    #[case(&["STATUS=Container running.\nX_NSPAWN_LEADER_PID=7"], false, "")]
    #[case(&["READY=0", "xREADY=1", "READY=11"], false, "")]
    fn what_was_said_is_known(
        #[case] messages: &[&str],
        #[case] is_ready: bool,
        #[case] last: &str,
    ) {
        let said = heard(messages);
        assert_eq!(said.is_ready, is_ready);
        assert_eq!(said.last_status(), last);
    }

    #[test]
    fn a_long_status_is_cut_off() {
        let said = heard(&[&format!("STATUS={}", "\u{fc}".repeat(4000))]);
        assert_eq!(said.status.unwrap().chars().count(), MAX_STATUS_CHARS);
    }

    #[test]
    fn a_start_is_explained_once_and_then_given_up() {
        let mut readiness = Readiness::new(Duration::from_secs(9), None);
        assert_eq!(readiness.next_step(), None);
        let since = Instant::now();
        readiness.since = Some(since);
        assert_eq!(readiness.next_step(), Some(since + SILENCE));
        readiness.is_explained = true;
        assert_eq!(readiness.next_step(), Some(since + readiness.limit));
        let mut short = Readiness::new(Duration::from_secs(1), None);
        short.since = Some(since);
        assert_eq!(short.next_step(), Some(since + Duration::from_secs(1)));
    }
}
