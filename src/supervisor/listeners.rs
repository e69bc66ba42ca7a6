//! The supervisor's end of every lifeline: who listens, what they ask, what they are told. Waits for nobody: whoever does not
//! take what is told, or talks nonsense, is dropped.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::line::{News, Request, line, next};

/// Everybody who listens on the lifeline.
#[derive(Debug, Default)]
pub(super) struct Listeners(Vec<Listener>);

#[derive(Debug)]
struct Listener {
    stream: UnixStream,
    received: Vec<u8>,
    gone: bool,
    /// Whether this one asked for the start.
    asker: bool,
}

impl Listeners {
    pub(super) fn add(&mut self, stream: UnixStream) {
        let asker = self.0.is_empty();
        if stream.set_nonblocking(true).is_ok() {
            self.0.push(Listener {
                stream,
                received: Vec::new(),
                gone: false,
                asker,
            });
        }
    }

    pub(super) fn tell(&mut self, news: &News) {
        let line = line(news);
        for listener in &mut self.0 {
            listener.send(&line);
        }
    }

    /// Tells the one that came last how things stand.
    pub(super) fn tell_newcomer(&mut self, news: &News) {
        if let Some(newcomer) = self.0.last_mut() {
            newcomer.send(&line(news));
        }
    }

    /// Answers the listener that has this index among the [`requests`](Self::requests).
    pub(super) fn answer(&mut self, index: usize, news: &News) {
        if let Some(listener) = self.0.get_mut(index) {
            listener.send(&line(news));
        }
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|listener| listener.stream.as_fd())
    }

    /// Everything that has been asked since the last time.
    pub(super) fn requests(&mut self) -> Vec<(usize, Request)> {
        let mut requests = Vec::new();
        for (index, listener) in self.0.iter_mut().enumerate() {
            listener.receive();
            while let Some(request) = next(&mut listener.received) {
                match request {
                    Ok(request) => requests.push((index, request)),
                    Err(_) => {
                        listener.gone = true;
                        break;
                    }
                }
            }
        }
        requests
    }

    /// Forgets those whose end of the line is closed; whether the asker is among them.
    pub(super) fn forget_the_gone(&mut self) -> bool {
        let asker = self
            .0
            .iter()
            .any(|listener| listener.gone && listener.asker);
        self.0.retain(|listener| !listener.gone);
        asker
    }
}

impl Listener {
    /// One that does not take what it is told is dropped: nobody may make a supervisor wait.
    fn send(&mut self, line: &[u8]) {
        if self.stream.write_all(line).is_err() {
            self.gone = true;
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.gone = true,
                Ok(length) => {
                    self.received.extend_from_slice(&buffer[..length]);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => self.gone = true,
            }
            return;
        }
    }
}
