//! The fake systemd-nspawn as its callers see it: notifications, signals, exit statuses, call log.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);

/// A directory with the link, a tree, and the notification socket.
struct Bench {
    directory: tempfile::TempDir,
    socket: UnixDatagram,
}

struct Running {
    nspawn: Child,
    leader: i32,
}

impl Bench {
    fn new() -> Self {
        Self::with("{}")
    }

    fn with(scenario: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("systemd-nspawn");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fake-nspawn"), link).unwrap();
        fs::write(directory.path().join("scenario.json"), scenario).unwrap();
        for name in ["usr", "run", "tmp"] {
            fs::create_dir_all(directory.path().join("tree").join(name)).unwrap();
        }
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { directory, socket }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("systemd-nspawn"));
        command
            .env_clear()
            .env("NOTIFY_SOCKET", self.path("notify"))
            .args([
                "--settings=no",
                "--register=no",
                "--keep-unit",
                "--console=pipe",
                "-D",
            ])
            .arg(self.path("tree"))
            .args(words)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Starts it, and returns once it is announced and its payload has created the file `up`.
    fn start(&self, mode: &[&str], script: &str) -> Running {
        let up = self.path("up");
        let script = format!(
            "{script}\n: >{}; while :; do sleep 0.01; done",
            up.display()
        );
        let words = [mode, &["/bin/sh", "-c", &script]].concat();
        let nspawn = self.command(&words).spawn().unwrap();
        let leader = self.received("X_NSPAWN_LEADER_PID=").parse().unwrap();
        self.received("READY=1");
        eventually("the payload runs", || up.exists());
        Running { nspawn, leader }
    }

    /// Reads notifications until one has a line with this prefix; returns the rest of that line.
    fn received(&self, start: &str) -> String {
        let mut buffer = [0; 4096];
        loop {
            let length = match self.socket.recv(&mut buffer) {
                // With a timeout set, signals interrupt the call.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other.unwrap_or_else(|error| panic!("no {start}: {error}")),
            };
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if let Some(rest) = text.lines().find_map(|line| line.strip_prefix(start)) {
                return rest.to_owned();
            }
        }
    }

    fn call_log(&self, event: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path("ledger.jsonl")).unwrap();
        let events = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|line| line["event"] == event).collect()
    }
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(pid: i32, number: i32) {
    // nix's `Signal` has no real-time signals.
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("kill -{number} {pid}"))
        .status();
    assert!(status.unwrap().success());
}

fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn first_child(pid: i32) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

impl Running {
    fn pid(&self) -> i32 {
        i32::try_from(self.nspawn.id()).unwrap()
    }

    fn end(&mut self) -> ExitStatus {
        self.nspawn.wait().unwrap()
    }
}

impl Drop for Running {
    /// A failed test leaves no process running.
    fn drop(&mut self) {
        if matches!(self.nspawn.try_wait(), Ok(None)) {
            kill(Pid::from_raw(self.leader), Signal::SIGKILL).ok();
            self.nspawn.wait().ok();
        }
    }
}

const TRAP: &str = "trap 'exit 42' TERM";

#[rstest]
#[case(&[], "exit 7", 7)]
#[case(&[], "exit 133", 1)]
#[case(&[], "kill -9 $$", 1)]
#[case(&["-a"], "exit 7", 7)]
#[case(&["-a"], "exit 133", 1)]
#[case(&["-a"], "kill -9 $$", 255)]
fn the_exit_of_a_payload_becomes_the_status(
    #[case] mode: &[&str],
    #[case] script: &str,
    #[case] status: i32,
) {
    let bench = Bench::new();
    let output = bench.run(&[mode, &["/bin/sh", "-c", script]].concat());
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    bench.received("STOPPING=1");
    assert_eq!(bench.call_log("exit")[0]["status"], status);
}

#[rstest]
#[case(&[], TRAP, &[15], 42)]
#[case(&[], ":", &[15, 10, 9], 1)]
#[case(&["-a"], TRAP, &[2], 133)]
#[case(&["-a"], TRAP, &[15, 37], 0)]
#[case(&["-a"], ":", &[38], 0)]
fn a_leader_handles_signals_like_a_first_process(
    #[case] mode: &[&str],
    #[case] script: &str,
    #[case] signals: &[i32],
    #[case] status: i32,
) {
    let bench = Bench::new();
    let mut running = bench.start(mode, script);
    for (sent, number) in signals.iter().enumerate() {
        send(running.leader, *number);
        // A KILL can't be logged, and the next signal must wait until this one is in the call log.
        if *number != 9 {
            eventually("the signal is in the ledger", || {
                bench.call_log("signal").len() > sent
            });
        }
    }
    assert_eq!(running.end().code(), Some(status));
}

#[rstest]
#[case(&[], TRAP, &[15], 1)]
#[case(&["--kill-signal=TERM"], TRAP, &[15], 42)]
#[case(&["--kill-signal=TERM"], ":", &[15, 15], 1)]
fn nspawn_stops_its_container_on_sigterm(
    #[case] mode: &[&str],
    #[case] script: &str,
    #[case] signals: &[i32],
    #[case] status: i32,
) {
    let bench = Bench::new();
    let mut running = bench.start(mode, script);
    for number in signals {
        send(running.pid(), *number);
        let reported = || {
            bench
                .call_log("signal")
                .iter()
                .any(|event| event["role"] == "nspawn")
        };
        eventually("the signal is in the ledger", reported);
    }
    assert_eq!(running.end().code(), Some(status));
}

#[rstest]
#[case(9)]
#[case(1)]
fn a_killed_nspawn_leaves_its_container_alive(#[case] number: i32) {
    let bench = Bench::new();
    let mut running = bench.start(&[], "sleep 1000 &");
    let (leader, payload) = (running.leader, first_child(running.leader));
    send(running.pid(), number);
    assert_eq!(running.end().signal(), Some(number));
    assert!(alive(leader) && alive(payload));
    let grandchild = first_child(payload);
    kill(Pid::from_raw(leader), Signal::SIGKILL).unwrap();
    eventually("all are gone", || {
        ![leader, payload, grandchild].into_iter().any(alive)
    });
}

#[test]
fn the_payload_is_the_first_child_of_a_stub() {
    let bench = Bench::new();
    let mut running = bench.start(&["--as-pid2"], TRAP);
    send(first_child(running.leader), 15);
    assert_eq!(running.end().code(), Some(42));
}

#[test]
fn the_payload_has_the_containers_environment_and_nothing_else() {
    let bench = Bench::new();
    let output = bench
        .command(&["-E", "A=1", "-E", "B", "/usr/bin/env"])
        .env("B", "2")
        .env("C", "3")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let has = |line: &str| text.lines().any(|found| found == line);
    assert!(
        has("A=1") && has("B=2") && has("container=systemd-nspawn") && has("HOME=/root"),
        "{text}"
    );
    assert!(!text.contains("C=3"), "{text}");
}

#[test]
fn a_simulated_init_powers_off() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("tree/sbin")).unwrap();
    fs::write(bench.path("tree/sbin/init"), "").unwrap();
    fs::create_dir_all(bench.path("tree/etc")).unwrap();
    fs::write(bench.path("tree/etc/os-release"), "ID=test\n").unwrap();
    let nspawn = bench.command(&["--boot"]).spawn().unwrap();
    let leader = bench.received("X_NSPAWN_LEADER_PID=").parse().unwrap();
    let mut running = Running { nspawn, leader };
    send(leader, 15);
    send(leader, 38);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_tree_has_one_writer() {
    let bench = Bench::new();
    let mut running = bench.start(&[], TRAP);
    let second = bench.run(&["/bin/true"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("is currently busy."),
        "{second:?}"
    );
    send(running.leader, 15);
    assert_eq!(running.end().code(), Some(42));
}

#[test]
fn a_scenario_applies_call_by_call() {
    let bench = Bench::with(
        r#"{"calls": [{"refuse": {"status": 3, "stderr": "out of luck"}}, {"instead": {"signal": 11}}, {"exit_status": 9}]}"#,
    );
    let first = bench.run(&["/bin/true"]);
    assert_eq!(
        (first.status.code(), &first.stderr[..]),
        (Some(3), &b"out of luck\n"[..])
    );
    let second = bench.run(&["/bin/true"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&second.stderr).ends_with("terminated by signal SEGV.\n"),
        "{second:?}"
    );
    assert_eq!(bench.run(&["/bin/true"]).status.code(), Some(9));
    let calls = bench.call_log("call");
    assert_eq!(
        calls
            .iter()
            .map(|call| call["number"].as_u64())
            .collect::<Vec<_>>(),
        [Some(0), Some(1), Some(2)]
    );
    assert_eq!(
        calls[0]["argv"].as_array().unwrap().last().unwrap(),
        "/bin/true"
    );
}

#[test]
fn a_failed_start_is_refused_before_it_is_announced() {
    let bench = Bench::new();
    let output = bench.run(&["--read-only", "--bind=/tmp:/data", "/bin/true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(bench.call_log("started").is_empty());
    bench.received("ERRNO=");
}
