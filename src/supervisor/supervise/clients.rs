//! The supervisor's end of the control socket: its clients, their requests, the events sent to them. Never waits for a client: one
//! that does not read its events or sends an invalid message is dropped. A request that only a later plugin knows is answered with
//! an error.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::event_loop::{EventLoop, Interest, Source, Token};
use crate::supervisor::protocol::{
    Event, IncomingRequest, MAX_LINE_BYTES, Request, decode_next, encode,
};

/// All clients of the control socket.
#[derive(Debug, Default)]
pub(super) struct Clients {
    all: Vec<Client>,
    next_id: u32,
}

#[derive(Debug)]
struct Client {
    /// Never used again for another client.
    id: u32,
    stream: Source<UnixStream>,
    received: Vec<u8>,
    disconnected: bool,
    /// Whether this client requested the start.
    owner: bool,
}

impl Clients {
    /// Adds a client and registers its connection.
    pub(super) fn add(&mut self, stream: UnixStream, events: &EventLoop) {
        let (id, owner) = (self.next_id, self.next_id == 0);
        if stream.set_nonblocking(true).is_ok() {
            self.next_id += 1;
            let mut stream = events.source(stream, Token::Client(id));
            // A plugin takes a connection that closes for the death of the supervisor, and kills the container. So a client that
            // can't be registered is kept, see `register_again`.
            let _ = stream.watch(Interest::Readable);
            self.all.push(Client {
                id,
                stream,
                received: Vec::new(),
                disconnected: false,
                owner,
            });
        }
    }

    /// Whether the connection of a client could not be registered.
    pub(super) fn has_unregistered(&self) -> bool {
        self.all.iter().any(|client| !client.stream.is_watched())
    }

    /// Tries again to register the clients that could not be registered, and returns them: they may have sent requests.
    pub(super) fn register_again(&mut self) -> Vec<u32> {
        let unregistered = self.all.iter_mut();
        let unregistered = unregistered.filter(|client| !client.stream.is_watched());
        unregistered
            .map(|client| {
                let _ = client.stream.watch(Interest::Readable);
                client.id
            })
            .collect()
    }

    pub(super) fn broadcast(&mut self, event: &Event) {
        let line = encode(event);
        for client in &mut self.all {
            client.send(&line);
        }
    }

    /// Sends an event to the client that connected last.
    pub(super) fn send_to_last(&mut self, event: &Event) {
        if let Some(client) = self.all.last_mut() {
            client.send(&encode(event));
        }
    }

    /// Answers the client with this id, if it still exists.
    pub(super) fn answer(&mut self, id: u32, event: &Event) {
        if let Some(client) = self.get_mut(id) {
            client.send(&encode(event));
        }
    }

    fn get_mut(&mut self, id: u32) -> Option<&mut Client> {
        self.all.iter_mut().find(|client| client.id == id)
    }

    /// The requests of a client that have arrived since the last call and are known.
    pub(super) fn requests(&mut self, id: u32) -> Vec<Request> {
        let mut requests = Vec::new();
        let Some(client) = self.get_mut(id) else {
            return requests;
        };
        client.receive();
        while let Some(request) = decode_next(&mut client.received) {
            match request {
                Ok(IncomingRequest::Known(request)) => requests.push(request),
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
        requests
    }

    /// Drops the clients whose connection is closed; returns whether the owner is among them.
    pub(super) fn drop_disconnected(&mut self) -> bool {
        let owner = self
            .all
            .iter()
            .any(|client| client.disconnected && client.owner);
        self.all.retain(|client| !client.disconnected);
        owner
    }
}

/// Sends an event to a client that is not kept.
pub(super) fn send(mut stream: &UnixStream, event: &Event) {
    // A client that is gone does not need it.
    let _ = stream.write_all(&encode(event));
}

impl Client {
    /// A client that does not read its events is dropped: no client may block a supervisor.
    fn send(&mut self, line: &[u8]) {
        if self.stream.write_all(line).is_err() {
            self.disconnected = true;
        }
    }

    /// Reads at most one maximum-length message; the event loop reports the rest.
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
        clients.add(ours, &EventLoop::new().unwrap());
        theirs.set_nonblocking(true).unwrap();
        (clients, theirs)
    }

    /// A plugin would take a closed connection for the death of the supervisor.
    #[test]
    fn one_that_can_not_be_registered_is_kept_and_registered_later() {
        let mut events = EventLoop::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut clients = Clients::default();
        events.refuse(true);
        clients.add(ours, &events);
        theirs
            .write_all(b"{\"request\":1,\"verb\":\"stop\"}\n")
            .unwrap();
        assert!(clients.has_unregistered());
        assert_eq!(clients.register_again(), [0]);
        assert_eq!(clients.requests(0).len(), 1);
        assert!(clients.has_unregistered() && !is_dropped(&mut clients));
        events.refuse(false);
        assert_eq!(clients.register_again(), [0]);
        assert!(!clients.has_unregistered());
        assert!(clients.register_again().is_empty());
        drop(theirs);
        assert_eq!(events.wait().unwrap()[0].token, Token::Client(0));
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
            assert!(clients.requests(0).is_empty());
            let held = clients
                .all
                .first()
                .map_or(0, |client| client.received.len());
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
        assert_eq!(clients.requests(0), [stop]);
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
            let asked = clients.requests(0);
            prop_assert!(asked.len() <= bytes.len());
            let held = clients.all.first().map_or(0, |client| client.received.len());
            prop_assert!(held == 0 || is_dropped(&mut clients));
        }
    }
}
