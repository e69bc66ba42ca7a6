//! The supervisor's end of the control sockets: its clients, their requests, the events sent to them. Never waits for a client: one
//! that does not read its events or sends an invalid message is dropped. A request that only a later plugin knows is answered with
//! an error.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use super::event_loop::{EventLoop, Interest, Source, Token};
use crate::state::TaskDir;
use crate::supervisor::framing::{Framing, Received};
use crate::supervisor::protocol::{Event, IncomingRequest, Request};

/// How many requests of one client are received at once, unless more of them arrived together.
const MAX_REQUESTS: usize = 64;

const UNKNOWN_REQUEST: &str = "the task's supervisor, which is of the driver version that started the task, does not support this request";
const NEEDS_PACKETS: &str = "this request is answered only on the packet socket";
const UNWANTED_DESCRIPTORS: &str = "this request takes no file descriptors";

/// The sockets on which plugins connect.
#[derive(Debug)]
pub(super) struct ControlSockets {
    packets: Source<OwnedFd>,
    /// For plugins that know no packet socket.
    stream: Source<UnixListener>,
}

impl ControlSockets {
    /// Both sockets of this task directory, which must not exist yet, registered.
    pub(super) fn listen(task_dir: &TaskDir, events: &EventLoop) -> io::Result<Self> {
        let stream = UnixListener::bind(task_dir.control_stream())?;
        stream.set_nonblocking(true)?;
        let packets = packets::listen(&task_dir.control_socket())?;
        Ok(Self {
            packets: events.register(packets, Token::ControlSocket)?,
            stream: events.register(stream, Token::ControlSocket)?,
        })
    }

    /// Changes what they are registered for.
    pub(super) fn watch(&mut self, interest: Interest) -> io::Result<()> {
        self.packets.watch(interest)?;
        self.stream.watch(interest)
    }

    /// The next connection to one of them. Never waits.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, Framing)> {
        match packets::accept(&*self.packets) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let (stream, _) = self.stream.accept()?;
                Ok((stream.into(), Framing::Lines(Vec::new())))
            }
            socket => Ok((socket?, Framing::Packets)),
        }
    }
}

/// All clients of the control sockets.
#[derive(Debug, Default)]
pub(super) struct Clients {
    all: Vec<Client>,
    next_id: u32,
}

#[derive(Debug)]
struct Client {
    /// Never used again for another client.
    id: u32,
    socket: Source<OwnedFd>,
    framing: Framing,
    disconnected: bool,
    /// Whether this client requested the start.
    owner: bool,
}

impl Clients {
    /// Adds a client and registers its connection. Returns its id.
    pub(super) fn add(&mut self, socket: OwnedFd, framing: Framing, events: &EventLoop) -> u32 {
        let (id, owner) = (self.next_id, self.next_id == 0);
        self.next_id += 1;
        let mut socket = events.source(socket, Token::Client(id));
        // A plugin takes a connection that closes for the death of the supervisor, and kills the container. So a client that
        // can't be registered is kept, see `register_again`.
        let _ = socket.watch(Interest::Readable);
        self.all.push(Client {
            id,
            socket,
            framing,
            disconnected: false,
            owner,
        });
        id
    }

    /// Whether the connection of a client could not be registered.
    pub(super) fn has_unregistered(&self) -> bool {
        self.all.iter().any(|client| !client.socket.is_watched())
    }

    /// Tries again to register the clients that could not be registered, and returns them: they may have sent requests.
    pub(super) fn register_again(&mut self) -> Vec<u32> {
        let unregistered = self.all.iter_mut();
        let unregistered = unregistered.filter(|client| !client.socket.is_watched());
        unregistered
            .map(|client| {
                let _ = client.socket.watch(Interest::Readable);
                client.id
            })
            .collect()
    }

    /// Sends an event to all clients. Returns whether it could be sent to one.
    pub(super) fn broadcast(&mut self, event: &Event) -> bool {
        for client in &mut self.all {
            client.send(event);
        }
        self.all.iter().any(|client| !client.disconnected)
    }

    /// Sends an event to the client that connected last.
    pub(super) fn send_to_last(&mut self, event: &Event) {
        if let Some(client) = self.all.last_mut() {
            client.send(event);
        }
    }

    /// Answers a request of the client with this id, if it still exists.
    pub(super) fn answer(&mut self, id: u32, request: u64, done: io::Result<Option<OwnedFd>>) {
        let Some(client) = self.get_mut(id) else {
            return;
        };
        match done {
            Ok(None) => client.send(&Event::Done {
                request,
                error: None,
            }),
            Ok(Some(descriptor)) => client.send_descriptor(request, descriptor.as_fd()),
            Err(error) => client.refuse(request, &error.to_string()),
        }
    }

    fn get_mut(&mut self, id: u32) -> Option<&mut Client> {
        self.all.iter_mut().find(|client| client.id == id)
    }

    /// The requests of a client that have arrived since the last call and can be handled. The others are answered.
    pub(super) fn requests(&mut self, id: u32) -> Vec<Request> {
        let mut requests = Vec::new();
        let Some(client) = self.get_mut(id) else {
            return requests;
        };
        let mut count = 0;
        while (count < MAX_REQUESTS || client.framing.has_buffered_message())
            && let Some(received) = client.receive()
        {
            count += 1;
            let unwanted = received.descriptors.take::<0>().is_err();
            match received.message {
                IncomingRequest::Known(request) if !unwanted => requests.push(request),
                IncomingRequest::Known(Request { request, .. }) => {
                    client.refuse(request, UNWANTED_DESCRIPTORS);
                }
                IncomingRequest::Unknown { request } => client.refuse(request, UNKNOWN_REQUEST),
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

impl Client {
    /// A client that does not read its events is dropped: no client may block a supervisor.
    fn send(&mut self, event: &Event) {
        if self.framing.send(&*self.socket, event).is_err() {
            self.disconnected = true;
        }
    }

    fn send_descriptor(&mut self, request: u64, descriptor: BorrowedFd<'_>) {
        let error = None;
        let done = Event::Done { request, error };
        match self.framing.send_with(&*self.socket, &done, descriptor) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.refuse(request, NEEDS_PACKETS);
            }
            sent => self.disconnected |= sent.is_err(),
        }
    }

    fn refuse(&mut self, request: u64, error: &str) {
        let error = Some(error.to_owned());
        self.send(&Event::Done { request, error });
    }

    fn receive(&mut self) -> Option<Received<IncomingRequest>> {
        match self.framing.receive(&*self.socket) {
            Ok(received) => Some(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => {
                self.disconnected = true;
                None
            }
        }
    }
}

#[cfg(test)]
#[path = "clients_tests.rs"]
mod tests;
