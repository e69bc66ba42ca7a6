//! Tests of the supervisor's end of the control sockets, with packets and with lines.

use std::fs::File;
use std::os::fd::AsFd;

use super::*;
use crate::supervisor::protocol::{Action, IncomingEvent, MAX_LINE_BYTES};
use proptest::prelude::*;
use rstest::rstest;

const STOP: Request = Request {
    request: 2,
    verb: Action::Stop,
};

fn lines() -> Framing {
    Framing::Lines(Vec::new())
}

/// The other end of a client's connection.
struct Peer(OwnedFd, Framing);

impl Peer {
    /// Sends this text as one message.
    fn send(&self, text: &str) -> io::Result<()> {
        match &self.1 {
            Framing::Packets => packets::send(&self.0, text.as_bytes(), &[]),
            Framing::Lines(_) => self.send_raw(format!("{text}\n").as_bytes()).map(drop),
        }
    }

    fn send_raw(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(
            &self.0,
            bytes,
            rustix::net::SendFlags::DONTWAIT,
        )?)
    }

    fn event(&mut self) -> Event {
        match self.1.receive(&self.0).unwrap().message {
            IncomingEvent::Known(event) => *event,
            other => panic!("{other:?}"),
        }
    }

    /// The error in the answer to this request.
    fn refusal(&mut self, request: u64) -> String {
        match self.event() {
            Event::Done {
                request: answered,
                error: Some(error),
            } if answered == request => error,
            other => panic!("{other:?}"),
        }
    }
}

fn client(framing: Framing) -> (Clients, Peer) {
    let (ours, theirs) = match &framing {
        Framing::Packets => packets::pair().unwrap(),
        Framing::Lines(_) => {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            (ours.into(), theirs.into())
        }
    };
    let other = match &framing {
        Framing::Packets => Framing::Packets,
        Framing::Lines(_) => lines(),
    };
    let mut clients = Clients::default();
    clients.add(ours, framing, &EventLoop::new().unwrap());
    (clients, Peer(theirs, other))
}

fn is_dropped(clients: &mut Clients) -> bool {
    clients.drop_disconnected()
}

/// A plugin would take a closed connection for the death of the supervisor.
#[test]
fn a_client_that_cannot_be_registered_is_kept_and_registered_later() {
    let mut events = EventLoop::new().unwrap();
    let (ours, theirs) = packets::pair().unwrap();
    let mut clients = Clients::default();
    events.refuse(true);
    clients.add(ours, Framing::Packets, &events);
    packets::send(&theirs, &packets::encode(&STOP), &[]).unwrap();
    assert!(clients.has_unregistered());
    assert_eq!(clients.register_again(), [0]);
    assert_eq!(clients.requests(0), [STOP]);
    assert!(clients.has_unregistered() && !is_dropped(&mut clients));
    events.refuse(false);
    assert_eq!(clients.register_again(), [0]);
    assert!(!clients.has_unregistered());
    assert!(clients.register_again().is_empty());
    drop(theirs);
    assert_eq!(events.wait().unwrap()[0].token, Token::Client(0));
}

/// How many received bytes are kept of the first client.
fn held(clients: &Clients) -> usize {
    match clients.all.first().map(|client| &client.framing) {
        Some(Framing::Lines(received)) => received.capacity(),
        Some(Framing::Packets) | None => 0,
    }
}

#[test]
fn a_client_that_never_ends_its_line_is_dropped_and_takes_no_memory() {
    let (mut clients, theirs) = client(lines());
    let mut sent = 0;
    while !is_dropped(&mut clients) {
        sent += theirs.send_raw(&[b' '; 4096]).unwrap_or(0);
        assert!(clients.requests(0).is_empty());
        assert!(held(&clients) <= 2 * MAX_LINE_BYTES);
    }
    assert!(sent > MAX_LINE_BYTES);
}

#[rstest]
#[case::packets(Framing::Packets)]
#[case::lines(lines())]
fn an_unknown_request_is_answered_and_the_next_is_received(#[case] framing: Framing) {
    let (mut clients, mut theirs) = client(framing);
    theirs.send(r#"{"request":1,"verb":"freeze"}"#).unwrap();
    theirs.send(r#"{"request":2,"verb":"stop"}"#).unwrap();
    assert_eq!(clients.requests(0), [STOP]);
    assert_eq!(theirs.refusal(1), UNKNOWN_REQUEST);
    assert!(!is_dropped(&mut clients));
    assert_eq!(held(&clients), 0);
}

#[test]
fn a_request_with_descriptors_is_answered_and_they_are_closed() {
    let (mut clients, mut theirs) = client(Framing::Packets);
    let null = File::open("/dev/null").unwrap();
    let (mut read, write) = std::io::pipe().unwrap();
    let stop = packets::encode(&STOP);
    let exec = br#"{"request":3,"verb":{"exec":{}}}"#;
    packets::send(&theirs.0, &stop, &[write.as_fd()]).unwrap();
    packets::send(
        &theirs.0,
        exec,
        &[null.as_fd(), null.as_fd(), write.as_fd()],
    )
    .unwrap();
    drop(write);
    packets::send(&theirs.0, &stop, &[]).unwrap();
    assert_eq!(clients.requests(0), [STOP]);
    assert_eq!(theirs.refusal(2), UNWANTED_DESCRIPTORS);
    assert_eq!(theirs.refusal(3), UNKNOWN_REQUEST);
    rustix::io::ioctl_fionbio(&read, true).unwrap();
    assert_eq!(io::Read::read(&mut read, &mut [0]).unwrap(), 0);
    assert!(!is_dropped(&mut clients));
}

#[test]
fn a_descriptor_is_sent_in_a_packet_and_not_in_a_line() {
    let file = || File::open("/dev/null").unwrap().into();
    let (mut clients, theirs) = client(Framing::Packets);
    clients.answer(0, 7, Ok(Some(file())));
    let packet = packets::receive(&theirs.0).unwrap();
    let done = Event::Done {
        request: 7,
        error: None,
    };
    let known = IncomingEvent::Known(Box::new(done));
    assert_eq!(packet.message(), Ok(known));
    packet.descriptors.take::<1>().unwrap();
    let (mut clients, mut theirs) = client(lines());
    clients.answer(0, 7, Ok(Some(file())));
    assert_eq!(theirs.refusal(7), NEEDS_PACKETS);
    assert!(!is_dropped(&mut clients));
}

#[rstest]
#[case::packets(Framing::Packets)]
#[case::lines(lines())]
fn more_requests_than_are_received_at_once_are_received_later(#[case] framing: Framing) {
    let (mut clients, theirs) = client(framing);
    let count = 3 * MAX_REQUESTS;
    for _ in 0..count {
        theirs.send(r#"{"request":2,"verb":"stop"}"#).unwrap();
    }
    let mut received = 0;
    while received < count {
        let requests = clients.requests(0);
        assert!(!requests.is_empty(), "{received}");
        assert!(requests.len() < count);
        assert!(!clients.all[0].framing.has_buffered_message());
        received += requests.len();
    }
    assert!(!is_dropped(&mut clients));
}

#[rstest]
#[case::packets(Framing::Packets)]
#[case::lines(lines())]
fn requests_of_a_client_that_is_gone_are_received(#[case] framing: Framing) {
    let (mut clients, theirs) = client(framing);
    clients.broadcast(&Event::Done {
        request: 0,
        error: None,
    });
    theirs.send(r#"{"request":2,"verb":"stop"}"#).unwrap();
    drop(theirs);
    assert_eq!(clients.requests(0), [STOP]);
    assert!(is_dropped(&mut clients));
}

#[rstest]
#[case::packets(Framing::Packets)]
#[case::lines(lines())]
fn a_client_that_does_not_read_is_dropped(#[case] framing: Framing) {
    let (mut clients, _theirs) = client(framing);
    let event = Event::Done {
        request: 0,
        error: Some("x".repeat(10_000)),
    };
    // The buffer of a socket holds less than this.
    for _ in 0..1000 {
        clients.broadcast(&event);
    }
    assert!(is_dropped(&mut clients));
}

#[test]
fn a_packet_that_is_no_request_drops_its_client() {
    let too_long = " ".repeat(packets::MAX_PACKET_BYTES + 1);
    for nonsense in ["", "7", "nonsense", &too_long] {
        let (mut clients, theirs) = client(Framing::Packets);
        theirs.send_raw(nonsense.as_bytes()).unwrap();
        theirs.send(r#"{"request":2,"verb":"stop"}"#).unwrap();
        assert!(clients.requests(0).is_empty());
        assert!(is_dropped(&mut clients));
    }
}

#[test]
fn both_sockets_accept_connections() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path());
    let sockets = ControlSockets::listen(&task_dir, &EventLoop::new().unwrap()).unwrap();
    let nothing = sockets.accept().unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    let _old = std::os::unix::net::UnixStream::connect(task_dir.control_stream()).unwrap();
    let _new = packets::connect(&task_dir.control_socket()).unwrap();
    let accepted = [sockets.accept().unwrap(), sockets.accept().unwrap()];
    assert!(matches!(
        accepted,
        [(_, Framing::Packets), (_, Framing::Lines(_))]
    ));
}

proptest! {
    #[test]
    fn no_bytes_panic_and_none_are_kept(bytes in proptest::collection::vec(any::<u8>(), 1..2000)) {
        for framing in [Framing::Packets, lines()] {
            let (mut clients, theirs) = client(framing);
            theirs.send_raw(&bytes).unwrap();
            theirs.send_raw(b"\n").unwrap();
            let asked = clients.requests(0);
            prop_assert!(asked.len() <= bytes.len());
            prop_assert!(held(&clients) == 0 || is_dropped(&mut clients));
        }
    }
}
