//! seccomp programs, installed before the command starts. Installing them needs a capability; without it the init reports an error.

use std::process::{Command, Stdio};

use nix::libc;
use nspawn_init::{Filter, InitEvent, InitMode, InitSpec, PROGRAM, Request, Step};

use crate::harness::{Launch, Left, directory, run, shell, spec};

const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

const MODES: [InitMode; 2] = [InitMode::Launcher, InitMode::Init];

/// A filter that fails these system calls with this errno and allows all others.
fn refusing(calls: &[libc::c_long], errno: i32) -> Filter {
    let mut program = vec![(LOAD, 0, 0, 0)];
    for call in calls {
        program.push((EQUAL, 0, 1, u32::try_from(*call).unwrap()));
        program.push((
            RETURN,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(),
        ));
    }
    program.push((RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    Filter(program)
}

fn no_directories() -> Filter {
    let calls = [
        libc::SYS_mkdirat,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir,
    ];
    refusing(&calls, libc::ENOSPC)
}

/// A field of this process's /proc status.
fn own(field: &str) -> String {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim().to_owned()
}

/// With CAP_SYS_ADMIN or with no_new_privs set a process may install a filter.
fn may_install() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let effective = u64::from_str_radix(&own("CapEff:"), 16).unwrap();
    effective & (1 << CAP_SYS_ADMIN) != 0 || own("NoNewPrivs:") == "1"
}

/// Whether a user namespace can provide the capability.
fn may_unshare() -> bool {
    Command::new("unshare")
        .args(["-r", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs the init with the capability to install filters, if there is any way to get it.
fn run_with_right(spec: &InitSpec) -> Option<Left> {
    if may_install() {
        return Some(run(spec));
    }
    if may_unshare() {
        let mut command = Command::new("unshare");
        command.args(["-r", PROGRAM]);
        return Some(Launch::by(command, packets::encode(spec)).run());
    }
    let left = run(spec);
    assert_eq!(left.start_error().step, Step::Filters);
    assert_eq!(left.start_error().errno, libc::EACCES);
    assert_eq!((left.words.len(), left.code()), (1, 126));
    None
}

#[test]
fn filters_apply_to_the_command() {
    let place = directory();
    let made = place.path().join("made");
    for mode in MODES {
        let mut spec = spec(mode, &["/bin/mkdir", made.to_str().unwrap()]);
        spec.filters = vec![no_directories(), refusing(&[libc::SYS_reboot], libc::EPERM)];
        if let Some(left) = run_with_right(&spec) {
            assert_eq!(left.code(), 1, "{left:?}");
            assert!(left.stderr.contains("No space left"), "{left:?}");
        }
        assert!(!made.exists());
    }
}

#[test]
fn only_the_given_filters_are_installed() {
    for mode in MODES {
        let mut spec = spec(mode, &["/bin/cat", "/proc/self/status"]);
        spec.filters = vec![no_directories(), no_directories()];
        if let Some(left) = run_with_right(&spec) {
            let has = |line: &str| left.stdout.lines().any(|had| had == line);
            assert!(has("Seccomp:\t2"), "{left:?}");
            let before = format!("NoNewPrivs:\t{}", own("NoNewPrivs:"));
            assert!(
                has(&before),
                "programs may gain the rights they could: {left:?}"
            );
        }
    }
}

#[test]
fn invalid_filters_are_refused() {
    let endless = Filter(vec![(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW); 4097]);
    let astray = Filter(vec![(EQUAL, 9, 9, 0), (RETURN, 0, 0, 0)]);
    let nonsense = Filter(vec![(0xffff, 0, 0, 0)]);
    for filter in [Filter(Vec::new()), endless, astray, nonsense] {
        let mut spec = spec(InitMode::Init, &["/bin/true"]);
        spec.filters = vec![filter];
        if let Some(left) = run_with_right(&spec) {
            let start_error = left.start_error();
            assert_eq!(
                (start_error.step, start_error.errno),
                (Step::Filters, libc::EINVAL)
            );
            assert_eq!((left.words.len(), left.code()), (1, 126));
            assert_eq!(left.stderr, "", "the task should not see an attempt");
        }
    }
}

/// The soft and the hard core dump limit of a process.
fn core_limits(pid: i32) -> (String, String) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"));
    let mut words = line.unwrap().split_ascii_whitespace().map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

/// The init's memory contains the init spec and the command's variables, which are secrets.
#[test]
fn the_init_dumps_no_core_and_the_command_may() {
    let (soft, hard) = core_limits(std::process::id().cast_signed());
    let none = if hard == "0" { "0" } else { "1" };
    for mode in MODES {
        let spec = shell(mode, "read line; ulimit -S -c; ulimit -H -c");
        let mut program = Launch::new(&spec).without_go().start();
        assert_eq!(program.event(), Some(InitEvent::Ready));
        assert_eq!(core_limits(program.pid()), (none.to_owned(), hard.clone()));
        program.ask(&Request::Go, &[]);
        if mode == InitMode::Init {
            let event = program.event();
            assert!(
                matches!(event, Some(InitEvent::Running { .. })),
                "{event:?}"
            );
            assert_eq!(core_limits(program.pid()).0, none);
        }
        program.tell("");
        let blocks = |bytes: &str| match bytes.parse::<u64>() {
            Ok(bytes) => (bytes / 512).to_string(),
            Err(_) => bytes.to_owned(),
        };
        let left = program.end();
        let want = format!("{}\n{}\n", blocks(&soft), blocks(&hard));
        assert_eq!(left.stdout, want, "{mode:?}");
    }
}
