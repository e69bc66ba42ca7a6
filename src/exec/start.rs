//! Starts a session: collects what it has to have in common with the container, and starts the program that enters it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nspawn_init::session_spec::{Confinement, Order, SESSION, SessionSpec};
use rustix::fs::{Mode, fchmod};
use tokio::net::unix::pipe;
use tokio::process::Command;

use super::filters::FilterCache;
use super::groups::SessionGroups;
use super::leader::{self, Seccomp};
use super::session::{Control, Session, Streams};
use super::terminal::Terminal;
use super::{End, ExecError, ExecRequest};
use crate::blocking;
use crate::container::{ExecDefaults, Started};
use crate::state::TaskDir;
use crate::supervisor::exec_defaults;
use crate::sys::process::ProcessHandle;

/// What a session needs besides the container.
#[derive(Debug)]
pub struct Host {
    /// The program of the container init, which sessions run in another mode.
    pub program: OwnedFd,
    /// The seccomp filters that are known.
    pub filters: Arc<FilterCache>,
    /// Whether commands may run without the seccomp filters of the task if these can't be read.
    pub unfiltered: bool,
}

/// Starts a command in a container, and returns when its streams are open. It may still fail to be executed.
pub async fn start(
    host: Host,
    started: &Started,
    request: ExecRequest,
) -> Result<Session, ExecError> {
    if request.command.is_empty() {
        return Err(ExecError::EmptyCommand);
    }
    let (program, container) = (host.program, started.clone());
    let task_dir = TaskDir::new(&started.state);
    // At the same time, because each takes a while: the program begins, and waits for its order.
    let launched = blocking::run(move || {
        let control = launch(&program)?;
        let defaults = exec_defaults::fetch(&task_dir);
        Ok::<_, ExecError>((control, defaults))
    });
    let prepared = blocking::run(move || Prepared::of(&container, &host.filters, host.unfiltered));
    let (launched, prepared) = tokio::join!(launched, prepared);
    let ((control, defaults), prepared) = (launched?, prepared?);
    let defaults = defaults.map_err(failed("asking the supervisor for the task's environment"))?;
    let order = match request.terminal {
        Some(_) => Order::Terminal,
        None => Order::Pipes,
    };
    let spec = prepared.spec(request, defaults.unwrap_or_default());
    let order = Ordered::new(control, order, &spec, prepared.leader.into())?;
    prepared.groups.hand_over();
    order.begin().await
}

/// The error of a step on the host. What no longer exists, or no such process, is the task.
fn failed(step: &'static str) -> impl FnOnce(io::Error) -> ExecError {
    move |source| match source.kind() {
        io::ErrorKind::NotFound => ExecError::NotRunning,
        _ if source.raw_os_error() == Some(nix::libc::ESRCH) => ExecError::NotRunning,
        _ => ExecError::Host { step, source },
    }
}

/// What a session takes over from the container's first process, and the cgroups that were made for it.
struct Prepared {
    leader: ProcessHandle,
    confinement: Confinement,
    environment: BTreeMap<String, String>,
    groups: SessionGroups,
}

impl Prepared {
    /// Blocks.
    fn of(started: &Started, filters: &FilterCache, unfiltered: bool) -> Result<Self, ExecError> {
        let leader = ProcessHandle::open_checked(started.leader);
        let leader = leader.map_err(failed("finding the task"))?;
        leader::wait_for_program(&leader).map_err(failed("waiting for the task's program"))?;
        let confinement = leader::confinement(&leader, started.mode);
        let (mut confinement, seccomp) =
            confinement.map_err(failed("reading the restrictions of the task"))?;
        let seccomp = started.filters.map_or(seccomp, Seccomp::installed);
        confinement.filters = filters.get(&leader, seccomp, unfiltered)?.to_vec();
        let environment = leader::environment(&leader);
        let environment = environment.map_err(failed("reading the environment of the task"))?;
        let groups = SessionGroups::create(started, &leader);
        Ok(Self {
            confinement,
            environment,
            groups: groups.map_err(failed("making the cgroup of the session"))?,
            leader,
        })
    }

    fn spec(&self, request: ExecRequest, defaults: ExecDefaults) -> SessionSpec {
        SessionSpec {
            environment: environment(self.environment.clone(), &defaults, &request),
            command: request.command,
            directory: request
                .directory
                .or(defaults.directory)
                .unwrap_or_else(|| "/".to_owned()),
            user: request.user.or(defaults.user),
            size: request.terminal.unwrap_or_default(),
            cgroups: self.groups.cgroups().clone(),
            confinement: self.confinement.clone(),
        }
    }
}

/// What systemd-nspawn has set, the task's own variables over it, and those of the request over both.
fn environment(
    mut environment: BTreeMap<String, String>,
    defaults: &ExecDefaults,
    request: &ExecRequest,
) -> BTreeMap<String, String> {
    if request.user.is_some() {
        // Those of the task's user. The session sets those of its own.
        for name in ["HOME", "USER", "LOGNAME", "SHELL"] {
            environment.remove(name);
        }
    }
    if request.terminal.is_some() {
        environment.insert("TERM".to_owned(), "xterm".to_owned());
    }
    for variables in [&defaults.environment, &request.environment] {
        let variables = variables.iter();
        environment.extend(variables.map(|(name, value)| (name.clone(), value.clone())));
    }
    environment
}

/// The path through which the program is executed, in the process that executes it.
fn path_of(program: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", program.as_raw_fd())
}

/// Starts the program. Blocks, but must be called within a tokio runtime.
#[expect(clippy::disallowed_methods, reason = "a session is a process")]
fn launch(program: &OwnedFd) -> Result<Control, ExecError> {
    let host = |step| move |source: io::Error| ExecError::Host { step, source };
    let (channel, theirs) = packets::pair().map_err(host("making the channel"))?;
    let mut command = Command::new(path_of(program));
    command
        .arg0("nspawn-init")
        .arg(SESSION)
        .env_clear()
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(host("starting the session"))?;
    // `command` still holds the other end of the channel.
    drop(command);
    let (exited, gone) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let _ = child.wait().await;
        drop(exited);
    });
    let gone = async move { drop(gone.await as Result<(), _>) };
    Control::new(channel, gone).map_err(host("watching the channel"))
}

/// A program that waits for its order, and the order.
struct Ordered {
    control: Control,
    order: Order,
    /// The spec, the leader, and without a terminal the command's ends of the pipes.
    descriptors: Vec<OwnedFd>,
    /// The plugin's ends of the pipes.
    pipes: Option<[OwnedFd; 3]>,
}

impl Ordered {
    fn new(
        control: Control,
        order: Order,
        spec: &SessionSpec,
        leader: OwnedFd,
    ) -> Result<Self, ExecError> {
        let host = |step| move |source: io::Error| ExecError::Host { step, source };
        let spec = memory_file(&packets::encode(spec)).map_err(host("writing the session spec"))?;
        let mut descriptors = vec![spec, leader];
        let pipes = match order {
            Order::Pipes => {
                let (ours, theirs) = pipes().map_err(host("making pipes"))?;
                descriptors.extend(theirs);
                Some(ours)
            }
            Order::Terminal => None,
        };
        Ok(Self {
            control,
            order,
            descriptors,
            pipes,
        })
    }

    /// Sends the order, and waits for the terminal if there is one.
    async fn begin(mut self) -> Result<Session, ExecError> {
        let host = |step| move |source: io::Error| ExecError::Host { step, source };
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let order = packets::encode(&self.order);
        let sent = self.control.send(&order, &descriptors).await;
        sent.map_err(host("starting the session"))?;
        // The command has them now, and copies would keep the end of the streams from being seen.
        self.descriptors.clear();
        let streams = match self.pipes {
            Some([stdin, stdout, stderr]) => Streams::Pipes {
                stdin: pipe::Sender::from_owned_fd(stdin).map_err(host("watching stdin"))?,
                stdout: pipe::Receiver::from_owned_fd(stdout).map_err(host("watching stdout"))?,
                stderr: pipe::Receiver::from_owned_fd(stderr).map_err(host("watching stderr"))?,
            },
            None => match self.control.terminal().await {
                Ok(master) => {
                    let terminal = Terminal::new(master);
                    Streams::Terminal(terminal.map_err(host("opening the terminal"))?)
                }
                Err(End::NotRun(start_error)) => return Err(ExecError::NotRun(start_error)),
                Err(_) => return Err(ExecError::Lost),
            },
        };
        Ok(Session {
            streams,
            control: self.control,
        })
    }
}

/// A file in memory, which has no name. Only the session reads it.
fn memory_file(content: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Write;
    let memory = memfd_create(c"nspawn-session", MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(memory);
    file.write_all(content)?;
    Ok(file.into())
}

/// Stdin, stdout and stderr: the plugin's ends, which do not block, and the command's. Programs open `/dev/stdout` and the like by name,
/// as any user and in any user namespace; nobody else can get at a pipe that has no name.
fn pipes() -> io::Result<([OwnedFd; 3], [OwnedFd; 3])> {
    let pair = || -> io::Result<(OwnedFd, OwnedFd)> {
        let (read, write) = io::pipe()?;
        let (read, write) = (OwnedFd::from(read), OwnedFd::from(write));
        fchmod(&read, Mode::from_raw_mode(0o666))?;
        Ok((read, write))
    };
    let (their_stdin, stdin) = pair()?;
    let (stdout, their_stdout) = pair()?;
    let (stderr, their_stderr) = pair()?;
    for ours in [&stdin, &stdout, &stderr] {
        rustix::io::ioctl_fionbio(ours, true)?;
    }
    Ok((
        [stdin, stdout, stderr],
        [their_stdin, their_stdout, their_stderr],
    ))
}
