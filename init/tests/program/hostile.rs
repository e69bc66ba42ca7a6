//! Malformed init specs and requests: the init reports them and survives.

use std::os::fd::AsFd;

use nix::libc;
use nspawn_init::{InitEvent, InitMode, MAX_SPEC_BYTES, Request, Step};
use packets::encode;
use proptest::prelude::*;

use crate::harness::{Launch, Program, shell, spec};

fn is_refused(bytes: Vec<u8>, errno: i32) {
    let left = Launch::of_bytes(bytes).run();
    let start_error = left.start_error();
    assert_eq!(left.words.len(), 1);
    assert_eq!((start_error.step, start_error.errno), (Step::Order, errno));
    assert_eq!(left.code(), 126);
}

#[test]
fn an_invalid_init_spec_is_refused() {
    is_refused(Vec::new(), libc::EBADMSG);
    is_refused(b"{}".into(), libc::EBADMSG);
    is_refused(b"[".repeat(100_000), libc::EBADMSG);
    is_refused(
        vec![b' '; usize::try_from(MAX_SPEC_BYTES).unwrap() + 1],
        libc::EFBIG,
    );
    let whole = encode(&spec(InitMode::Launcher, &["/bin/true"]));
    is_refused(whole[..whole.len() - 1].to_vec(), libc::EBADMSG);
}

#[test]
fn without_its_descriptors_it_does_nothing() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_nspawn-init"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(126));
    assert!(!output.stderr.is_empty());
}

/// The init still runs exec sessions.
fn lives(program: &Program, id: u64) {
    let null = std::fs::File::open("/dev/null").unwrap();
    let request = Request::Exec {
        id,
        command: vec!["/bin/true".into()],
        environment: Vec::new(),
        directory: None,
    };
    program.ask(&request, &[null.as_fd(); 3]);
    loop {
        match program.event() {
            Some(InitEvent::ExecEnded { id: ended, .. }) if ended == id => return,
            Some(InitEvent::ExecRunning { .. } | InitEvent::ExecFailed { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_invalid_request_is_answered_if_it_has_an_id() {
    let program = Launch::new(&shell(InitMode::Init, "read line")).start();
    program.expect_running();
    for nonsense in [
        b"".as_slice(),
        b"\0",
        b"null",
        b"{\"exec\":{}}",
        b"{\"exec\":{\"id\":-1}}",
        b"{\"signal\":{\"id\":1}}",
        &[b'['; 100_000],
        &[b' '; packets::MAX_PACKET_BYTES + 1],
    ] {
        program.send(nonsense, &[]);
    }
    program.send(b"{\"exec\":{\"id\":77,\"command\":\"no list\"}}", &[]);
    match program.event() {
        Some(InitEvent::ExecFailed {
            id: 77,
            start_error,
        }) => {
            assert_eq!(
                (start_error.step, start_error.errno),
                (Step::Order, libc::EBADMSG)
            );
        }
        other => panic!("{other:?}"),
    }
    lives(&program, 1);
}

#[test]
fn a_request_with_descriptors_that_it_does_not_take_is_ignored() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut program = Launch::new(&spec(InitMode::Init, &["/bin/echo", "runs"]))
        .without_go()
        .start();
    assert_eq!(program.event(), Some(InitEvent::Ready));
    program.ask(&Request::Go, &[null.as_fd()]);
    program.close_channel();
    let left = program.end();
    assert_eq!((left.code(), &*left.stdout), (126, ""));

    let program = Launch::new(&shell(InitMode::Init, "read line")).start();
    program.expect_running();
    let (command, environment) = (vec!["sleep".into(), "1000".into()], Vec::new());
    let request = Request::Exec {
        id: 1,
        command,
        environment,
        directory: None,
    };
    program.ask(&request, &[null.as_fd(); 3]);
    let event = program.event();
    assert!(matches!(event, Some(InitEvent::ExecRunning { id: 1, .. })));
    let (term, kill) = (libc::SIGTERM, libc::SIGKILL);
    program.ask(
        &Request::Signal {
            id: 1,
            signal: term,
        },
        &[null.as_fd()],
    );
    program.ask(
        &Request::Signal {
            id: 1,
            signal: kill,
        },
        &[],
    );
    let ended = InitEvent::ExecEnded {
        id: 1,
        status: kill,
    };
    assert_eq!(program.event(), Some(ended));
}

#[test]
fn arbitrary_packets_do_not_end_the_init() {
    let program = Launch::new(&shell(InitMode::Init, "read line")).start();
    program.expect_running();
    let null = std::fs::File::open("/dev/null").unwrap();
    let last = std::cell::Cell::new(1 << 32);
    proptest!(ProptestConfig::with_cases(200), |(
        bytes in any::<Vec<u8>>(),
        cut in any::<prop::sample::Index>(),
        whole in any::<bool>(),
        descriptors in 0..6usize,
    )| {
        let request = encode(&Request::Signal { id: 1, signal: 9 });
        let piece = &request[..cut.index(request.len())];
        program.send(if whole { piece } else { &bytes }, &vec![null.as_fd(); descriptors]);
        last.set(last.get() + 1);
        lives(&program, last.get());
    });
}

#[test]
fn an_arbitrary_init_spec_fails_only_in_the_documented_ways() {
    let whole = encode(&spec(InitMode::Init, &["/bin/true"]));
    proptest!(ProptestConfig::with_cases(100), |(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    )| {
        let mut bytes = whole.clone();
        bytes[at.index(whole.len())] = byte;
        // The result may still be a valid spec, with another command or another mode.
        let left = Launch::of_bytes(bytes).run();
        prop_assert!([0, 126, 127].contains(&left.code()), "{left:?}");
        prop_assert!(!left.words.is_empty());
    });
}
