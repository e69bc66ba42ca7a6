//! Networks for the tests: network namespaces of their own, joined by veth pairs. A namespace goes when the test ends.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::{Attachment, Mapping, NetworkPlan};

/// A plan whose addresses, link and owner are those of this number.
pub(super) fn plan(number: u8, ports: &[Mapping]) -> NetworkPlan {
    NetworkPlan {
        owner: format!("alloc{number}/task"),
        link: format!("nd-{number}"),
        attachment: Attachment::Host,
        mac: [2, 0, 0, 0, 0, number],
        address: [10, 77, 0, number].into(),
        address6: [0xfd77, 0, 0, 0, 0, 0, 0, number.into()].into(),
        ports: ports.to_vec(),
    }
}

/// A port of the host.
pub(super) fn port(label: &str, address: Option<&str>, host: u16, container: u16) -> Mapping {
    Mapping {
        label: label.to_owned(),
        address: address.map(|address| address.parse().unwrap()),
        host,
        container,
    }
}

type Task = Box<dyn FnOnce() + Send>;

/// A network namespace that exists as long as a thread of this process.
#[derive(Debug)]
pub(super) struct Namespace {
    /// The file that represents it.
    path: PathBuf,
    tasks: Option<mpsc::Sender<Task>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Namespace {
    /// `None` without the privilege or one of these programs, which is reported.
    pub(super) fn new(programs: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            support::not_applicable("making a network namespace needs root");
            return None;
        }
        for name in programs {
            if program(&format!("{name} --version"), "").is_err() {
                support::not_applicable(&format!("{name} is not installed"));
                return None;
            }
        }
        let (tasks, asked) = mpsc::channel::<Task>();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid()).unwrap();
            asked.into_iter().for_each(|task| task());
        });
        let id = is_ready.recv().unwrap();
        Some(Self {
            path: format!("/proc/{}/task/{id}/ns/net", std::process::id()).into(),
            tasks: Some(tasks),
            thread: Some(thread),
        })
    }

    /// Does something in it. Sockets made there stay in it.
    pub(super) fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answers) = mpsc::channel();
        let task = Box::new(move || answer.send(task()).unwrap());
        self.tasks.as_ref().unwrap().send(task).unwrap();
        answers.recv().expect("the task has panicked")
    }

    /// Runs a program with these arguments, which are separated by spaces, and returns what it printed.
    pub(super) fn call(&self, line: &str) -> String {
        self.feed(line, "")
    }

    /// The same with input.
    pub(super) fn feed(&self, line: &str, input: &str) -> String {
        let (line, input) = (line.to_owned(), input.to_owned());
        self.run(move || {
            let output = program(&line, &input).unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{line}: {error}");
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// Writes a setting of the kernel's network.
    pub(super) fn set(&self, name: &str, value: &'static str) {
        let file = format!("/proc/sys/net/{name}");
        self.run(move || std::fs::write(file, value).unwrap());
    }

    /// Joins it with another one by a pair of links of these names, both up.
    pub(super) fn join(&self, own: &str, other: &Self, others: &str) {
        let path = other.path.display();
        self.call(&format!(
            "ip link add {own} type veth peer name {others} netns {path}"
        ));
        self.call(&format!("ip link set {own} up"));
        other.call(&format!("ip link set {others} up"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.tasks = None;
        let _ = self.thread.take().unwrap().join();
    }
}

#[expect(clippy::disallowed_methods, reason = "ip and nft are programs")]
fn program(line: &str, input: &str) -> io::Result<Output> {
    use std::io::Write as _;
    let mut words = line.split(' ');
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output()
}
