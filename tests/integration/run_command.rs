//! The `run` command as a separate process: how a test starts it, signals it and checks what it leaves.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

use crate::harness::{Host, Written, eventually, is_root, within};

/// A job file with one task that runs this shell script.
pub(crate) fn job(host: &Host, script: &str, kill_timeout: Duration) -> String {
    job_with(host, &json!(["/bin/sh", "-c", script]), kill_timeout)
}

/// The same with any command.
pub(crate) fn job_with(host: &Host, command: &Value, kill_timeout: Duration) -> String {
    format!(
        "job \"j\" {{\n task \"web\" {{\n driver = \"nspawn\"\n kill_signal = \"SIGTERM\"\n kill_timeout = \"{}ms\"\n \
         config {{\n image = {}\n boot = false\n user_namespacing = false\n command = {command}\n }}\n }}\n}}\n",
        kill_timeout.as_millis(),
        json!(host.root()),
    )
}

/// The parameters of a `run`; [`start`](Self::start) starts it.
#[derive(Debug)]
pub(crate) struct RunCommand<'a> {
    host: &'a Host,
    command: Command,
}

impl<'a> RunCommand<'a> {
    /// `run job.hcl` with the fake systemd-nspawn, in a process group of its own.
    pub(crate) fn new(host: &'a Host, job: &str) -> Self {
        fs::write(host.join("job.hcl"), job).unwrap();
        Self::with_program(
            host,
            env!("CARGO_BIN_EXE_nomad-driver-nspawn"),
            &["run", "job.hcl"],
        )
    }

    /// Any program that execs `run`.
    pub(crate) fn with_program(host: &'a Host, program: &str, args: &[&str]) -> Self {
        let config = json!({ "nspawn_path": host.join("bin/systemd-nspawn") });
        fs::write(host.join("plugin.json"), config.to_string()).unwrap();
        let mut command = Command::new(program);
        command
            .args(args)
            .args(["--plugin-config", "plugin.json"])
            .current_dir(host.path())
            .env("TMPDIR", host.path())
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", host.join("bin").display()),
            )
            .env_remove("NOMAD_PLUGIN_MAGIC_COOKIE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        Self { host, command }
    }

    /// With this state directory in place of the one that `run` creates.
    pub(crate) fn state_dir(self, path: &Path) -> Self {
        let file = self.host.join("plugin.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["state_dir"] = json!(path);
        fs::write(file, config.to_string()).unwrap();
        self
    }

    /// With this variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// With a pipe as stdin.
    pub(crate) fn piped_stdin(mut self) -> Self {
        self.command.stdin(Stdio::piped());
        self
    }

    /// Starts it.
    pub(crate) fn start(mut self) -> Run<'a> {
        let mut child = self.command.spawn().unwrap();
        let stderr = Written::default();
        let collecting = tokio::spawn(collect(child.stderr.take().unwrap(), stderr.clone()));
        Run {
            host: self.host,
            pid: i32::try_from(child.id().unwrap()).unwrap(),
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            child,
            stderr,
            collecting: Some(collecting),
        }
    }
}

async fn collect(mut from: impl AsyncRead + Unpin, mut to: Written) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        to.write_all(&buffer[..n]).unwrap();
    }
}

/// A started `run`.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    host: &'a Host,
    pid: i32,
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    /// The output that has not been read yet.
    pub(crate) stdout: Option<ChildStdout>,
    pub(crate) stderr: Written,
    collecting: Option<JoinHandle<()>>,
}

impl Run<'_> {
    /// Waits until the task has printed this, and reads no further than needed.
    pub(crate) async fn prints(&mut self, text: &str) {
        let stdout = self.stdout.as_mut().unwrap();
        let mut seen = String::new();
        let read = async {
            while !seen.contains(text) {
                let mut buffer = [0; 64];
                let n = stdout.read(&mut buffer).await.unwrap();
                assert_ne!(n, 0, "the output ended: {seen:?}; {}", self.stderr.text());
                seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        };
        within(text, read).await;
    }

    /// Its pid, which is also its process group.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).unwrap();
    }

    pub(crate) fn signal_group(&self, signal: Signal) {
        kill(Pid::from_raw(-self.pid), signal).unwrap();
    }

    /// The plugin that it has started: its only child.
    pub(crate) fn plugin(&self) -> Pid {
        let parent = |pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let (_, rest) = stat.rsplit_once(") ")?;
            rest.split(' ').nth(1)?.parse::<i32>().ok()
        };
        let mut children = self.host.processes();
        children.retain(|one| parent(one.pid) == Some(self.pid));
        assert_eq!(children.len(), 1, "{children:?}");
        Pid::from_raw(children[0].pid)
    }

    /// Waits for its exit and the end of its stderr; returns its status.
    pub(crate) async fn ends(&mut self) -> ExitStatus {
        let status = within("the end of run", self.child.wait()).await.unwrap();
        if let Some(collecting) = self.collecting.take() {
            within("the end of its stderr", collecting).await.unwrap();
        }
        status
    }

    /// Waits for its exit, which must have this code, and checks that nothing is left.
    pub(crate) async fn ends_with(&mut self, code: i32) {
        let status = self.ends().await;
        assert_eq!(
            (status.code(), status.signal()),
            (Some(code), None),
            "{}",
            self.stderr.text()
        );
        self.leaves_nothing().await;
    }

    /// Waits until none of its processes and files is left.
    pub(crate) async fn leaves_nothing(&self) {
        self.host.quiet(&[]).await;
        eventually("its directories are gone", || {
            directories(self.host).is_empty()
        })
        .await;
    }
}

/// The directories in which a `run` keeps its files.
fn directories(host: &Host) -> Vec<String> {
    fs::read_dir(host.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("nomad-driver-nspawn-"))
        .collect()
}

/// Without root no task is started, and the run reports that.
pub(crate) async fn refused_without_root(run: &mut Run<'_>) -> bool {
    if is_root() {
        return false;
    }
    run.ends_with(125).await;
    let text = run.stderr.text();
    assert!(text.contains("Driver must run as root"), "{text}");
    true
}
