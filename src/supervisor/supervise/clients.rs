//! The supervisor's end of the control socket: its clients, their requests, the events sent to them. Never waits for a client: one
//! that does not read its events or sends an invalid message is dropped. A request that only a later plugin knows is answered with
//! an error.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crate::supervisor::protocol::{
    Event, IncomingRequest, MAX_LINE_BYTES, Request, decode_next, encode,
};

/// All clients of the control socket.
#[derive(Debug, Default)]
pub(super) struct Clients(Vec<Client>);

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    disconnected: bool,
    /// Whether this client requested the start.
    owner: bool,
}

impl Clients {
    pub(super) fn add(&mut self, stream: UnixStream) {
        let owner = self.0.is_empty();
        if stream.set_nonblocking(true).is_ok() {
            self.0.push(Client {
                stream,
                received: Vec::new(),
                disconnected: false,
                owner,
            });
        }
    }

    pub(super) fn broadcast(&mut self, event: &Event) {
        let line = encode(event);
        for client in &mut self.0 {
            client.send(&line);
        }
    }

    /// Sends an event to the client that connected last.
    pub(super) fn send_to_last(&mut self, event: &Event) {
        if let Some(client) = self.0.last_mut() {
            client.send(&encode(event));
        }
    }

    /// Answers the client with this index among the [`requests`](Self::requests).
    pub(super) fn answer(&mut self, index: usize, event: &Event) {
        if let Some(client) = self.0.get_mut(index) {
            client.send(&encode(event));
        }
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|client| client.stream.as_fd())
    }

    /// The requests that have arrived since the last call and are known.
    pub(super) fn requests(&mut self) -> Vec<(usize, Request)> {
        let mut requests = Vec::new();
        for (index, client) in self.0.iter_mut().enumerate() {
            client.receive();
            while let Some(request) = decode_next(&mut client.received) {
                match request {
                    Ok(IncomingRequest::Known(request)) => requests.push((index, request)),
                    Ok(IncomingRequest::Unknown { request }) => {
                        let error = Some("this supervisor can't do what was asked".to_owned());
                        client.send(&encode(&Event::Done { request, error }));
                    }
                    Err(_) => {
                        client.disconnected = true;
                        break;
                    }
                }
            }
        }
        requests
    }

    /// Drops the clients whose connection is closed; returns whether the owner is among them.
    pub(super) fn drop_disconnected(&mut self) -> bool {
        let owner = self
            .0
            .iter()
            .any(|client| client.disconnected && client.owner);
        self.0.retain(|client| !client.disconnected);
        owner
    }
}

impl Client {
    /// A client that does not read its events is dropped: no client may block a supervisor.
    fn send(&mut self, line: &[u8]) {
        if self.stream.write_all(line).is_err() {
            self.disconnected = true;
        }
    }

    /// Reads at most one maximum-length message; `poll` reports the rest.
    fn receive(&mut self) {
        let mut buffer = [0; 1024];
        while self.received.len() <= MAX_LINE_BYTES {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.disconnected = true,
                Ok(length) => {
                    self.received.extend_from_slice(&buffer[..length]);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => self.disconnected = true,
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::protocol::Action;
    use proptest::prelude::*;

    fn client() -> (Clients, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut clients = Clients::default();
        clients.add(ours);
        theirs.set_nonblocking(true).unwrap();
        (clients, theirs)
    }

    fn is_dropped(clients: &mut Clients) -> bool {
        clients.drop_disconnected()
    }

    #[test]
    fn one_that_never_ends_its_line_is_dropped_and_takes_no_memory() {
        let (mut clients, mut theirs) = client();
        let mut sent = 0;
        while !is_dropped(&mut clients) {
            sent += theirs.write(&[b' '; 4096]).unwrap_or(0);
            assert!(clients.requests().is_empty());
            let held = clients.0.first().map_or(0, |client| client.received.len());
            assert!(held <= MAX_LINE_BYTES + 1024, "{held}");
        }
        assert!(sent > MAX_LINE_BYTES);
    }

    #[test]
    fn what_is_not_known_is_answered_and_the_next_is_received() {
        let (mut clients, mut theirs) = client();
        theirs
            .write_all(b"{\"request\":1,\"verb\":\"freeze\"}\n{\"request\":2,\"verb\":\"stop\"}\n")
            .unwrap();
        let stop = Request {
            request: 2,
            verb: Action::Stop,
        };
        assert_eq!(clients.requests(), [(0, stop)]);
        let mut answer = [0; 4096];
        let length = theirs.read(&mut answer).unwrap();
        let answer = decode_next::<Event>(&mut answer[..length].to_vec());
        assert!(
            matches!(
                &answer,
                Some(Ok(Event::Done {
                    request: 1,
                    error: Some(_)
                }))
            ),
            "{answer:?}"
        );
        assert!(!is_dropped(&mut clients));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_none_are_kept(bytes in proptest::collection::vec(any::<u8>(), 1..2000)) {
            let (mut clients, mut theirs) = client();
            theirs.write_all(&bytes).unwrap();
            theirs.write_all(b"\n").unwrap();
            let asked = clients.requests();
            prop_assert!(asked.len() <= bytes.len());
            let held = clients.0.first().map_or(0, |client| client.received.len());
            prop_assert!(held == 0 || is_dropped(&mut clients));
        }
    }
}
