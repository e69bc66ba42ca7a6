//! How commands end and what is told of it; how they fail to start.

use nix::libc;
use nspawn_init::{Life, Step, Trouble, Word};

use crate::harness::{Launch, directly, directory, executable, order, run, shell};

/// Those whose default is not an end.
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

fn ran_and_ended(words: &[Word], raw: i32) {
    match words {
        [Word::Ready, Word::Running { .. }, Word::Ended { status }] if *status == raw => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_exit_code_is_told_as_it_is() {
    for code in 0..=255 {
        let left = run(&shell(Life::Init, &format!("exit {code}")));
        let status = code << 8;
        ran_and_ended(&left.words, status);
        assert_eq!(left.status, status, "its own end says the same");
    }
}

#[test]
fn every_exit_code_of_a_launched_command_is_its_own() {
    for code in [0, 1, 2, 7, 126, 127, 128, 133, 137, 143, 255] {
        let left = run(&shell(Life::Launcher, &format!("exit {code}")));
        assert_eq!(left.words, [Word::Ready]);
        assert_eq!(left.status, code << 8);
    }
}

#[test]
fn death_by_every_signal_is_told_as_it_is() {
    let place = directory();
    for number in (1..=64).filter(|number| !HARMLESS.contains(number)) {
        let script = format!("ulimit -c 0; kill -{number} $$");
        let left = Launch::new(&shell(Life::Init, &script))
            .directory(place.path())
            .run();
        let status = number;
        ran_and_ended(&left.words, status);
        assert_eq!(left.code(), 128 + number);
        let left = run(&shell(Life::Launcher, &script));
        assert_eq!((left.words, left.status), (vec![Word::Ready], number));
    }
}

#[test]
fn a_core_dump_is_told_as_the_kernel_told_it() {
    let place = directory();
    let script = "ulimit -S -c $(ulimit -H -c); kill -QUIT $$";
    let (_, status) = directly(&["/bin/sh", "-c", script], place.path());
    assert_eq!(status & 0x7f, libc::SIGQUIT);
    let left = Launch::new(&shell(Life::Init, script))
        .directory(place.path())
        .run();
    ran_and_ended(&left.words, status);
    assert_eq!(left.code(), 128 + libc::SIGQUIT, "without the flag");
}

/// The words of a command that does not run, its status, and what its stderr says.
fn fails(life: Life, command: &[&str], path: &str) -> (Trouble, i32) {
    let mut order = order(life, command);
    order.environment = vec![("PATH".into(), path.into())];
    let left = run(&order);
    assert_eq!(left.words.len(), 2, "{left:?}");
    assert_eq!(left.words[0], Word::Ready);
    let trouble = left.trouble();
    assert_eq!(left.stderr, format!("{trouble}\n"));
    assert_eq!(left.stdout, "");
    assert_eq!(left.code(), trouble.status());
    (trouble.clone(), left.code())
}

fn trouble(step: Step, file: &str, errno: i32) -> Trouble {
    Trouble {
        step,
        file: file.to_owned(),
        errno,
    }
}

#[test]
fn a_command_that_does_not_run_says_why_and_with_which_file() {
    let place = directory();
    let here = place.path().to_str().unwrap();
    let in_here = |name: &str| format!("{here}/{name}");
    executable(&place.path().join("plain"), b"#!/bin/sh\n", 0o644);
    executable(&place.path().join("lost"), b"#!/nowhere/sh\n", 0o755);
    std::fs::create_dir(place.path().join("folder")).unwrap();
    let search = format!("/nowhere:{here}");
    for life in [Life::Launcher, Life::Init] {
        let rows = [
            (
                "nothing-like-it",
                trouble(Step::Execute, "nothing-like-it", libc::ENOENT),
                127,
            ),
            ("", trouble(Step::Execute, "", libc::ENOENT), 127),
            (
                "/nowhere/it",
                trouble(Step::Execute, "/nowhere/it", libc::ENOENT),
                127,
            ),
            (
                "plain",
                trouble(Step::Execute, &in_here("plain"), libc::EACCES),
                126,
            ),
            (
                "folder",
                trouble(Step::Execute, &in_here("folder"), libc::EACCES),
                126,
            ),
            (
                "lost",
                trouble(Step::Interpreter, &in_here("lost"), libc::ENOENT),
                127,
            ),
            (
                "/dev/null/it",
                trouble(Step::Execute, "/dev/null/it", libc::ENOTDIR),
                126,
            ),
            ("/a\0b", trouble(Step::Execute, "/a\0b", libc::EINVAL), 126),
        ];
        for (name, expected, status) in rows {
            assert_eq!(
                fails(life, &[name], &search),
                (expected, status),
                "{life:?}"
            );
        }
        let long = "x".repeat(100_000);
        let (told, _) = fails(life, &[&long], &search);
        assert_eq!((told.errno, told.file.len()), (libc::ENAMETOOLONG, 4096));
    }
}

#[test]
fn a_file_that_may_not_be_executed_does_not_hide_one_further_along_the_path() {
    let first = directory();
    let second = directory();
    executable(&first.path().join("it"), b"#!/bin/sh\n", 0o644);
    executable(&second.path().join("it"), b"#!/bin/sh\nexit 9\n", 0o755);
    let path = format!("{}:{}", first.path().display(), second.path().display());
    for life in [Life::Launcher, Life::Init] {
        let mut order = order(life, &["it"]);
        order.environment = vec![("PATH".into(), path.clone())];
        assert_eq!(run(&order).code(), 9);
    }
}

#[test]
fn a_script_without_a_first_line_is_the_shells() {
    let place = directory();
    let script = place.path().join("script");
    executable(&script, b"echo \"$0 $*\"; exit 3\n", 0o755);
    let script = script.to_str().unwrap();
    for life in [Life::Launcher, Life::Init] {
        let left = run(&order(life, &[script, "a b", ""]));
        assert_eq!(left.stdout, format!("{script} a b \n"));
        assert_eq!(left.code(), 3);
    }
}

#[test]
fn no_command_is_a_login_shell() {
    let home = directory();
    for life in [Life::Launcher, Life::Init] {
        let mut order = order(life, &[]);
        order.environment = vec![("HOME".into(), home.path().to_str().unwrap().into())];
        let mut program = Launch::new(&order).start();
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
