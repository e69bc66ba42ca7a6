//! Malformed init specs and requests: the init reports them and survives.

use std::os::fd::AsFd;

use nix::libc;
use nspawn_init::{InitEvent, InitMode, MAX_SPEC_BYTES, Request, Step};
use packets::encode;
use proptest::prelude::*;

use crate::harness::{Launch, Program, UNTIL_END, shell, spec};

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

/// The init still works: it reports the end of its command, which reads `end`.
fn lives(mut program: Program) {
    program.tell("end");
    let left = program.end();
    assert_eq!(left.words, [InitEvent::Ended { status: 0 }]);
    assert_eq!(left.code(), 0);
}

#[test]
fn whatever_is_sent_while_the_command_runs_is_ignored() {
    let program = Launch::new(&shell(InitMode::Init, UNTIL_END)).start();
    program.expect_running();
    let null = std::fs::File::open("/dev/null").unwrap();
    for nonsense in [
        b"".as_slice(),
        b"\0",
        b"null",
        b"\"go\"",
        b"{\"exec\":{\"id\":1}}",
        &[b'['; 100_000],
        &[b' '; packets::MAX_PACKET_BYTES + 1],
    ] {
        program.send(nonsense, &[]);
        program.send(nonsense, &[null.as_fd(); 3]);
    }
    lives(program);
}

#[test]
fn a_go_with_descriptors_is_ignored() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut program = Launch::new(&spec(InitMode::Init, &["/bin/echo", "runs"]))
        .without_go()
        .start();
    assert_eq!(program.event(), Some(InitEvent::Ready));
    program.ask(&Request::Go, &[null.as_fd()]);
    program.close_channel();
    let left = program.end();
    assert_eq!((left.code(), &*left.stdout), (126, ""));
}

#[test]
fn arbitrary_packets_do_not_end_the_init() {
    let program = Launch::new(&shell(InitMode::Init, UNTIL_END)).start();
    program.expect_running();
    let null = std::fs::File::open("/dev/null").unwrap();
    proptest!(ProptestConfig::with_cases(200), |(
        bytes in any::<Vec<u8>>(),
        descriptors in 0..6usize,
    )| {
        program.send(&bytes, &vec![null.as_fd(); descriptors]);
    });
    lives(program);
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
