//! The supervisor's end of every lifeline: who listens, what they ask, what they are told. Waits for nobody: whoever does not
//! take what is told, or talks nonsense, is dropped; what a later plugin may ask is answered with an error.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::line::{LONGEST, News, Question, Request, line, next};

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

    /// What has been asked since the last time and can be done.
    pub(super) fn requests(&mut self) -> Vec<(usize, Request)> {
        let mut requests = Vec::new();
        for (index, listener) in self.0.iter_mut().enumerate() {
            listener.receive();
            while let Some(request) = next(&mut listener.received) {
                match request {
                    Ok(Question::Known(request)) => requests.push((index, request)),
                    Ok(Question::Unknown { request }) => {
                        let error = Some("this supervisor can't do what was asked".to_owned());
                        listener.send(&line(&News::Done { request, error }));
                    }
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

    /// Takes what has come, and no more than one line can be long: what is left wakes the supervisor again.
    fn receive(&mut self) {
        let mut buffer = [0; 1024];
        while self.received.len() <= LONGEST {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::line::Verb;
    use proptest::prelude::*;

    fn one() -> (Listeners, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut listeners = Listeners::default();
        listeners.add(ours);
        theirs.set_nonblocking(true).unwrap();
        (listeners, theirs)
    }

    fn is_dropped(listeners: &mut Listeners) -> bool {
        listeners.forget_the_gone()
    }

    #[test]
    fn one_that_never_ends_its_line_is_dropped_and_takes_no_memory() {
        let (mut listeners, mut theirs) = one();
        let mut sent = 0;
        while !is_dropped(&mut listeners) {
            sent += theirs.write(&[b' '; 4096]).unwrap_or(0);
            assert!(listeners.requests().is_empty());
            let held = listeners.0.first().map_or(0, |one| one.received.len());
            assert!(held <= LONGEST + 1024, "{held}");
        }
        assert!(sent > LONGEST);
    }

    #[test]
    fn what_is_not_known_is_answered_and_the_next_is_heard() {
        let (mut listeners, mut theirs) = one();
        theirs
            .write_all(b"{\"request\":1,\"verb\":\"freeze\"}\n{\"request\":2,\"verb\":\"stop\"}\n")
            .unwrap();
        let stop = Request {
            request: 2,
            verb: Verb::Stop,
        };
        assert_eq!(listeners.requests(), [(0, stop)]);
        let mut answer = [0; 4096];
        let length = theirs.read(&mut answer).unwrap();
        let answer = next::<News>(&mut answer[..length].to_vec());
        assert!(
            matches!(
                &answer,
                Some(Ok(News::Done {
                    request: 1,
                    error: Some(_)
                }))
            ),
            "{answer:?}"
        );
        assert!(!is_dropped(&mut listeners));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_none_are_kept(bytes in proptest::collection::vec(any::<u8>(), 1..2000)) {
            let (mut listeners, mut theirs) = one();
            theirs.write_all(&bytes).unwrap();
            theirs.write_all(b"\n").unwrap();
            let asked = listeners.requests();
            prop_assert!(asked.len() <= bytes.len());
            let held = listeners.0.first().map_or(0, |one| one.received.len());
            prop_assert!(held == 0 || is_dropped(&mut listeners));
        }
    }
}
