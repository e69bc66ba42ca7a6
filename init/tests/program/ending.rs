//! How commands end and how that is reported; how they fail to start.

use nix::libc;
use nspawn_init::{InitEvent, InitMode, StartError, Step};

use crate::harness::{Launch, directly, directory, executable, run, shell, spec};

/// The signals whose default action does not terminate.
const HARMLESS: [i32; 8] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGURG,
    libc::SIGWINCH,
];

fn ran_and_ended(words: &[InitEvent], raw: i32) {
    match words {
        [
            InitEvent::Ready,
            InitEvent::Running { .. },
            InitEvent::Ended { status },
        ] if *status == raw => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_exit_code_is_reported_unchanged() {
    for code in 0..=255 {
        let left = run(&shell(InitMode::Init, &format!("exit {code}")));
        let status = code << 8;
        ran_and_ended(&left.words, status);
        assert_eq!(left.status, status, "its own end says the same");
    }
}

#[test]
fn a_launched_command_keeps_its_exit_code() {
    for code in [0, 1, 2, 7, 126, 127, 128, 133, 137, 143, 255] {
        let left = run(&shell(InitMode::Launcher, &format!("exit {code}")));
        assert_eq!(left.words, [InitEvent::Ready]);
        assert_eq!(left.status, code << 8);
    }
}

#[test]
fn every_fatal_signal_is_reported() {
    let place = directory();
    for number in (1..=64).filter(|number| !HARMLESS.contains(number)) {
        let script = format!("ulimit -c 0; kill -{number} $$");
        let left = Launch::new(&shell(InitMode::Init, &script))
            .directory(place.path())
            .run();
        let status = number;
        ran_and_ended(&left.words, status);
        assert_eq!(left.code(), 128 + number);
        let left = run(&shell(InitMode::Launcher, &script));
        assert_eq!((left.words, left.status), (vec![InitEvent::Ready], number));
    }
}

#[test]
fn a_core_dump_is_reported_with_its_signal() {
    let place = directory();
    let script = "ulimit -S -c $(ulimit -H -c); kill -QUIT $$";
    let (_, status) = directly(&["/bin/sh", "-c", script], place.path());
    assert_eq!(status & 0x7f, libc::SIGQUIT);
    let left = Launch::new(&shell(InitMode::Init, script))
        .directory(place.path())
        .run();
    ran_and_ended(&left.words, status);
    assert_eq!(left.code(), 128 + libc::SIGQUIT, "without the flag");
}

/// Runs a command that must fail to start; returns the error, which stderr must show too, and the exit code.
fn fails(mode: InitMode, command: &[&str], path: &str) -> (StartError, i32) {
    let mut spec = spec(mode, command);
    spec.environment = vec![("PATH".into(), path.into())];
    let left = run(&spec);
    assert_eq!(left.words.len(), 2, "{left:?}");
    assert_eq!(left.words[0], InitEvent::Ready);
    let start_error = left.start_error();
    assert_eq!(left.stderr, format!("{start_error}\n"));
    assert_eq!(left.stdout, "");
    assert_eq!(left.code(), start_error.status());
    (start_error.clone(), left.code())
}

fn start_error(step: Step, file: &str, errno: i32) -> StartError {
    StartError {
        step,
        file: file.to_owned(),
        errno,
    }
}

#[test]
fn a_command_that_cannot_run_is_reported_with_its_file() {
    let place = directory();
    let here = place.path().to_str().unwrap();
    let in_here = |name: &str| format!("{here}/{name}");
    executable(&place.path().join("plain"), b"#!/bin/sh\n", 0o644);
    executable(&place.path().join("lost"), b"#!/nowhere/sh\n", 0o755);
    std::fs::create_dir(place.path().join("folder")).unwrap();
    let search = format!("/nowhere:{here}");
    for mode in [InitMode::Launcher, InitMode::Init] {
        let rows = [
            (
                "nothing-like-it",
                start_error(Step::Execute, "nothing-like-it", libc::ENOENT),
                127,
            ),
            ("", start_error(Step::Execute, "", libc::ENOENT), 127),
            (
                "/nowhere/it",
                start_error(Step::Execute, "/nowhere/it", libc::ENOENT),
                127,
            ),
            (
                "plain",
                start_error(Step::Execute, &in_here("plain"), libc::EACCES),
                126,
            ),
            (
                "folder",
                start_error(Step::Execute, &in_here("folder"), libc::EACCES),
                126,
            ),
            (
                "lost",
                start_error(Step::Interpreter, &in_here("lost"), libc::ENOENT),
                127,
            ),
            (
                "/dev/null/it",
                start_error(Step::Execute, "/dev/null/it", libc::ENOTDIR),
                126,
            ),
            (
                "/a\0b",
                start_error(Step::Execute, "/a\0b", libc::EINVAL),
                126,
            ),
        ];
        for (name, expected, status) in rows {
            assert_eq!(
                fails(mode, &[name], &search),
                (expected, status),
                "{mode:?}"
            );
        }
        let long = "x".repeat(100_000);
        let (reported, _) = fails(mode, &[&long], &search);
        assert_eq!(
            (reported.errno, reported.file.len()),
            (libc::ENAMETOOLONG, 4096)
        );
    }
}

#[test]
fn a_file_that_is_not_executable_does_not_hide_a_later_one_in_path() {
    let first = directory();
    let second = directory();
    executable(&first.path().join("it"), b"#!/bin/sh\n", 0o644);
    executable(&second.path().join("it"), b"#!/bin/sh\nexit 9\n", 0o755);
    let path = format!("{}:{}", first.path().display(), second.path().display());
    for mode in [InitMode::Launcher, InitMode::Init] {
        let mut spec = spec(mode, &["it"]);
        spec.environment = vec![("PATH".into(), path.clone())];
        assert_eq!(run(&spec).code(), 9);
    }
}

#[test]
fn a_script_without_an_interpreter_line_runs_in_the_shell() {
    let place = directory();
    let script = place.path().join("script");
    executable(&script, b"echo \"$0 $*\"; exit 3\n", 0o755);
    let script = script.to_str().unwrap();
    for mode in [InitMode::Launcher, InitMode::Init] {
        let left = run(&spec(mode, &[script, "a b", ""]));
        assert_eq!(left.stdout, format!("{script} a b \n"));
        assert_eq!(left.code(), 3);
    }
}

#[test]
fn without_a_command_a_login_shell_runs() {
    let home = directory();
    for mode in [InitMode::Launcher, InitMode::Init] {
        let mut spec = spec(mode, &[]);
        spec.environment = vec![("HOME".into(), home.path().to_str().unwrap().into())];
        let mut program = Launch::new(&spec).start();
        std::io::Write::write_all(
            program.stdin.as_mut().unwrap(),
            b"echo $0; pwd -P; exit 5\n",
        )
        .unwrap();
        let name = program.line();
        assert!(["-bash", "-sh"].contains(&name.as_str()), "{name}");
        let place = home.path().canonicalize().unwrap();
        assert_eq!(program.line(), place.to_str().unwrap());
        assert_eq!(program.end().code(), 5);
    }
}
