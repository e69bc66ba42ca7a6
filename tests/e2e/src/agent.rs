//! A real Nomad agent, server and client in one, with the driver in its plugin directory: the environment of the tests of tier (b). Listens
//! on 127.0.0.1 only. Its names contain the agent's mark, and [`Agent::leave`] fails the test if anything with the mark is left.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::leftovers::Marks;
use crate::{DEADLINE, until};

/// A new node that is not ready after this time has stalled: it registered before its server had keys and is in a long backoff.
const STALLED: Duration = Duration::from_secs(8);
const LABEL: &str = "nomad-driver-nspawn";

/// One agent.
#[derive(Debug)]
pub struct Agent {
    dir: TempDir,
    marks: Marks,
    mark: String,
    nomad: PathBuf,
    ports: [u16; 3],
    process: Option<Child>,
    left: bool,
    level: &'static str,
}

impl Agent {
    /// An agent that is ready to run tasks of the driver.
    pub fn new() -> Self {
        Self::logging("DEBUG")
    }

    /// The same with this log level.
    pub fn logging(level: &'static str) -> Self {
        crate::needs_root();
        // Short, because it contains sockets and their paths are limited.
        let dir = tempfile::Builder::new()
            .prefix("nde-")
            .tempdir()
            .expect("a directory");
        for name in ["data", "plugins", "state", "tmp"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        fs::copy(crate::driver(), dir.path().join("plugins").join(LABEL))
            .expect("a copy of the driver");
        let mark = format!("t{}", crate::unique());
        let mut agent = Self {
            marks: Marks::new(dir.path()).named(&mark),
            dir,
            mark,
            nomad: nomad(),
            ports: free_ports(),
            process: None,
            left: false,
            level,
        };
        fs::write(agent.join("agent.hcl"), agent.config()).expect("the configuration");
        agent.start();
        agent
    }

    /// A path in its directory.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
    }

    fn config(&self) -> String {
        let dir = self.dir.path().display();
        let [http, rpc, serf] = self.ports;
        format!(
            r#"
data_dir             = "{dir}/data"
plugin_dir           = "{dir}/plugins"
bind_addr            = "127.0.0.1"
name                 = "{mark}"
log_level            = "{level}"
disable_update_check = true
ports {{
  http = {http}
  rpc  = {rpc}
  serf = {serf}
}}
advertise {{
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}}
server {{
  enabled          = true
  bootstrap_expect = 1
  raft_multiplier  = 1
}}
client {{
  enabled           = true
  cpu_total_compute = 10000
  memory_total_mb   = 8000
  network_interface = "lo"
  # By default the agent removes the logs of allocations that have ended as soon as 80 % of the disk are used, before the test has read them.
  gc_disk_usage_threshold  = 100
  gc_inode_usage_threshold = 100
  options = {{
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,consul,vault"
    "driver.denylist"      = "docker,java,qemu,exec,raw_exec"
  }}
}}
plugin "{LABEL}" {{
  config {{
    state_dir = "{dir}/state"
  }}
}}
"#,
            mark = self.mark,
            level = self.level,
        )
    }

    /// Starts the agent, for the first time or again, and waits until the node is ready and the driver healthy.
    pub fn start(&mut self) {
        let end = Instant::now() + DEADLINE;
        loop {
            self.spawn();
            let fresh = !self.join("data/server/raft/raft.db").exists();
            let patience = if fresh { STALLED } else { 2 * STALLED };
            let stalled = Instant::now() + patience;
            while Instant::now() < stalled {
                if self.ready() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(
                Instant::now() < end,
                "the agent is not ready:\n{}",
                self.log_tail()
            );
            self.kill();
        }
    }

    fn spawn(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.join("agent.log"))
            .expect("the agent's log");
        let process = Command::new(&self.nomad)
            .args(["agent", "-config"])
            .arg(self.join("agent.hcl"))
            .env("TMPDIR", self.join("tmp"))
            .env_remove("NOMAD_ADDR")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the agent's log"))
            .stderr(log)
            .spawn()
            .expect("the agent starts");
        self.process = Some(process);
    }

    fn ready(&self) -> bool {
        let Ok(nodes) = self.call("GET", "/v1/nodes", None) else {
            return false;
        };
        let ready = nodes[0]["Status"] == "ready";
        ready && nodes[0]["Drivers"]["nspawn"]["Healthy"] == true
    }

    /// Kills the agent, as in a crash. Plugins and tasks keep running.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the agent runs");
        process.kill().expect("it is killed");
        process.wait().expect("it has ended");
    }

    /// Stops the agent gracefully. Tasks keep running, plugins exit.
    pub fn stop(&mut self) {
        let mut process = self.process.take().expect("the agent runs");
        let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it is asked");
        until("the agent's end", || {
            process.try_wait().expect("its status")
        });
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
        let answer = self.raw(method, path, body).map_err(|e| e.to_string())?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.lines().next().unwrap_or_default();
        if !status.contains(" 200 ") {
            return Err(format!("{method} {path}: {status}: {body}"));
        }
        if body.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(body).map_err(|error| format!("{method} {path}: {error}: {body}"))
    }

    fn raw(&self, method: &str, path: &str, body: Option<&Value>) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[0]))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0, so that the response is not chunked and ends with the connection.
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
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

    /// The last lines of the agent's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.join("agent.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
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
        self.marks.assert_none_left();
        let mut left = files(&self.join("state"));
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
            self.marks.kill();
            if let Some(mut process) = self.process.take() {
                let _ = process.kill();
                let _ = process.wait();
            }
            self.unmount();
        } else {
            assert!(self.left, "the test has to end with Agent::leave");
        }
    }
}

impl Agent {
    /// For a failed test: Nomad mounts a tmpfs for the secrets of each task.
    fn unmount(&self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(self.dir.path())) {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// One allocation with one task.
#[derive(Debug)]
pub struct Allocation<'a> {
    agent: &'a Agent,
    id: String,
    job: String,
    task: String,
}

/// An allocation without its agent, so that the agent can be killed and restarted in between.
#[derive(Debug, Clone)]
pub struct Name {
    id: String,
    job: String,
    task: String,
}

impl Allocation<'_> {
    /// Drops the reference to the agent.
    pub fn name(&self) -> Name {
        Name {
            id: self.id.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
        }
    }
}

impl Name {
    /// The same allocation on its agent.
    pub fn on<'a>(&self, agent: &'a Agent) -> Allocation<'a> {
        Allocation {
            agent,
            id: self.id.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
        }
    }
}

impl Allocation<'_> {
    /// What the Nomad client reports about the task.
    pub fn task(&self) -> Value {
        let path = format!("/v1/allocation/{}", self.id);
        self.agent
            .call("GET", &path, None)
            .map_or(Value::Null, |mut reported| {
                reported["TaskStates"][&self.task].take()
            })
    }

    /// The task's directory on the host.
    pub fn dir(&self) -> PathBuf {
        self.agent
            .join("data/alloc")
            .join(&self.id)
            .join(&self.task)
    }

    /// Everything that the task has printed so far on `stdout` or `stderr`.
    pub fn output(&self, stream: &str) -> String {
        let logs = self
            .agent
            .join("data/alloc")
            .join(&self.id)
            .join("alloc/logs");
        (0..)
            .map(|number| fs::read(logs.join(format!("{}.{stream}.{number}", self.task))))
            .map_while(Result::ok)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    /// Waits until stdout contains this text and returns all of stdout.
    pub fn printed(&self, text: &str) -> String {
        self.explain(|| {
            until(text, || {
                Some(self.output("stdout")).filter(|all| all.contains(text))
            })
        })
    }

    /// Waits until the task is dead; returns the exit codes of all its runs, in order.
    pub fn dead(&self) -> Vec<i64> {
        let task = self.explain(|| {
            until("the task's end", || {
                Some(self.task()).filter(|task| task["State"] == "dead")
            })
        });
        exits(&task)
    }

    /// How many times the task was started.
    pub fn starts(&self) -> usize {
        let task = self.task();
        let events = task["Events"].as_array().cloned().unwrap_or_default();
        let started = |event: &&Value| event["Type"] == "Started";
        events.iter().filter(started).count()
    }

    /// The task's last event of this type.
    pub fn event(&self, kind: &str) -> Option<Value> {
        let task = self.task();
        let events = task["Events"].as_array()?;
        events.iter().rfind(|event| event["Type"] == kind).cloned()
    }

    /// Stops the job and waits for the task's exit.
    pub fn stop(&self) -> Vec<i64> {
        let path = format!("/v1/job/{}", self.job);
        self.agent.call("DELETE", &path, None).expect("a stop");
        self.dead()
    }

    /// `nomad alloc signal`. The agent rejects it until it has seen the start, and the command may be running before that.
    pub fn signal(&self, signal: &str) {
        until("the agent's word of the start", || {
            (self.task()["State"] == "running").then_some(())
        });
        let path = format!("/v1/client/allocation/{}/signal", self.id);
        let request = json!({ "Signal": signal, "Task": self.task });
        self.agent
            .call("PUT", &path, Some(&request))
            .expect("the signal is sent");
    }

    /// The pid of the container's PID 1 on the host.
    pub fn leader(&self) -> i64 {
        self.process("/started/leader/pid")
    }

    /// The pid of a process of the task, by its JSON pointer in the record of the start.
    pub fn process(&self, place: &str) -> i64 {
        let state = fs::read_dir(self.agent.join("state")).expect("the state directory");
        let mut found = state.flatten().filter_map(|entry| {
            let record = fs::read(entry.path().join("running")).ok()?;
            let record: Value = serde_json::from_slice(&record).ok()?;
            let id = record["started"]["id"].as_str()?;
            id.starts_with(&self.id)
                .then(|| record.pointer(place)?.as_i64())?
        });
        found.next().expect("a running container of the task")
    }

    /// Adds what Nomad knows to the panic of a failed wait.
    fn explain<T>(&self, wait: impl FnOnce() -> T) -> T {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(wait)) {
            Ok(found) => found,
            Err(panic) => {
                let reason = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                let task = self.task();
                let events: Vec<_> = task["Events"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|event| format!("{}: {}", event["Type"], event["DisplayMessage"]))
                    .collect();
                panic!(
                    "{reason}\ntask {}: {}\n{}\nstdout: {}\nstderr: {}\nagent's log:\n{}",
                    self.task,
                    task["State"],
                    events.join("\n"),
                    self.output("stdout"),
                    self.output("stderr"),
                    self.agent.log_tail()
                );
            }
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the directory");
    entries.flatten().map(|entry| entry.path()).collect()
}

fn exits(task: &Value) -> Vec<i64> {
    let events = task["Events"].as_array().cloned().unwrap_or_default();
    events
        .iter()
        .filter(|event| event["Type"] == "Terminated")
        .filter_map(|event| event["ExitCode"].as_i64())
        .collect()
}

/// The Nomad binary: `NOMAD_BIN`, or `nomad` in `PATH`.
fn nomad() -> PathBuf {
    if let Some(given) = std::env::var_os("NOMAD_BIN") {
        let given = PathBuf::from(given);
        assert!(given.is_file(), "NOMAD_BIN: {} is no file", given.display());
        return given;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("nomad"))
        .find(|path| path.is_file())
        .expect("no nomad along PATH: install Nomad or set NOMAD_BIN")
}

/// Ports that are free at the moment.
fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("its address").port())
}
