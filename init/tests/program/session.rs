//! Exec sessions, without namespaces to join: what these add is in the end-to-end tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use nix::libc;
use nspawn_init::session_spec::{
    Confinement, Order, SESSION, SessionCgroups, SessionEvent, SessionSpec, TerminalSize,
};
use nspawn_init::{StartError, Step};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

use crate::harness::{PATH, directory, eventually, file, pipe, rest};

/// Everything that this process may do, so that nothing changes for the command.
fn spec(command: &[&str]) -> SessionSpec {
    SessionSpec {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        environment: BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]),
        directory: "/".to_owned(),
        user: None,
        size: TerminalSize {
            rows: 41,
            columns: 113,
        },
        cgroups: SessionCgroups::default(),
        confinement: Confinement {
            bounding: u64::MAX,
            ..Confinement::default()
        },
    }
}

fn shell(script: &str) -> SessionSpec {
    spec(&["/bin/sh", "-c", script])
}

/// A session, and the plugin's end of everything.
struct Session {
    program: Child,
    channel: Option<OwnedFd>,
    stdin: Option<File>,
    stdout: File,
    stderr: File,
}

/// With pipes.
fn start(spec: &SessionSpec) -> Session {
    start_as(spec, Order::Pipes)
}

fn start_as(spec: &SessionSpec, order: Order) -> Session {
    let (channel, theirs) = packets::pair().unwrap();
    let program = Command::new(env!("CARGO_BIN_EXE_nspawn-init"))
        .arg(SESSION)
        .env_clear()
        .stdin(theirs)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (their_stdin, stdin) = pipe();
    let (stdout, their_stdout) = pipe();
    let (stderr, their_stderr) = pipe();
    let spec = file(&packets::encode(spec));
    let leader = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let all = [
        spec.as_fd(),
        leader.as_fd(),
        their_stdin.as_fd(),
        their_stdout.as_fd(),
        their_stderr.as_fd(),
    ];
    let descriptors = match order {
        Order::Pipes => &all[..],
        Order::Terminal => &all[..2],
    };
    packets::send(&channel, &packets::encode(&order), descriptors).unwrap();
    Session {
        program,
        channel: Some(channel),
        stdin: Some(stdin.into()),
        stdout,
        stderr,
    }
}

impl Session {
    /// The next event and its descriptor; `None` once the channel is closed.
    fn receive(&self) -> Option<(SessionEvent, Option<OwnedFd>)> {
        let channel = self.channel.as_ref().unwrap();
        let mut descriptors = [PollFd::new(channel, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut descriptors, Some(&limit)).unwrap(), 1, "no event");
        let packet = packets::receive(channel).ok()?;
        let event = packet.message().unwrap();
        let descriptor = packet.descriptors.take::<1>().ok();
        Some((event, descriptor.map(|[descriptor]| descriptor)))
    }

    fn event(&self) -> Option<SessionEvent> {
        self.receive().map(|(event, _)| event)
    }

    fn expect_running(&self) {
        assert_eq!(self.event(), Some(SessionEvent::Running));
    }

    fn expect_end(&self, status: i32) {
        assert_eq!(self.event(), Some(SessionEvent::Ended { status }));
    }

    fn failure(&self) -> StartError {
        match self.event() {
            Some(SessionEvent::Failed(start_error)) => start_error,
            other => panic!("{other:?}"),
        }
    }

    /// Ends it and waits until the program that watches it has exited.
    fn end(mut self) {
        self.channel = None;
        assert!(self.program.wait().unwrap().success());
    }
}

fn is_gone(pid: i32) -> bool {
    rustix::process::test_kill_process(Pid::from_raw(pid).unwrap()).is_err()
}

#[test]
fn a_command_has_its_own_streams_and_exit() {
    let mut session = start(&shell("cat; echo error >&2; exit 7"));
    session.expect_running();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"hello").unwrap();
    drop(stdin);
    assert_eq!(rest(&mut session.stdout), "hello");
    assert_eq!(rest(&mut session.stderr), "error\n");
    session.expect_end(7 << 8);
    session.end();
}

#[test]
fn a_signal_is_reported_as_such() {
    let session = start(&shell("kill -USR1 $$"));
    session.expect_running();
    session.expect_end(libc::SIGUSR1);
    session.end();
}

#[test]
fn a_command_begins_like_any_other() {
    let mut spec = shell(
        "grep -E '^Sig(Blk|Ign)|^NoNewPrivs' /proc/self/status; umask; ls /proc/self/fd; pwd; env",
    );
    let directory = directory();
    spec.directory = directory.path().to_str().unwrap().to_owned();
    spec.environment.insert("SECRET".into(), "a=b".into());
    spec.environment.insert("HOME".into(), "/given".into());
    let mut session = start(&spec);
    session.expect_running();
    let output = rest(&mut session.stdout);
    let none = "0000000000000000";
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("NoNewPrivs"));
    let own = own.unwrap();
    let status = format!("SigBlk:\t{none}\nSigIgn:\t{none}\n{own}\n0022\n0\n1\n2\n3\n");
    assert!(output.starts_with(&status), "{output}");
    for line in ["SECRET=a=b", "HOME=/given", &spec.directory] {
        assert!(
            output.lines().any(|found| found == line),
            "{line}: {output}"
        );
    }
    session.expect_end(0);
    session.end();
}

#[test]
fn what_can_not_be_run_is_reported() {
    let scratch = directory();
    let script = scratch.path().join("script");
    std::fs::write(&script, "true").unwrap();
    let missing = "/nowhere/at/all".to_owned();
    let at = |directory: &str| SessionSpec {
        directory: directory.to_owned(),
        ..shell("true")
    };
    let by = |user: &str| SessionSpec {
        user: Some(user.to_owned()),
        ..shell("true")
    };
    let script = script.to_str().unwrap();
    for (spec, step, file, errno) in [
        (
            spec(&["no-such-program"]),
            Step::Execute,
            "no-such-program",
            2,
        ),
        (spec(&[&missing]), Step::Execute, &*missing, 2),
        (spec(&[script]), Step::Execute, script, libc::EACCES),
        (at(&missing), Step::Directory, &*missing, 2),
        (by("no-such-user"), Step::User, "no-such-user", 2),
    ] {
        let session = start(&spec);
        let start_error = session.failure();
        assert_eq!(
            (start_error.step, &*start_error.file, start_error.errno),
            (step, file, errno)
        );
        session.end();
    }
}

#[test]
fn the_end_takes_everything_along() {
    let script = "trap '' TERM HUP; (trap '' TERM HUP; setsid sh -c 'sleep 1000 & echo $!; sleep 1000') & echo $$; wait";
    for drops_first in [true, false] {
        let mut session = start(&shell(script));
        session.expect_running();
        let mut pids = Vec::new();
        let mut text = String::new();
        while pids.len() < 2 {
            let mut byte = [0];
            session.stdout.read_exact(&mut byte).unwrap();
            match byte[0] {
                b'\n' => pids.push(std::mem::take(&mut text).parse::<i32>().unwrap()),
                byte => text.push(char::from(byte)),
            }
        }
        if drops_first {
            session.end();
        } else {
            // The watching process is killed: the reaper sees that and ends the session.
            session.program.kill().unwrap();
            session.program.wait().unwrap();
        }
        for pid in pids {
            eventually("the session's processes end", || is_gone(pid));
        }
    }
}

#[test]
fn what_the_command_leaves_lives_until_the_session_ends() {
    let script = "sleep 1000 >/dev/null 2>&1 </dev/null & echo $!; echo $PPID";
    let mut session = start(&shell(script));
    session.expect_running();
    session.expect_end(0);
    let output = rest(&mut session.stdout);
    // The other one is the reaper.
    let pids: Vec<i32> = output.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    assert!(!pids.iter().any(|pid| is_gone(*pid)));
    session.end();
    assert!(
        pids.iter().all(|pid| is_gone(*pid)),
        "the program exits last, and leaves no zombie"
    );
}

/// An event that the plugin no longer receives does not make the program leave the rest to others.
#[test]
fn an_event_that_comes_too_late_does_not_cut_the_end_short() {
    let mut session = start(&shell(
        "sleep 1000 >/dev/null 2>&1 </dev/null & echo $!; echo $$; read line",
    ));
    session.expect_running();
    let [left, command] = [(); 2].map(|()| {
        let line = crate::harness::line(&mut session.stdout);
        line.trim().parse().unwrap()
    });
    let program = Pid::from_child(&session.program);
    rustix::process::kill_process(program, rustix::process::Signal::STOP).unwrap();
    drop(session.stdin.take());
    // Its reaper reports that to the stopped program.
    eventually("the command is waited for", || is_gone(command));
    drop(session.channel.take());
    rustix::process::kill_process(program, rustix::process::Signal::CONT).unwrap();
    session.end();
    assert!(is_gone(left), "the program exits last");
}

#[test]
fn orphans_are_reaped() {
    // A zombie would stay in the list.
    let script = "for i in 1 2 3; do (sleep 0 & ); done; i=0; \
        until set -- $(cat /proc/$PPID/task/$PPID/children); [ $# = 1 ] || [ $i = 3000 ]; do sleep 0.01; i=$((i+1)); done; \
        echo \"$#\"";
    let mut session = start(&shell(script));
    session.expect_running();
    assert_eq!(
        rest(&mut session.stdout),
        "1\n",
        "its only child is the shell"
    );
    session.expect_end(0);
    session.end();
}

#[test]
fn a_terminal_is_the_controlling_one_of_the_command() {
    let mut spec = shell(
        "stty size; tty; ps -o tpgid= -p $$ | grep -qx \" *$$\" && echo foreground; read line; echo \"got $line\"; exit 3",
    );
    spec.environment.insert("TERM".into(), "xterm".into());
    let session = start_as(&spec, Order::Terminal);
    let (event, master) = session.receive().unwrap();
    assert_eq!(event, SessionEvent::Terminal);
    let mut master = File::from(master.unwrap());
    session.expect_running();
    rustix::io::ioctl_fionbio(&master, false).unwrap();
    let mut output = String::new();
    while !output.contains("foreground\r\n") {
        let mut byte = [0];
        master.read_exact(&mut byte).unwrap();
        output.push(char::from(byte[0]));
    }
    assert!(output.starts_with("41 113\r\n/dev/pts/"), "{output}");
    master.write_all(b"typed\r").unwrap();
    session.expect_end(3 << 8);
    let mut output = Vec::new();
    // The kernel reports EIO at the end.
    let _ = master.read_to_end(&mut output);
    assert_eq!(output, b"typed\r\ngot typed\r\n");
    session.end();
}

#[test]
fn a_terminal_that_is_closed_hangs_up() {
    let session = start_as(&shell("sleep 1000"), Order::Terminal);
    let (_, master) = session.receive().unwrap();
    session.expect_running();
    drop(master);
    session.expect_end(libc::SIGHUP);
    session.end();
}

#[test]
fn an_order_that_makes_no_sense_is_refused() {
    let run = |message: &[u8], descriptors: usize| {
        let (channel, theirs) = packets::pair().unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_nspawn-init"))
            .arg(SESSION)
            .stdin(theirs)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let null = File::open("/dev/null").unwrap();
        let descriptors = vec![null.as_fd(); descriptors];
        packets::send(&channel, message, &descriptors).unwrap();
        let success = program.wait().unwrap().success();
        let event = packets::receive(&channel).unwrap().message().unwrap();
        (success, event)
    };
    for (message, descriptors, errno) in [
        (&b"{}"[..], 5, libc::EBADMSG),
        (b"\"pipes\"", 2, libc::EBADF),
        (b"\"terminal\"", 5, libc::EBADF),
        (b"\"pipes\"", 5, libc::EBADMSG),
    ] {
        let start_error = StartError {
            step: Step::Order,
            file: String::new(),
            errno,
        };
        let expected = (false, SessionEvent::Failed(start_error));
        assert_eq!(run(message, descriptors), expected);
    }
}

#[test]
fn a_plugin_that_is_gone_before_the_order_leaves_nothing() {
    let (channel, theirs) = packets::pair().unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_nspawn-init"))
        .arg(SESSION)
        .stdin(theirs)
        .spawn()
        .unwrap();
    drop(channel);
    assert!(!program.wait().unwrap().success());
}
