//! A real Nomad client agent with the driver in its plugin directory, and a server agent: the environment of the tests of tier (b). Two
//! processes, because an agent that is both may reject its own client for 20 seconds after a restart. They listen on 127.0.0.1 only. Their
//! names contain a mark, and [`Agent::leave`] fails the test if anything with the mark is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::leftovers::Marks;
use crate::{DEADLINE, until};

mod allocation;
mod api;
mod config;
mod exec;

pub use allocation::{Allocation, Name};
use api::Api;
use config::{LABEL, Options, Ports};
pub use exec::{Exec, Message};

/// How many times as long an agent may take to start on an emulated processor (`NOMAD_DRIVER_NSPAWN_E2E_EMULATED`).
const EMULATED: u32 = 5;

/// One client agent and its server.
#[derive(Debug)]
pub struct Agent {
    dir: TempDir,
    /// The driver's state directory.
    state: TempDir,
    marks: Marks,
    mark: String,
    nomad: PathBuf,
    /// Of the client agent, which forwards to the server.
    api: Api,
    server: Option<Child>,
    client: Option<Child>,
    left: bool,
}

impl Agent {
    /// An agent that is ready to run tasks of the driver.
    pub fn new() -> Self {
        Self::with(Self::OPTIONS)
    }

    /// The same with this log level.
    pub fn logging(level: &'static str) -> Self {
        Self::with(Options {
            level,
            ..Self::OPTIONS
        })
    }

    /// An agent that also has Nomad's own driver raw_exec, to compare with. The driver's state directory is in memory, as the default one is
    /// where a systemd is the host's init.
    pub fn beside_raw_exec() -> Self {
        Self::with(Options {
            level: "ERROR",
            state_in: Some("/dev/shm"),
            drivers_off: "docker,java,qemu,exec",
            ..Self::OPTIONS
        })
    }

    /// An agent whose jobs are reached by the addresses of this interface, and that can make networks of groups. Nomad and the CNI plugins
    /// keep what they know of these in directories of the machine, so the caller's thread gets other ones: the thread has to be one
    /// of its own.
    pub fn with_bridges(interface: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).expect("private mounts");
        for place in ["/run/cni", "/var/lib/cni"] {
            fs::create_dir_all(place).expect("a directory");
            mount(none, place, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
        }
        Self::with(Options {
            interface,
            bridges: true,
            ..Self::OPTIONS
        })
    }

    const OPTIONS: Options<'static> = Options {
        level: "DEBUG",
        drivers_off: "docker,java,qemu,exec,raw_exec",
        interface: "lo",
        bridges: false,
        state_in: None,
    };

    fn with(options: Options<'_>) -> Self {
        crate::needs_root();
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new()
            .prefix("nde-")
            .tempdir()
            .expect("a directory");
        for name in ["server", "data", "plugins", "tmp", "database"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        let place = options.state_in.map_or_else(|| dir.path(), Path::new);
        let state = tempfile::Builder::new().prefix("state-").tempdir_in(place);
        let state = state.expect("a directory");
        crate::install(&crate::driver(), &dir.path().join("plugins").join(LABEL));
        let mark = format!("t{}", crate::unique());
        let ports = Ports::free();
        config::write(dir.path(), state.path(), &ports, &mark, options);
        let mut agent = Self {
            marks: Marks::new(dir.path()).named(&mark),
            dir,
            state,
            mark,
            nomad: config::nomad(),
            api: Api { port: ports.client },
            server: None,
            client: None,
            left: false,
        };
        agent.start_server(Api { port: ports.http });
        agent.start();
        agent
    }

    /// The driver's state directory.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// A path in its directory.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Waits until the server has the key with which it signs what a client registers with: a client that comes earlier is rejected, and
    /// tries again only after a long delay.
    fn start_server(&mut self, api: Api) {
        self.server = Some(self.spawn("server"));
        self.wait_until("the server is not ready", || {
            let keys = api.call("GET", "/.well-known/jwks.json", None);
            keys.is_ok_and(|keys| keys["keys"].as_array().is_some_and(|keys| !keys.is_empty()))
        });
    }

    /// Starts the client agent, for the first time or again, and waits until the node is ready and the driver healthy.
    pub fn start(&mut self) {
        self.client = Some(self.spawn("client"));
        self.wait_until("the client is not ready", || self.ready());
    }

    fn wait_until(&self, otherwise: &str, is_so: impl Fn() -> bool) {
        let emulated = std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_EMULATED").is_some();
        let slower = if emulated { EMULATED } else { 1 };
        let end = Instant::now() + slower * DEADLINE;
        while !is_so() {
            assert!(Instant::now() < end, "{otherwise}:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn spawn(&self, name: &str) -> Child {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.join(format!("{name}.log")))
            .expect("the agent's log");
        Command::new(&self.nomad)
            .args(["agent", "-config"])
            .arg(self.join(format!("{name}.hcl")))
            .env("TMPDIR", self.join("tmp"))
            .env_remove("NOMAD_ADDR")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the agent's log"))
            .stderr(log)
            .spawn()
            .expect("the agent starts")
    }

    fn ready(&self) -> bool {
        let Ok(nodes) = self.call("GET", "/v1/nodes", None) else {
            return false;
        };
        let ready = nodes[0]["Status"] == "ready";
        ready && nodes[0]["Drivers"]["nspawn"]["Healthy"] == true
    }

    /// Kills the client agent, as in a crash. Plugins and tasks keep running.
    pub fn kill(&mut self) {
        let mut process = self.client.take().expect("the agent runs");
        process.kill().expect("it is killed");
        process.wait().expect("it has ended");
    }

    /// Stops the client agent gracefully. Tasks keep running, plugins exit.
    pub fn stop(&mut self) {
        interrupt(self.client.take());
    }

    /// The plugin process: the agent's child that runs the driver.
    pub fn plugin(&self) -> i32 {
        let driver = self.join("plugins").join(LABEL);
        until("the plugin", || {
            self.marks.processes().into_iter().find_map(|found| {
                let words = found.command.trim_end();
                (words == driver.to_string_lossy()).then_some(found.pid)
            })
        })
    }

    /// The sockets of the driver's plugins, without those of Nomad's own log collectors, which a killed agent leaves.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let mut all = files(&self.join("tmp"));
        all.retain(|path| path.to_string_lossy().contains("nspawn"));
        all
    }

    /// One call of the HTTP API. The error contains the status line and the body of the response.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        self.api.call(method, path, body)
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        self.call("GET", path, None).expect("an answer")
    }

    /// Runs a job file with these variables and returns its only allocation once it exists. The names of job and task get the agent's mark.
    pub fn run(&self, file: &Path, variables: &[(&str, &str)]) -> Allocation<'_> {
        let text =
            fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let variables: String = variables
            .iter()
            .map(|(name, value)| format!("{name} = {}\n", json!(value)))
            .collect();
        let request = json!({ "JobHCL": text, "Variables": variables, "Canonicalize": true });
        let mut job = self
            .call("POST", "/v1/jobs/parse", Some(&request))
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let id = format!("{}-{}", job["ID"].as_str().expect("an id"), crate::unique());
        job["ID"] = json!(id);
        let task = format!("{}-{}", self.mark, crate::unique());
        job["TaskGroups"][0]["Tasks"][0]["Name"] = json!(task);
        let request = json!({ "Job": job });
        self.call("POST", "/v1/jobs", Some(&request))
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let allocation = until("the allocation", || {
            let found = self.get(&format!("/v1/job/{id}/allocations"));
            found[0]["ID"].as_str().map(str::to_owned)
        });
        Allocation {
            agent: self,
            id: allocation,
            job: id,
            task,
        }
    }

    /// The last lines of the logs of client and server.
    pub fn log_tail(&self) -> String {
        let tail = |name: &str, count: usize| {
            let text = fs::read(self.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(count)..].join("\n")
        };
        format!("{}\n{}", tail("client.log", 40), tail("server.log", 10))
    }

    /// Ends a test: stops all jobs, removes all allocations, stops the agent gracefully and checks that nothing is left.
    pub fn leave(mut self) {
        for job in self.get("/v1/jobs").as_array().expect("jobs") {
            let path = format!("/v1/job/{}", job["ID"].as_str().expect("an id"));
            self.call("DELETE", &path, None)
                .expect("the job is stopped");
        }
        until("the end of all tasks", || {
            let all = self.get("/v1/allocations");
            let running = ["pending", "running"];
            let alive = all.as_array()?.iter().any(|allocation| {
                running
                    .iter()
                    .any(|status| allocation["ClientStatus"] == *status)
            });
            (!alive).then_some(())
        });
        until("the removal of all allocations", || {
            self.call("GET", "/v1/client/gc", None)
                .expect("a collection");
            let left = fs::read_dir(self.join("data/alloc")).map_or(0, Iterator::count);
            (left == 0).then_some(())
        });
        self.stop();
        interrupt(self.server.take());
        self.marks.assert_none_left();
        let mut left = support::starts_in(self.state.path());
        left.extend(self.sockets());
        assert!(left.is_empty(), "left: {left:?}");
        self.left = true;
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for mut process in self.client.take().into_iter().chain(self.server.take()) {
                let _ = process.kill();
                let _ = process.wait();
            }
            self.marks.kill();
            self.unmount();
        } else {
            assert!(self.left, "the test has to end with Agent::leave");
        }
    }
}

impl Agent {
    /// For a failed test: Nomad mounts a tmpfs for the secrets of each task, and the network of each group.
    fn unmount(&self) {
        for allocation in fs::read_dir(self.join("data/alloc"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let network = Path::new("/run/netns").join(allocation.file_name());
            let _ = nix::mount::umount2(&network, nix::mount::MntFlags::MNT_DETACH);
            let _ = fs::remove_file(network);
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(self.dir.path())) {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Stops an agent gracefully.
fn interrupt(agent: Option<Child>) {
    let mut process = agent.expect("the agent runs");
    let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it is asked");
    until("the agent's end", || {
        process.try_wait().expect("its status")
    });
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the directory");
    entries.flatten().map(|entry| entry.path()).collect()
}
