//! One plugin process, or the connection to one that was started elsewhere: launch, handshake, clients, shutdown.
//! Follows the protocol of Nomad's agent in order and deadlines. The only signal it ever sends is SIGKILL.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;

use super::error::HostError;
use super::handshake;
use nomad_proto::base::base_plugin_client::BasePluginClient;
use nomad_proto::driver::driver_client::DriverClient;
use nomad_proto::plugin::grpc_controller_client::GrpcControllerClient;
use nomad_proto::{driver, plugin as wire};

/// How long Nomad waits for the handshake line.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long Nomad waits for a plugin to exit after a shutdown request.
pub const GRACE: Duration = Duration::from_secs(2);

const MESSAGE_LIMIT: usize = i32::MAX as usize;
const LAST_WORDS: usize = 10;
/// A longer line of the log is split into pieces, as in Nomad; without this limit a plugin could fill our memory.
const LINE: usize = 64 * 1024;
/// How many bytes of stdout after the handshake are kept: there should never be any.
const STRAY: usize = 64 * 1024;

/// How to start a plugin.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// Its arguments; Nomad passes those of the agent's `plugin` block.
    pub args: Vec<OsString>,
    /// Changes to the environment, applied after Nomad's own variables were added; `None` removes a variable.
    pub environment: BTreeMap<OsString, Option<OsString>>,
    /// Receives the raw lines of the plugin's stderr; without it they are discarded.
    pub log: Option<mpsc::UnboundedSender<String>>,
    /// The time limit for the handshake line.
    pub start_timeout: Duration,
    /// How long the plugin may take to exit after a shutdown request.
    pub grace: Duration,
    /// Whether the plugin runs in a process group of its own, so that a terminal's signals do not reach it, with a pipe
    /// as standard input that is closed when this process exits. When its [`Plugin`] is dropped, such a plugin shuts
    /// down by itself and is not killed.
    pub bound: bool,
}

impl Launch {
    /// Starts `binary` as Nomad does: no arguments, the environment of this process.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            args: Vec::new(),
            environment: BTreeMap::new(),
            log: None,
            start_timeout: START_TIMEOUT,
            grace: GRACE,
            bound: false,
        }
    }

    /// Sets this variable.
    #[must_use]
    pub fn set(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.insert(name.into(), Some(value.into()));
        self
    }

    /// Removes this variable.
    #[must_use]
    pub fn unset(mut self, name: impl Into<OsString>) -> Self {
        self.environment.insert(name.into(), None);
        self
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this is where plugins are started"
    )]
    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(&self.args)
            .envs(handshake::ENVIRONMENT)
            .stdin(Stdio::inherit())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(!self.bound);
        if self.bound {
            command.stdin(Stdio::piped()).process_group(0);
        }
        for (name, value) in &self.environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

/// The result of a shutdown.
#[derive(Debug)]
pub struct Stopped {
    /// The exit status; `None` for a plugin that this process did not start.
    pub status: Option<ExitStatus>,
    /// Whether it was still running after its [`grace`](Launch::grace) and had to be killed.
    pub killed: bool,
    /// The response to `Driver.Shutdown` if that was neither success nor "not implemented".
    pub driver_shutdown: Option<tonic::Status>,
}

/// A connection to a plugin, and its process. A process that was launched is killed when this value is dropped, unless
/// it is [`bound`](Launch::bound); one that was reattached to is not.
#[derive(Debug)]
pub struct Plugin {
    address: PathBuf,
    channel: Channel,
    process: Process,
    grace: Duration,
}

#[derive(Debug)]
enum Process {
    Own(Own),
    Found { pid: i32, pidfd: Arc<OwnedFd> },
}

impl Process {
    fn pidfd(&self) -> &Arc<OwnedFd> {
        match self {
            Self::Own(own) => &own.pidfd,
            Self::Found { pidfd, .. } => pidfd,
        }
    }
}

#[derive(Debug)]
struct Own {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    /// The exit status, once the process has been reaped.
    exit: watch::Receiver<Option<ExitStatus>>,
    stdout_open: watch::Receiver<bool>,
    stderr_open: watch::Receiver<bool>,
    stray: Arc<Mutex<Vec<u8>>>,
    /// The write end of a bound plugin's standard input. When it is closed, the plugin kills its tasks and exits.
    bound: Option<ChildStdin>,
}

impl Plugin {
    /// Starts a plugin, waits for its handshake and connects. After an error no process is left.
    pub async fn launch(launch: Launch) -> Result<Self, HostError> {
        let mut child = launch
            .command()
            .spawn()
            .map_err(|source| HostError::Spawn {
                binary: launch.binary.clone(),
                source,
            })?;
        let words = Arc::new(Mutex::new(VecDeque::new()));
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            unreachable!("both were asked for");
        };
        let stderr_open = read_log(stderr, launch.log.clone(), Arc::clone(&words));
        let mut stdout = BufReader::new(stdout);
        // Before anything can reap the process, so that the pid can't have been reused.
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let (pid, pidfd) = find(pid.unwrap_or(0))?;
        let mut line = String::new();
        let read = timeout(launch.start_timeout, stdout.read_line(&mut line)).await;
        let mut own = Own::watch(child, (pid, pidfd), stdout, stderr_open);
        let address = match read {
            Ok(Ok(0)) => Err("the plugin exited without a handshake line".to_owned()),
            Ok(Ok(_)) if !line.ends_with('\n') => Err(format!(
                "the plugin exited in the middle of the line {line:?}"
            )),
            Ok(Ok(_)) => handshake::read(&line),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "no handshake line within {} s",
                launch.start_timeout.as_secs_f64()
            )),
        };
        let address = match address {
            Ok(address) => address,
            Err(reason) => {
                let status = own.end(launch.grace).await;
                let stderr = lock(&words).iter().cloned().collect();
                let reason = format!("{reason} ({status})");
                return Err(HostError::Handshake { reason, stderr });
            }
        };
        match connect(&address).await {
            Ok(channel) => Ok(Self {
                address,
                channel,
                process: Process::Own(own),
                grace: launch.grace,
            }),
            Err(error) => {
                own.end(Duration::ZERO).await;
                Err(error)
            }
        }
    }

    /// Connects to a plugin that is already running, as a restarted agent does.
    pub async fn reattach(address: &Path, pid: i32) -> Result<Self, HostError> {
        let (pid, pidfd) = find(pid)?;
        Ok(Self {
            channel: connect(address).await?,
            address: address.to_owned(),
            process: Process::Found { pid, pidfd },
            grace: GRACE,
        })
    }

    /// The process id of the plugin.
    pub fn pid(&self) -> i32 {
        match &self.process {
            Process::Own(own) => own.pid,
            Process::Found { pid, .. } => *pid,
        }
    }

    /// The path of its socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// A client of the base service.
    pub fn base(&self) -> BasePluginClient<Channel> {
        BasePluginClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT)
    }

    /// A client of the driver service.
    pub fn driver(&self) -> DriverClient<Channel> {
        DriverClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT)
    }

    /// A client of go-plugin's controller service.
    pub fn controller(&self) -> GrpcControllerClient<Channel> {
        GrpcControllerClient::new(self.channel.clone())
    }

    /// A client of the health service.
    pub fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    /// The bare connection, for services without a client here.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// What the plugin wrote to stdout after the handshake, which should be nothing. Empty for a plugin that was
    /// reattached to.
    pub fn stray_stdout(&self) -> Vec<u8> {
        match &self.process {
            Process::Own(own) => lock(&own.stray).clone(),
            Process::Found { .. } => Vec::new(),
        }
    }

    /// Whether the process is known to have exited.
    pub fn has_exited(&self) -> bool {
        match &self.process {
            Process::Own(own) => own.exit.borrow().is_some(),
            Process::Found { pidfd, .. } => readable(pidfd, Duration::ZERO),
        }
    }

    /// Waits until the process is gone in Nomad's sense: reaped, and its stdout and stderr closed by every process that
    /// holds them. Returns its exit status, or `None` for a plugin that was reattached to.
    pub async fn gone(&mut self) -> Option<ExitStatus> {
        match &mut self.process {
            Process::Own(own) => own.gone().await,
            Process::Found { pidfd, .. } => {
                while !wait_readable(pidfd, Duration::from_millis(250)).await {}
                None
            }
        }
    }

    /// Kills the process with SIGKILL, like a crash, and returns when it is gone.
    pub async fn kill(&mut self) -> Option<ExitStatus> {
        self.strike();
        self.gone().await
    }

    /// Requests a shutdown as Nomad does, and kills the plugin if it is not gone after its [`grace`](Launch::grace). Tasks
    /// are not affected.
    pub async fn shutdown(mut self) -> Stopped {
        let mut request = tonic::Request::new(driver::ShutdownRequest {});
        request.set_timeout(self.grace);
        let driver_shutdown = match timeout(self.grace, self.driver().shutdown(request)).await {
            Ok(Ok(_)) => None,
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => None,
            Ok(Err(status)) => Some(status),
            Err(_) => {
                let text = format!("no answer within {} s", self.grace.as_secs_f64());
                Some(tonic::Status::deadline_exceeded(text))
            }
        };
        // The plugin may exit before it has sent the response, so the result is ignored.
        let asked = self.controller().shutdown(wire::Empty {}).await;
        drop(asked);
        let gone = timeout(self.grace, self.gone()).await;
        let killed = gone.is_err();
        let status = match gone {
            Ok(status) => status,
            Err(_) => self.kill_reaped().await,
        };
        Stopped {
            status,
            killed,
            driver_shutdown,
        }
    }

    /// Kills the process and waits for it alone, because a process that inherited its stderr may keep that open
    /// indefinitely.
    async fn kill_reaped(&mut self) -> Option<ExitStatus> {
        self.strike();
        match &mut self.process {
            Process::Own(own) => own.reaped().await,
            Process::Found { .. } => self.gone().await,
        }
    }

    fn strike(&self) {
        strike(self.process.pidfd());
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if self.bound.is_none() && self.exit.borrow().is_none() {
            strike(&self.pidfd);
        }
    }
}

impl Own {
    fn watch(
        mut child: Child,
        (pid, pidfd): (i32, Arc<OwnedFd>),
        stdout: impl AsyncRead + Unpin + Send + 'static,
        stderr_open: watch::Receiver<bool>,
    ) -> Self {
        let stray = Arc::new(Mutex::new(Vec::new()));
        let bound = child.stdin.take();
        let stdout_open = read_stray(stdout, Arc::clone(&stray));
        let (exit_sender, exit) = watch::channel(None);
        tokio::spawn(async move { exit_sender.send_replace(child.wait().await.ok()) });
        Self {
            pid,
            pidfd,
            exit,
            stdout_open,
            stderr_open,
            stray,
            bound,
        }
    }

    async fn reaped(&mut self) -> Option<ExitStatus> {
        // An error means that the task that waits for the child has ended, and it sends the status before it ends.
        drop(self.exit.wait_for(Option::is_some).await);
        *self.exit.borrow()
    }

    async fn gone(&mut self) -> Option<ExitStatus> {
        drop(self.stdout_open.wait_for(|open| !open).await);
        drop(self.stderr_open.wait_for(|open| !open).await);
        self.reaped().await
    }

    /// Gives a useless process a short time to exit by itself, so that its own exit status is seen, then kills it.
    async fn end(&mut self, grace: Duration) -> String {
        if timeout(grace, self.gone()).await.is_err() {
            strike(&self.pidfd);
            self.reaped().await;
            return "killed".to_owned();
        }
        let status = *self.exit.borrow();
        status.map_or_else(|| "status unknown".to_owned(), |status| status.to_string())
    }
}

async fn connect(address: &Path) -> Result<Channel, HostError> {
    let path = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://unused")
        // As in Go, where output that is not read delays no other call.
        .initial_connection_window_size((1 << 31) - 1)
        .connect_with_connector(connector)
        .await
        .map_err(|source| HostError::Connect {
            address: address.to_owned(),
            source,
        })
}

/// Passes on the lines of the plugin's stderr until every process that holds it has closed it.
fn read_log(
    stderr: impl AsyncRead + Unpin + Send + 'static,
    log: Option<mpsc::UnboundedSender<String>>,
    words: Arc<Mutex<VecDeque<String>>>,
) -> watch::Receiver<bool> {
    let (open, receiver) = watch::channel(true);
    tokio::spawn(async move {
        let mut stderr = BufReader::new(stderr);
        let mut line = Vec::new();
        loop {
            let mut piece = (&mut stderr).take(LINE as u64);
            if !matches!(piece.read_until(b'\n', &mut line).await, Ok(1..)) {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\r', '\n']).to_owned();
            {
                let mut words = lock(&words);
                if words.len() == LAST_WORDS {
                    words.pop_front();
                }
                words.push_back(text.clone());
            }
            if let Some(log) = &log {
                // If the receiver is gone, keep reading, because the pipe must be emptied.
                drop(log.send(text));
            }
            line.clear();
        }
        open.send_replace(false);
    });
    receiver
}

/// Reads stdout for as long as it is open, as Nomad does, and keeps the first [`STRAY`] bytes.
fn read_stray(
    mut stdout: impl AsyncRead + Unpin + Send + 'static,
    stray: Arc<Mutex<Vec<u8>>>,
) -> watch::Receiver<bool> {
    let (open, receiver) = watch::channel(true);
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stdout.read(&mut buffer).await {
            let mut stray = lock(&stray);
            let room = STRAY.saturating_sub(stray.len());
            stray.extend_from_slice(&buffer[..n.min(room)]);
        }
        open.send_replace(false);
    });
    receiver
}

/// Opens a process by its pid; from then on pid reuse does no harm.
fn find(pid: i32) -> Result<(i32, Arc<OwnedFd>), HostError> {
    let open = |pid| {
        pidfd_open(
            Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?,
            PidfdFlags::empty(),
        )
    };
    match open(pid) {
        Ok(pidfd) => Ok((pid, Arc::new(pidfd))),
        Err(errno) => Err(HostError::io("find the process", format!("/proc/{pid}"))(
            errno.into(),
        )),
    }
}

fn strike(pidfd: &OwnedFd) {
    // An error means that the process has already exited.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}

fn readable(pidfd: &OwnedFd, wait: Duration) -> bool {
    use std::os::fd::AsFd;
    let start = Instant::now();
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        let left = wait.saturating_sub(start.elapsed());
        match poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        ) {
            // SIGCHLD, which tokio handles, may have been delivered to this thread.
            Err(nix::Error::EINTR) => {}
            ready => return matches!(ready, Ok(1..)),
        }
    }
}

/// Waits for a process that is not our child. Tokio has no safe way to await a foreign descriptor, so a thread does.
async fn wait_readable(pidfd: &Arc<OwnedFd>, wait: Duration) -> bool {
    let pidfd = Arc::clone(pidfd);
    tokio::task::spawn_blocking(move || readable(&pidfd, wait))
        .await
        .unwrap_or(false)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "plugin_tests.rs"]
mod tests;
