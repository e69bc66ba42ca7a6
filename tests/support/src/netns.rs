//! Network namespaces of a test, each with a thread in which it runs code. Nothing of the host's network changes. A link between two is made
//! with `ip`, as a container's link to its host: the container's address is its whole network, and its gateway is link-local.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::not_applicable;

/// The name of the host's end of a link.
pub const LINK: &str = "link0";
/// The hardware address of the container's end.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// The container's address.
pub const ADDRESS: &str = "172.31.9.7";
/// The container's IPv6 address.
pub const ADDRESS6: &str = "fd00:7::7";
/// The gateway, an address of the host's end.
pub const GATEWAY: &str = "169.254.1.1";

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, and in a mount namespace in which it may mount what it likes. When this is dropped, the
/// processes that are left in it are killed.
#[derive(Debug)]
pub struct Space {
    jobs: Option<mpsc::Sender<Job>>,
    id: i32,
    thread: Option<thread::JoinHandle<()>>,
}

impl Space {
    /// `None` without the privilege or `ip`, which is reported.
    pub fn new() -> Option<Self> {
        if Command::new("ip").arg("-V").output().is_err() {
            not_applicable("making a link needs the program ip");
            return None;
        }
        let (jobs, todo) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let made = separate();
            let failed = made.is_err();
            tell.send(made.map(|()| nix::unistd::gettid().as_raw()))
                .unwrap();
            if !failed {
                todo.into_iter().for_each(|job| job());
            }
        });
        match told.recv().unwrap() {
            Ok(id) => Some(Self {
                jobs: Some(jobs),
                id,
                thread: Some(thread),
            }),
            Err(nix::Error::EPERM) => {
                not_applicable("making a network namespace needs root");
                None
            }
            Err(error) => panic!("making a network namespace: {error}"),
        }
    }

    /// The file that represents the network namespace.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/task/{}/ns/net", std::process::id(), self.id).into()
    }

    /// Runs this in its thread.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answers) = mpsc::channel();
        let job = move || drop(answer.send(job()));
        self.jobs.as_ref().unwrap().send(Box::new(job)).unwrap();
        answers.recv().expect("the thread has panicked")
    }

    /// What a program says in it; the program has to succeed.
    pub fn program(&self, words: &[&str]) -> String {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        self.run(move || {
            let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{words:?}: {said}{error}");
            said
        })
    }

    /// Whether a program is installed; reports it if not.
    pub fn has(&self, program: &str) -> bool {
        let has = Command::new(program).arg("--version").output().is_ok();
        if !has {
            not_applicable(&format!("{program} is not installed"));
        }
        has
    }

    fn ip(&self, arguments: &str) {
        let words: Vec<&str> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
        self.program(&words);
    }

    /// Waits until the kernel has enabled a link. Until then, for seconds on a machine that makes many of them, it drops what is sent there.
    fn wait_until_up(&self, link: &str) {
        let deadline = Instant::now() + crate::DEADLINE;
        let words = ["-oneline", "link", "show", link].map(str::to_owned);
        loop {
            let words = words.clone();
            let shown = self.run(move || Command::new("ip").args(words).output().unwrap());
            if String::from_utf8_lossy(&shown.stdout).contains(" state UP ") {
                return;
            }
            assert!(Instant::now() < deadline, "{link} does not come up");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let own = fs::read_link(format!("/proc/self/task/{}/ns/net", self.id));
        for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path: PathBuf = pid.path();
            let number = pid.file_name().to_str().and_then(|name| name.parse().ok());
            let its = fs::read_link(path.join("ns/net"));
            if let (Some(number), Ok(its), Ok(own)) = (number, its, &own)
                && its == *own
            {
                let _ = kill(Pid::from_raw(number), Signal::SIGKILL);
            }
        }
        self.jobs = None;
        let _ = self.thread.take().unwrap().join();
    }
}

fn separate() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Programs find what is meant for this network only.
    mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none)
}

/// Two namespaces, the first as a host, the second as a container on a link to it. `None` if this host can't have them.
pub fn linked() -> Option<(Space, Space)> {
    let (host, container) = (Space::new()?, Space::new()?);
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    let id = container.id;
    for space in [&host, &container] {
        space.ip("link set lo up");
    }
    host.ip(&format!(
        "link add {LINK} type veth peer name host0 netns {id} address {mac}"
    ));
    host.ip(&format!("address add {GATEWAY}/32 dev {LINK}"));
    host.ip(&format!("link set {LINK} up"));
    host.ip(&format!("route add {ADDRESS}/32 dev {LINK}"));
    container.ip("link set host0 up");
    container.ip(&format!("address add {ADDRESS}/32 dev host0"));
    container.ip(&format!("route add {GATEWAY}/32 dev host0 scope link"));
    container.ip(&format!("route add default via {GATEWAY} dev host0"));
    for (space, link) in [(&host, LINK), (&container, "host0")] {
        space.wait_until_up(link);
    }
    Some((host, container))
}

/// The same with IPv6. `None` if this host has none.
pub fn linked_with_ipv6() -> Option<(Space, Space)> {
    let (host, container) = linked()?;
    if host.run(|| std::net::TcpListener::bind("[::1]:0").is_err()) {
        not_applicable("this host has no IPv6");
        return None;
    }
    host.ip(&format!("address add fd00:7::1/128 dev {LINK} nodad"));
    host.ip(&format!("route add {ADDRESS6}/128 dev {LINK}"));
    container.ip(&format!("address add {ADDRESS6}/128 dev host0 nodad"));
    container.ip("route add fd00:7::1/128 dev host0");
    Some((host, container))
}
