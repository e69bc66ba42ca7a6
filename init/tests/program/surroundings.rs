//! What a command finds around it: variables, directory, descriptors, signals.

use std::collections::BTreeMap;
use std::path::Path;

use nix::libc;
use nspawn_init::{Life, Request, Step, Word};

use crate::harness::{Launch, PATH, directly, directory, order, run, shell};

const LIVES: [Life; 2] = [Life::Launcher, Life::Init];

/// The most that the kernel takes as one variable, with its name and the end.
const LONGEST_VARIABLE: usize = 128 * 1024;

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.split_terminator('\0')
        .map(|variable| variable.split_once('=').unwrap())
        .collect()
}

#[test]
fn variables_arrive_unchanged_and_those_that_were_ours_do_not() {
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
    for life in LIVES {
        let mut order = order(life, &["/bin/cat", "/proc/self/environ"]);
        order.environment = over.map(|(name, value)| (name.into(), value.into())).into();
        let left = Launch::new(&order)
            .environment("GIVEN", "under")
            .environment("container", "systemd-nspawn")
            .environment("LISTEN_FDS", "5")
            .environment("LISTEN_PID", "1")
            .environment("LISTEN_FDNAMES", "a:b:c:d:e")
            .run();
        let mut expected = BTreeMap::from(over);
        expected.insert("PATH", PATH);
        expected.insert("container", "systemd-nspawn");
        assert!(variables(&left.stdout) == expected, "{life:?}");
        assert_eq!(left.code(), 0);
    }
}

#[test]
fn variables_of_ours_that_the_order_sets_are_set() {
    let mut order = order(Life::Init, &["/bin/cat", "/proc/self/environ"]);
    order.environment = vec![("LISTEN_FDS".into(), "0".into())];
    let left = Launch::new(&order).environment("LISTEN_FDS", "5").run();
    assert_eq!(variables(&left.stdout)["LISTEN_FDS"], "0");
}

#[test]
fn a_variable_that_is_too_large_is_refused_by_the_kernel_and_told() {
    for life in LIVES {
        let mut order = order(life, &["/bin/true"]);
        let value = "x".repeat(LONGEST_VARIABLE - "LARGE=\0".len() + 1);
        order.environment = vec![("LARGE".into(), value)];
        let left = run(&order);
        assert_eq!(left.trouble().errno, libc::E2BIG);
        assert_eq!(left.code(), 126);
        assert!(!left.stderr.contains("xxx"));
    }
}

#[test]
fn the_directory_is_entered() {
    let place = directory();
    let there = place.path().canonicalize().unwrap();
    for life in LIVES {
        let mut order = order(life, &["/bin/pwd", "-P"]);
        order.directory = Some(there.to_str().unwrap().into());
        assert_eq!(run(&order).stdout.trim_end(), there.to_str().unwrap());
        order.directory = None;
        let left = Launch::new(&order).directory(Path::new("/")).run();
        assert_eq!(left.stdout, "/\n");
    }
}

#[test]
fn a_directory_that_can_not_be_entered_is_named() {
    for life in LIVES {
        for (directory, errno) in [("/nowhere", libc::ENOENT), ("/dev/null", libc::ENOTDIR)] {
            let mut order = order(life, &["/bin/true"]);
            order.directory = Some(directory.into());
            let left = run(&order);
            let trouble = left.trouble();
            assert_eq!(left.words.len(), 1, "nothing runs before it");
            assert_eq!(
                (trouble.step, trouble.file.as_str(), trouble.errno),
                (Step::Directory, directory, errno)
            );
            assert_eq!(left.code(), 126);
        }
    }
}

#[test]
fn an_init_does_not_keep_the_directory_busy() {
    let place = directory();
    let mut order = shell(Life::Init, "read line");
    order.directory = Some(place.path().to_str().unwrap().into());
    let program = Launch::new(&order).directory(Path::new("/")).start();
    program.expect_running();
    let stands = |pid: i32| std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(stands(program.pid()), Path::new("/"));
    assert_eq!(
        stands(program.command()),
        place.path().canonicalize().unwrap()
    );
}

#[test]
fn only_the_standard_descriptors_are_passed_on() {
    let list = ["/bin/ls", "/proc/self/fd"];
    let (expected, _) = directly(&list, Path::new("/"));
    for life in LIVES {
        assert_eq!(run(&order(life, &list)).stdout, expected, "{life:?}");
    }
}

#[test]
fn streams_are_those_of_the_order() {
    let script = "echo out; echo err >&2";
    for life in LIVES {
        let mut order = shell(life, script);
        let left = run(&order);
        assert_eq!(
            (left.stdout.as_str(), left.stderr.as_str()),
            ("out\n", "err\n")
        );
        order.streams = false;
        let left = run(&order);
        assert_eq!((left.stdout.as_str(), left.stderr.as_str()), ("", ""));
        assert_eq!(left.code(), 0);
    }
}

#[test]
fn a_launcher_is_gone_and_its_channel_closed_once_the_command_runs() {
    let program = Launch::new(&shell(Life::Launcher, "read line")).start();
    assert_eq!(program.word(), Some(Word::Ready));
    assert_eq!(program.word(), None, "closed by the command's start");
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
    for life in LIVES {
        let text = run(&order(life, &command)).stdout;
        assert_eq!(read(&text, "SigBlk:"), 0, "{life:?}");
        assert_eq!(read(&text, "SigPnd:"), 0);
        assert_eq!(
            read(&text, "SigIgn:"),
            0,
            "nor what the test was started with"
        );
    }
}

#[test]
fn the_command_of_an_init_leads_a_group_of_its_own() {
    let left = run(&order(Life::Init, &["/bin/cat", "/proc/self/stat"]));
    let fields: Vec<_> = left.stdout.split(' ').collect();
    assert_eq!(fields[4], fields[0]);
}

#[test]
fn an_init_is_called_so() {
    let mut program = Launch::new(&shell(Life::Init, "read line; exit 4")).start();
    program.expect_running();
    let name = std::fs::read_to_string(format!("/proc/{}/comm", program.pid())).unwrap();
    assert_eq!(name, "nspawn-init\n");
    program.tell("");
    assert_eq!(program.end().words, [Word::Ended { status: 4 << 8 }]);
}

#[test]
fn nothing_runs_before_it_may() {
    let place = directory();
    let made = place.path().join("made");
    for life in LIVES {
        let order = order(life, &["/bin/mkdir", made.to_str().unwrap()]);
        let mut program = Launch::new(&order).without_go().start();
        assert_eq!(program.word(), Some(Word::Ready));
        program.send(b"go on", &[]);
        program.close_channel();
        let left = program.end();
        assert_eq!(left.code(), 126, "nobody would have watched over it");
        assert!(!made.exists());
        let program = Launch::new(&order).without_go().start();
        assert_eq!(program.word(), Some(Word::Ready));
        assert!(program.children().is_empty());
        program.ask(&Request::Go, &[]);
        assert_eq!(program.end().code(), 0);
        std::fs::remove_dir(&made).unwrap();
    }
}
