//! Tests of the event loop.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::*;

/// A bound against hanging.
const LIMIT: Duration = Duration::from_secs(60);

fn ready(token: Token) -> Ready {
    Ready {
        token,
        hung_up: false,
    }
}

/// What is ready now.
fn now(events: &mut EventLoop) -> Vec<Ready> {
    events.set_timer(Token::ExitTimeout, Some(Instant::now()));
    let mut found = events.wait().unwrap();
    assert_eq!(found.pop(), Some(ready(Token::ExitTimeout)));
    found
}

fn registered(events: &EventLoop, token: Token) -> (Source<UnixStream>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (events.register(ours, token).unwrap(), theirs)
}

#[test]
fn what_is_ready_is_returned_in_the_order_of_the_tokens_until_it_is_handled() {
    let mut events = EventLoop::new().unwrap();
    let order = [
        Token::Notify,
        Token::ControlSocket,
        Token::Client(1),
        Token::Client(2),
        Token::Leader,
        Token::Signals,
    ];
    // Registered and made ready in the other direction.
    let mut sources: Vec<_> = order
        .iter()
        .rev()
        .map(|token| registered(&events, *token))
        .collect();
    assert_eq!(now(&mut events), []);
    for (_, theirs) in &mut sources {
        theirs.write_all(b"x").unwrap();
    }
    for _ in 0..2 {
        assert_eq!(now(&mut events), order.map(ready));
    }
    let (notify, _) = sources.last_mut().unwrap();
    notify.read_exact(&mut [0]).unwrap();
    assert_eq!(
        now(&mut events),
        order[1..].iter().copied().map(ready).collect::<Vec<_>>()
    );
}

#[test]
fn a_source_that_is_dropped_or_no_longer_watched_is_not_returned() {
    let mut events = EventLoop::new().unwrap();
    let (dropped, mut first) = registered(&events, Token::Client(1));
    let (mut unwatched, mut second) = registered(&events, Token::Client(2));
    for theirs in [&mut first, &mut second] {
        theirs.write_all(b"x").unwrap();
    }
    // Another descriptor of the same connection keeps it open.
    let _other = dropped.try_clone().unwrap();
    drop(dropped);
    unwatched.unwatch();
    assert!(!unwatched.is_watched());
    assert_eq!(now(&mut events), []);
    unwatched.watch(Interest::Readable).unwrap();
    assert_eq!(now(&mut events), [ready(Token::Client(2))]);
}

/// A pollable that closes its descriptor by itself, as the channel to the init does.
struct Closable(Option<UnixStream>);

impl Pollable for Closable {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }
}

#[test]
fn a_descriptor_that_is_closed_is_not_returned_and_its_successor_is() {
    let mut events = EventLoop::new().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut channel = events
        .register(Closable(Some(ours)), Token::InitChannel)
        .unwrap();
    theirs.write_all(b"x").unwrap();
    assert_eq!(now(&mut events), [ready(Token::InitChannel)]);
    channel.0 = None;
    assert_eq!(now(&mut events), []);
    // The kernel gives it the lowest free number, which was the other's.
    let (_next, mut peer) = registered(&events, Token::Client(1));
    peer.write_all(b"x").unwrap();
    drop(channel);
    assert_eq!(now(&mut events), [ready(Token::Client(1))]);
}

#[test]
fn a_hang_up_is_returned_with_and_without_interest_in_data() {
    let mut events = EventLoop::new().unwrap();
    let (mut source, mut theirs) = registered(&events, Token::Leader);
    source.watch(Interest::HangUp).unwrap();
    theirs.write_all(b"x").unwrap();
    assert_eq!(now(&mut events), []);
    drop(theirs);
    let hung_up = Ready {
        token: Token::Leader,
        hung_up: true,
    };
    assert_eq!(now(&mut events), [hung_up]);
    source.watch(Interest::Readable).unwrap();
    assert_eq!(now(&mut events), [hung_up]);
}

#[test]
fn a_timer_expires_once_and_not_before_its_time() {
    let mut events = EventLoop::new().unwrap();
    let (_source, mut theirs) = registered(&events, Token::Notify);
    let soon = Instant::now() + Duration::from_millis(20);
    events.set_timer(Token::PendingSignals, Some(soon));
    events.set_timer(Token::AcceptPause, Some(soon + LIMIT));
    assert_eq!(events.wait().unwrap(), [ready(Token::PendingSignals)]);
    assert!(Instant::now() >= soon);
    events.set_timer(Token::AcceptPause, None);
    events.set_timer(Token::UnregisteredClients, Some(soon + LIMIT));
    theirs.write_all(b"x").unwrap();
    assert_eq!(events.wait().unwrap(), [ready(Token::Notify)]);
    events.set_timer(Token::UnregisteredClients, Some(soon));
    let both = [Token::Notify, Token::UnregisteredClients].map(ready);
    assert_eq!(events.wait().unwrap(), both);
    assert_eq!(now(&mut events), [ready(Token::Notify)]);
}

#[test]
fn what_can_not_be_registered_is_an_error_and_can_be_tried_again() {
    let mut events = EventLoop::new().unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = events.register(file, Token::Released).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut source = events.source(ours, Token::Client(1));
    theirs.write_all(b"x").unwrap();
    events.refuse(true);
    source.watch(Interest::Readable).unwrap_err();
    assert!(!source.is_watched());
    assert_eq!(now(&mut events), []);
    events.refuse(false);
    source.watch(Interest::Readable).unwrap();
    assert_eq!(now(&mut events), [ready(Token::Client(1))]);
}

/// So that nothing is missed while the caller can't wait.
#[test]
fn every_source_can_be_had_without_a_wait() {
    let mut events = EventLoop::new().unwrap();
    let (_signals, _one) = registered(&events, Token::Signals);
    let (_notify, _other) = registered(&events, Token::Notify);
    events.set_timer(Token::PendingSignals, Some(Instant::now()));
    events.set_timer(Token::AcceptPause, Some(Instant::now() + LIMIT));
    let all = [Token::Notify, Token::PendingSignals, Token::Signals];
    assert_eq!(events.all(), all.map(ready));
}
