//! Exec sessions of an init.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::libc;
use nspawn_init::{InitEvent, InitMode, Request, StartError, Step};

use crate::harness::{
    Launch, Program, UNTIL_END, directly, directory, eventually, pipe, rest, shell,
};

fn program() -> Program {
    let mut spec = shell(InitMode::Init, "read line");
    spec.environment = vec![("TASK".into(), "its own".into())];
    let program = Launch::new(&spec).directory(Path::new("/")).start();
    program.expect_running();
    program
}

fn exec(id: u64, command: &[&str]) -> Request {
    Request::Exec {
        id,
        command: command.iter().map(|event| (*event).to_owned()).collect(),
        environment: vec![("FURTHER".into(), "a=b\n".into())],
        directory: None,
    }
}

/// Sends the request with new streams; returns the other ends of stdin, stdout and stderr.
fn ask(program: &Program, request: &Request) -> (OwnedFd, File, File) {
    let (stdin, our_stdin) = pipe();
    let (stdout, their_stdout) = pipe();
    let (stderr, their_stderr) = pipe();
    let descriptors = [stdin.as_fd(), their_stdout.as_fd(), their_stderr.as_fd()];
    program.ask(request, &descriptors);
    (our_stdin, stdout, stderr)
}

fn running(program: &Program, number: u64) -> i32 {
    match program.event() {
        Some(InitEvent::ExecRunning { id, pid }) if id == number => pid,
        other => panic!("{other:?}"),
    }
}

fn refused(program: &Program, number: u64) -> StartError {
    match program.event() {
        Some(InitEvent::ExecFailed { id, start_error }) if id == number => start_error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_further_command_has_its_own_streams_and_exit() {
    let program = program();
    let script = "cat; echo \"$TASK $FURTHER\" >&2; exit 7";
    let (stdin, mut stdout, mut stderr) = ask(&program, &exec(1, &["sh", "-c", script]));
    running(&program, 1);
    rustix::io::write(&stdin, b"hello").unwrap();
    drop(stdin);
    assert_eq!(rest(&mut stdout), "hello");
    assert_eq!(rest(&mut stderr), "its own a=b\n\n");
    let status = 7 << 8;
    assert_eq!(
        program.event(),
        Some(InitEvent::ExecEnded { id: 1, status })
    );
}

#[test]
fn many_commands_run_at_once_and_are_reported_separately() {
    let program = program();
    let mut streams: Vec<_> = (1..=20)
        .map(|id| ask(&program, &exec(id, &["sh", "-c", "read x; exit $x"])))
        .collect();
    for id in 1..=20 {
        running(&program, id);
    }
    for (number, (stdin, _, _)) in (1..21).zip(&streams).rev() {
        rustix::io::write(stdin, format!("{number}\n").as_bytes()).unwrap();
        let status = number << 8;
        let id = u64::try_from(number).unwrap();
        assert_eq!(program.event(), Some(InitEvent::ExecEnded { id, status }));
    }
    streams.clear();
    assert_eq!(program.children().len(), 1);
}

#[test]
fn a_further_command_is_signalled() {
    let program = program();
    for signal in [libc::SIGTERM, libc::SIGKILL, 40] {
        let id = u64::try_from(signal).unwrap();
        let _streams = ask(&program, &exec(id, &["sleep", "1000"]));
        running(&program, id);
        program.ask(&Request::Signal { id: 999, signal }, &[]);
        program.ask(&Request::Signal { id, signal: 0 }, &[]);
        program.ask(&Request::Signal { id, signal: 4711 }, &[]);
        program.ask(&Request::Signal { id, signal }, &[]);
        let status = signal;
        assert_eq!(program.event(), Some(InitEvent::ExecEnded { id, status }));
    }
}

#[test]
fn a_further_command_starts_where_it_was_reported_or_where_the_command_did() {
    let home = directory();
    let other = directory();
    let mut spec = shell(InitMode::Init, "read line");
    spec.directory = Some(home.path().to_str().unwrap().into());
    let program = Launch::new(&spec).directory(Path::new("/")).start();
    program.expect_running();
    for (directory, place) in [
        (None, home.path()),
        (
            Some(other.path().to_str().unwrap().to_owned()),
            other.path(),
        ),
    ] {
        let request = Request::Exec {
            id: 1,
            command: vec!["/bin/pwd".into(), "-P".into()],
            environment: Vec::new(),
            directory,
        };
        let (_stdin, mut stdout, _stderr) = ask(&program, &request);
        running(&program, 1);
        let place = place.canonicalize().unwrap();
        assert_eq!(rest(&mut stdout).trim_end(), place.to_str().unwrap());
        assert_eq!(
            program.event(),
            Some(InitEvent::ExecEnded { id: 1, status: 0 })
        );
    }
    let request = Request::Exec {
        id: 2,
        command: vec!["/bin/pwd".into()],
        environment: Vec::new(),
        directory: Some("/nowhere".into()),
    };
    let _streams = ask(&program, &request);
    let start_error = refused(&program, 2);
    assert_eq!(
        (start_error.step, start_error.file.as_str()),
        (Step::Directory, "/nowhere")
    );
}

#[test]
fn a_further_command_that_cannot_run_is_reported() {
    let program = program();
    let _streams = ask(&program, &exec(1, &["nothing-like-it"]));
    let start_error = refused(&program, 1);
    assert_eq!(start_error.status(), 127);
    assert_eq!(start_error.file, "nothing-like-it");
    let _streams = ask(&program, &exec(2, &["/etc"]));
    assert_eq!(refused(&program, 2).status(), 126);
    let _streams = ask(&program, &exec(3, &[]));
    assert_eq!(refused(&program, 3).errno, libc::EINVAL);
}

#[test]
fn a_duplicate_id_is_refused_and_the_first_command_keeps_running() {
    let program = program();
    let (stdin, _stdout, _stderr) = ask(&program, &exec(1, &["cat"]));
    running(&program, 1);
    let _streams = ask(&program, &exec(1, &["true"]));
    assert_eq!(refused(&program, 1).errno, libc::EEXIST);
    drop(stdin);
    assert_eq!(
        program.event(),
        Some(InitEvent::ExecEnded { id: 1, status: 0 })
    );
}

#[test]
fn a_request_carries_three_descriptors_and_none_is_kept() {
    let program = program();
    let held = || {
        std::fs::read_dir(format!("/proc/{}/fd", program.pid()))
            .unwrap()
            .count()
    };
    let before = held();
    let null = File::open("/dev/null").unwrap();
    for count in [0, 1, 2, 4, 5, 8] {
        program.ask(
            &exec(count, &["true"]),
            &vec![null.as_fd(); usize::try_from(count).unwrap()],
        );
        assert_eq!(refused(&program, count).errno, libc::EBADF);
    }
    let list = ["/bin/ls", "/proc/self/fd"];
    let (expected, _) = directly(&list, Path::new("/"));
    let (_stdin, mut stdout, _stderr) = ask(&program, &exec(9, &list));
    running(&program, 9);
    assert_eq!(rest(&mut stdout), expected);
    assert_eq!(
        program.event(),
        Some(InitEvent::ExecEnded { id: 9, status: 0 })
    );
    assert_eq!(held(), before);
}

#[test]
fn the_exit_of_the_command_is_the_last_event() {
    let mut program = program();
    let _streams = ask(&program, &exec(1, &["sleep", "1000"]));
    let exec_sessions = running(&program, 1);
    program.tell("");
    assert_eq!(program.event(), Some(InitEvent::Ended { status: 0 }));
    assert_eq!(program.end().words, []);
    // In a container the kernel does this when PID 1 exits.
    let exec_sessions = rustix::process::Pid::from_raw(exec_sessions).unwrap();
    rustix::process::kill_process(exec_sessions, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_supervisor_that_does_not_read_blocks_nothing() {
    let script = format!("trap 'echo hup' HUP; echo ready; {UNTIL_END}");
    let mut program = Launch::new(&shell(InitMode::Init, &script))
        .with_little_room()
        .start();
    program.expect_running();
    assert_eq!(program.line(), "ready");
    let null = File::open("/dev/null").unwrap();
    let descriptors = [null.as_fd(); 3];
    for id in 0..50 {
        program.ask(&exec(id, &["/bin/true"]), &descriptors);
    }
    program.signal(libc::SIGHUP);
    eventually("the trap", || {
        program.tell("");
        program.writes_within(5)
    });
    assert_eq!(program.line(), "hup");
    let mut ended = 0;
    while ended < 50 {
        if let Some(InitEvent::ExecEnded { status: 0, .. }) = program.event() {
            ended += 1;
        }
    }
    program.tell("end");
    assert_eq!(program.end().code(), 0);
}

#[test]
fn late_requests_do_not_hide_the_exit() {
    for _ in 0..20 {
        let program = Launch::new(&shell(InitMode::Init, "exit 5")).start();
        program.expect_running();
        let null = File::open("/dev/null").unwrap();
        let request = Request::Exec {
            id: 1,
            command: Vec::new(),
            environment: Vec::new(),
            directory: None,
        };
        while program.try_ask(&request, &[null.as_fd(); 3]) {}
        let left = program.end();
        let (last, before) = left.words.split_last().unwrap();
        assert_eq!(*last, InitEvent::Ended { status: 5 << 8 });
        assert!(
            before
                .iter()
                .all(|event| matches!(event, InitEvent::ExecFailed { id: 1, .. }))
        );
    }
}
