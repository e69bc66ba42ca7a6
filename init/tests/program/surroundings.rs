//! The environment of a command: variables, directory, descriptors, signals.

use std::collections::BTreeMap;
use std::path::Path;

use nix::libc;
use nspawn_init::{InitEvent, InitMode, Request, Step};

use crate::harness::{Launch, PATH, directly, directory, run, shell, spec};

const MODES: [InitMode; 2] = [InitMode::Launcher, InitMode::Init];

/// The kernel's limit for one variable, with its name and the terminating NUL.
const LONGEST_VARIABLE: usize = 128 * 1024;

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.split_terminator('\0')
        .map(|variable| variable.split_once('=').unwrap())
        .collect()
}

#[test]
fn variables_arrive_unchanged_and_those_of_the_init_are_removed() {
    let large = "x".repeat(LONGEST_VARIABLE - "LARGE=\0".len());
    let over = [
        ("LINES", "a\nb\n"),
        ("EQUAL", "a=b=c="),
        ("QUOTES", "'\"`$HOME\\"),
        ("EMPTY", ""),
        ("SPACES", "  a  b  "),
        ("UMLAUT", "äöü €"),
        ("with.dot", "1"),
        ("GIVEN", "over"),
        ("LARGE", large.as_str()),
    ];
    for mode in MODES {
        let mut spec = spec(mode, &["/bin/cat", "/proc/self/environ"]);
        spec.environment = over.map(|(name, value)| (name.into(), value.into())).into();
        let left = Launch::new(&spec)
            .environment("GIVEN", "under")
            .environment("container", "systemd-nspawn")
            .environment("LISTEN_FDS", "5")
            .environment("LISTEN_PID", "1")
            .environment("LISTEN_FDNAMES", "a:b:c:d:e")
            .run();
        let mut expected = BTreeMap::from(over);
        expected.insert("PATH", PATH);
        expected.insert("container", "systemd-nspawn");
        assert!(variables(&left.stdout) == expected, "{mode:?}");
        assert_eq!(left.code(), 0);
    }
}

#[test]
fn variables_of_the_init_that_the_spec_sets_are_set() {
    let mut spec = spec(InitMode::Init, &["/bin/cat", "/proc/self/environ"]);
    spec.environment = vec![("LISTEN_FDS".into(), "0".into())];
    let left = Launch::new(&spec).environment("LISTEN_FDS", "5").run();
    assert_eq!(variables(&left.stdout)["LISTEN_FDS"], "0");
}

#[test]
fn a_variable_that_is_too_large_is_refused_by_the_kernel_and_reported() {
    for mode in MODES {
        let mut spec = spec(mode, &["/bin/true"]);
        let value = "x".repeat(LONGEST_VARIABLE - "LARGE=\0".len() + 1);
        spec.environment = vec![("LARGE".into(), value)];
        let left = run(&spec);
        assert_eq!(left.start_error().errno, libc::E2BIG);
        assert_eq!(left.code(), 126);
        assert!(!left.stderr.contains("xxx"));
    }
}

#[test]
fn the_directory_is_entered() {
    let place = directory();
    let there = place.path().canonicalize().unwrap();
    for mode in MODES {
        let mut spec = spec(mode, &["/bin/pwd", "-P"]);
        spec.directory = Some(there.to_str().unwrap().into());
        assert_eq!(run(&spec).stdout.trim_end(), there.to_str().unwrap());
        spec.directory = None;
        let left = Launch::new(&spec).directory(Path::new("/")).run();
        assert_eq!(left.stdout, "/\n");
    }
}

#[test]
fn a_directory_that_cannot_be_entered_is_named() {
    for mode in MODES {
        for (directory, errno) in [("/nowhere", libc::ENOENT), ("/dev/null", libc::ENOTDIR)] {
            let mut spec = spec(mode, &["/bin/true"]);
            spec.directory = Some(directory.into());
            let left = run(&spec);
            let start_error = left.start_error();
            assert_eq!(left.words.len(), 1, "nothing runs before it");
            assert_eq!(
                (
                    start_error.step,
                    start_error.file.as_str(),
                    start_error.errno
                ),
                (Step::Directory, directory, errno)
            );
            assert_eq!(left.code(), 126);
        }
    }
}

#[test]
fn an_init_does_not_keep_the_directory_busy() {
    let place = directory();
    let mut spec = shell(InitMode::Init, "read line");
    spec.directory = Some(place.path().to_str().unwrap().into());
    let program = Launch::new(&spec).directory(Path::new("/")).start();
    program.expect_running();
    let stands = |pid: i32| std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(stands(program.pid()), Path::new("/"));
    assert_eq!(
        stands(program.command()),
        place.path().canonicalize().unwrap()
    );
}

#[test]
fn only_the_standard_descriptors_are_inherited() {
    let list = ["/bin/ls", "/proc/self/fd"];
    let (expected, _) = directly(&list, Path::new("/"));
    for mode in MODES {
        assert_eq!(run(&spec(mode, &list)).stdout, expected, "{mode:?}");
    }
}

#[test]
fn streams_are_those_of_the_spec() {
    let script = "echo out; echo err >&2";
    for mode in MODES {
        let mut spec = shell(mode, script);
        let left = run(&spec);
        assert_eq!(
            (left.stdout.as_str(), left.stderr.as_str()),
            ("out\n", "err\n")
        );
        spec.streams = false;
        let left = run(&spec);
        assert_eq!((left.stdout.as_str(), left.stderr.as_str()), ("", ""));
        assert_eq!(left.code(), 0);
    }
}

#[test]
fn a_launcher_becomes_the_command_and_closes_its_channel() {
    let program = Launch::new(&shell(InitMode::Launcher, "read line")).start();
    assert_eq!(program.event(), Some(InitEvent::Ready));
    assert_eq!(program.event(), None, "closed by the command's start");
    let name = std::fs::read_to_string(format!("/proc/{}/comm", program.pid())).unwrap();
    assert_eq!(name, "sh\n");
}

#[test]
fn no_signal_is_blocked_or_ignored() {
    let read = |text: &str, field: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    };
    let command = ["/bin/cat", "/proc/self/status"];
    for mode in MODES {
        let text = run(&spec(mode, &command)).stdout;
        assert_eq!(read(&text, "SigBlk:"), 0, "{mode:?}");
        assert_eq!(read(&text, "SigPnd:"), 0);
        assert_eq!(
            read(&text, "SigIgn:"),
            0,
            "nor what the test was started with"
        );
    }
}

#[test]
fn the_command_of_an_init_leads_its_own_process_group() {
    let left = run(&spec(InitMode::Init, &["/bin/cat", "/proc/self/stat"]));
    let fields: Vec<_> = left.stdout.split(' ').collect();
    assert_eq!(fields[4], fields[0]);
}

#[test]
fn the_init_has_a_process_name() {
    let mut program = Launch::new(&shell(InitMode::Init, "read line; exit 4")).start();
    program.expect_running();
    let name = std::fs::read_to_string(format!("/proc/{}/comm", program.pid())).unwrap();
    assert_eq!(name, "nspawn-init\n");
    program.tell("");
    assert_eq!(program.end().words, [InitEvent::Ended { status: 4 << 8 }]);
}

#[test]
fn nothing_runs_before_go() {
    let place = directory();
    let made = place.path().join("made");
    for mode in MODES {
        let spec = spec(mode, &["/bin/mkdir", made.to_str().unwrap()]);
        let mut program = Launch::new(&spec).without_go().start();
        assert_eq!(program.event(), Some(InitEvent::Ready));
        program.send(b"go on", &[]);
        program.close_channel();
        let left = program.end();
        assert_eq!(left.code(), 126, "no supervisor would have supervised it");
        assert!(!made.exists());
        let program = Launch::new(&spec).without_go().start();
        assert_eq!(program.event(), Some(InitEvent::Ready));
        assert!(program.children().is_empty());
        program.ask(&Request::Go, &[]);
        assert_eq!(program.end().code(), 0);
        std::fs::remove_dir(&made).unwrap();
    }
}
