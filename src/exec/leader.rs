//! What a session takes over from the container's first process: its restrictions, its namespaces, its environment. Read from `/proc` for
//! every session, because the process may change all of it. What was read is used only if the process was still alive after that: its pid
//! can't have come to mean another one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::libc;
use nspawn_init::session_spec::Confinement;

use crate::container::Mode;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs::{Limit, parse_limits, status_field};

/// The namespaces of a process by their names in `/proc/<pid>/ns`. A kernel may lack some.
const NAMESPACES: [(&str, i32); 8] = [
    ("user", libc::CLONE_NEWUSER),
    ("mnt", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("time", 0x80),
];

/// `RLIMIT_NOFILE`.
const OPEN_FILES: u32 = 7;
/// The soft limit that programs expect: one that uses select(2) fails with more open files.
const DEFAULT_OPEN_FILES: u64 = 1024;

/// That of systemd-nspawn.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables that are meant for the first process alone: the descriptors that it was passed, and how it reports to its manager.
const OWN_VARIABLES: [&str; 13] = [
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "MANAGERPID",
    "MANAGERPIDFDID",
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "_",
];

/// How long the first process may take to execute its program once the container is up. It is far less, except on an emulated processor.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(30);
/// How often to look. Nothing reports it.
const PROGRAM_INTERVAL: Duration = Duration::from_millis(2);
/// `PF_FORKNOEXEC` of `linux/sched.h`.
const FORKED_WITHOUT_EXEC: u64 = 0x40;

/// Whether a process has seccomp filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seccomp {
    /// It has none.
    Off,
    /// It has this many; `None` before Linux 5.9, which does not say.
    Filters(Option<u32>),
}

impl Seccomp {
    /// So many filters.
    pub(super) fn installed(count: u32) -> Self {
        match count {
            0 => Self::Off,
            some => Self::Filters(Some(some)),
        }
    }
}

/// Waits until the first process has executed its program. systemd-nspawn (from 257 on) reports that a container is up when this process is
/// still a copy of itself, which drops its capabilities and installs its seccomp filters only then. Blocks. Fails with
/// [`io::ErrorKind::NotFound`] if the process has exited, and with [`io::ErrorKind::TimedOut`].
pub(super) fn wait_for_program(leader: &ProcessHandle) -> io::Result<()> {
    let until = Instant::now() + PROGRAM_TIMEOUT;
    while !while_alive(leader, || has_executed(leader))? {
        if Instant::now() >= until {
            let text = "the container's first process has not executed its program";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        // Returns early if it exits.
        leader.wait(PROGRAM_INTERVAL);
    }
    Ok(())
}

/// Whether a process has executed a program since it was forked.
fn has_executed(process: &ProcessHandle) -> io::Result<bool> {
    let stat = read(process, "stat")?;
    // The name before it may contain anything.
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    let flags = fields.and_then(|fields| fields.split(' ').nth(6)?.parse::<u64>().ok());
    let flags = flags.ok_or_else(|| unreadable("stat"))?;
    Ok(flags & FORKED_WITHOUT_EXEC == 0)
}

/// The restrictions of the first process of a container in this mode, without its seccomp filters, and whether it has some. Fails with
/// [`io::ErrorKind::NotFound`] if the process has exited.
pub(super) fn confinement(
    leader: &ProcessHandle,
    mode: Mode,
) -> io::Result<(Confinement, Seccomp)> {
    while_alive(leader, || {
        let (confinement, seccomp) = in_status(&read(leader, "status")?)?;
        let limits = parse_limits(&read(leader, "limits")?).ok_or_else(|| unreadable("limits"))?;
        let adjustment = read(leader, "oom_score_adj")?.trim().parse();
        let confinement = Confinement {
            namespaces: namespaces(leader)?,
            limits: of_services(limits, mode),
            oom_score_adj: adjustment.map_err(|_| unreadable("oom_score_adj"))?,
            ..confinement
        };
        Ok((confinement, seccomp))
    })
}

/// The environment with which the first process was executed, as far as the process has not overwritten it, without what is meant for that
/// process alone. Has a `PATH`. Values are secrets. Fails with [`io::ErrorKind::NotFound`] if the process has exited.
pub(super) fn environment(leader: &ProcessHandle) -> io::Result<BTreeMap<String, String>> {
    while_alive(leader, || {
        let area = fs::read(format!("/proc/{}/environ", leader.process().pid))?;
        Ok(variables(&area))
    })
}

/// A process that is about to exit, or has exited, has lost some of its files in `/proc` and reports ESRCH for others.
fn while_alive<T>(leader: &ProcessHandle, read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let read = read();
    if leader.wait(Duration::ZERO) {
        return Err(gone());
    }
    read.map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => gone(),
        _ => error,
    })
}

fn read(leader: &ProcessHandle, file: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{}/{file}", leader.process().pid))
}

fn unreadable(what: &str) -> io::Error {
    let text = format!("{what} of the container's first process can't be parsed");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn in_status(status: &str) -> io::Result<(Confinement, Seccomp)> {
    let field = |name| status_field(status, name).ok_or_else(|| unreadable(name));
    let capabilities = |name| u64::from_str_radix(field(name)?, 16).map_err(|_| unreadable(name));
    let seccomp = match field("Seccomp")? {
        "0" => Seccomp::Off,
        _ => Seccomp::Filters(
            status_field(status, "Seccomp_filters")
                .map(|count| count.parse().map_err(|_| unreadable("Seccomp_filters")))
                .transpose()?,
        ),
    };
    let confinement = Confinement {
        bounding: capabilities("CapBnd")?,
        inheritable: capabilities("CapInh")?,
        ambient: capabilities("CapAmb")?,
        no_new_privileges: field("NoNewPrivs")? != "0",
        ..Confinement::default()
    };
    Ok((confinement, seccomp))
}

/// Those of the namespaces that differ from this process's.
fn namespaces(leader: &ProcessHandle) -> io::Result<u32> {
    let mut differing = 0;
    for (name, flag) in NAMESPACES {
        let identity = |process: &str| {
            let found = fs::metadata(format!("/proc/{process}/ns/{name}"))?;
            io::Result::Ok((found.dev(), found.ino()))
        };
        let own = match identity("self") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            own => own?,
        };
        if identity(&leader.process().pid.to_string())? != own {
            differing |= flag.cast_unsigned();
        }
    }
    Ok(differing)
}

/// An init raises its own soft limit of open files and gives its services the default.
fn of_services(mut limits: Vec<Limit>, mode: Mode) -> Vec<Limit> {
    for (number, soft, hard) in &mut limits {
        if mode == Mode::Boot && *number == OPEN_FILES {
            *soft = Some(hard.map_or(DEFAULT_OPEN_FILES, |hard| hard.min(DEFAULT_OPEN_FILES)));
        }
    }
    limits
}

/// A program may use the area for other text, such as a title, so only what has the form of a variable is taken.
fn variables(area: &[u8]) -> BTreeMap<String, String> {
    let words = area.split(|byte| *byte == 0);
    let variable = |word| {
        let (name, value) = std::str::from_utf8(word).ok()?.split_once('=')?;
        let usable = is_name(name) && !OWN_VARIABLES.contains(&name);
        usable.then(|| (name.to_owned(), value.to_owned()))
    };
    let mut variables: BTreeMap<_, _> = words.filter_map(variable).collect();
    let path = variables.entry("PATH".to_owned());
    path.or_insert_with(|| DEFAULT_PATH.to_owned());
    variables
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    let plain = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    bytes.next().is_some_and(plain) && bytes.all(|byte| plain(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::Echo;
    use nix::sys::resource::{Resource, getrlimit};
    use rstest::rstest;
    use std::io::{BufRead, Write};
    use std::process::{Command, Stdio};

    fn status(name: &str) -> String {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        status_field(&status, name).unwrap().to_owned()
    }

    #[expect(clippy::disallowed_methods, reason = "a process that forks")]
    #[test]
    fn the_program_of_a_process_is_waited_for() {
        let script = "exec 3<&0; (read line <&3; exec cat <&3) & echo $!; wait";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = shell.stdout.take().unwrap();
        std::io::BufReader::new(stdout)
            .read_line(&mut line)
            .unwrap();
        let forked = ProcessHandle::open(line.trim().parse().unwrap()).unwrap();
        assert!(!has_executed(&forked).unwrap());
        shell.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        wait_for_program(&forked).unwrap();
        assert!(has_executed(&forked).unwrap());
        drop(shell.stdin.take());
        shell.wait().unwrap();
        let gone = wait_for_program(&forked).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_child_is_as_confined_as_this_process() {
        let child = Echo::start(&["cat"], &[]);
        let (found, seccomp) = confinement(&child.handle, Mode::Plain).unwrap();
        assert_eq!(found.namespaces, 0);
        let masks = [found.bounding, found.inheritable, found.ambient];
        let own = ["CapBnd", "CapInh", "CapAmb"].map(status);
        assert_eq!(masks.map(|mask| format!("{mask:016x}")), own);
        assert_eq!(found.no_new_privileges, status("NoNewPrivs") == "1");
        assert_eq!(seccomp == Seccomp::Off, status("Seccomp") == "0");
        let adjustment = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
        assert_eq!(found.oom_score_adj.to_string(), adjustment.trim());
        let limited = |value| Some(value).filter(|value| *value != u64::MAX);
        for (number, resource) in [
            (3, Resource::RLIMIT_STACK),
            (OPEN_FILES, Resource::RLIMIT_NOFILE),
            (15, Resource::RLIMIT_RTTIME),
        ] {
            let (soft, hard) = getrlimit(resource).unwrap();
            let wanted = (number, limited(soft), limited(hard));
            assert!(found.limits.contains(&wanted), "{wanted:?}");
        }
        child.end();
    }

    #[test]
    fn a_process_that_has_exited_has_no_confinement() {
        let mut child = Echo::start(&["cat"], &[]);
        child.exit();
        for reaped in [false, true] {
            if reaped {
                child.reap();
            }
            let error = confinement(&child.handle, Mode::Plain).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "reaped: {reaped}");
            let error = environment(&child.handle).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "reaped: {reaped}");
        }
    }

    #[test]
    fn namespaces_of_its_own_are_found() {
        if !nix::unistd::geteuid().is_root() {
            return support::not_applicable("new namespaces need root");
        }
        let command = ["unshare", "--uts", "--ipc", "--net", "cat"];
        let child = Echo::start(&command, &[]);
        let (found, _) = confinement(&child.handle, Mode::Plain).unwrap();
        let wanted = libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
        assert_eq!(found.namespaces, wanted.cast_unsigned());
        child.end();
    }

    #[test]
    fn the_status_of_a_confined_process_is_read() {
        let status = "CapInh:\t0000000000000400\nCapPrm:\t1\nCapBnd:\t00000000fdecafff\n\
            CapAmb:\t0000000000000001\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let (found, seccomp) = in_status(status).unwrap();
        let masks = (found.bounding, found.inheritable, found.ambient);
        assert_eq!(masks, (0xfdec_afff, 0x400, 1));
        assert!(found.no_new_privileges);
        assert_eq!(seccomp, Seccomp::Filters(None));
        let newer = format!("{status}Seccomp_filters:\t12\n");
        assert_eq!(in_status(&newer).unwrap().1, Seccomp::Filters(Some(12)));
        in_status("CapInh:\t0\n").unwrap_err();
    }

    #[rstest]
    #[case::init(Mode::Boot, Some(524_288), Some(524_288), Some(1024))]
    #[case::init_without_limit(Mode::Boot, None, None, Some(1024))]
    #[case::init_with_less(Mode::Boot, Some(500), Some(512), Some(512))]
    #[case::command(Mode::Plain, Some(524_288), Some(524_288), Some(524_288))]
    fn services_get_the_default_of_open_files(
        #[case] mode: Mode,
        #[case] soft: Option<u64>,
        #[case] hard: Option<u64>,
        #[case] wanted: Option<u64>,
    ) {
        let other = (6, Some(2000), None);
        let limits = of_services(vec![other, (OPEN_FILES, soft, hard)], mode);
        assert_eq!(limits, [other, (OPEN_FILES, wanted, hard)]);
    }

    #[test]
    fn only_variables_are_taken_from_the_environment() {
        let area = b"A=1\0B=\0A_2=x=y\0LISTEN_FDS=5\0NOTIFY_SOCKET=/n\0=x\0nginx: master process\0\
            2A=x\0A B=x\0A-B=x\0C=\xff\0PATH=/bin\0\0D=cut";
        let pairs = [
            ("A", "1"),
            ("A_2", "x=y"),
            ("B", ""),
            ("D", "cut"),
            ("PATH", "/bin"),
        ];
        let wanted = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(variables(area), wanted.into());
        assert_eq!(variables(b"")["PATH"], DEFAULT_PATH);
    }

    #[test]
    fn the_environment_of_a_process_is_read() {
        let child = Echo::start(&["cat"], &[("EXEC_TEST", "a b\nc"), ("MANAGERPID", "1")]);
        let found = environment(&child.handle).unwrap();
        assert_eq!(found["EXEC_TEST"], "a b\nc");
        assert!(!found.contains_key("MANAGERPID"));
        child.end();
    }
}
