//! The one real backend: runs a supervisor and systemd-nspawn for every container. Completes the launch spec before anything is
//! started, so that a failed start has one undo step. Keeps nothing that can't be rebuilt from the state directory. Runs in the
//! plugin.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{BackendError, ContainerBackend, acquire, chain};
use crate::blocking;
use crate::cgroup::{Group, Layout};
use crate::cleanup;
use crate::cleanup::orphans::{self, SupervisorProcess};
use crate::container::{Cause, ContainerSpec, Exit, Network, Probe, Root, Started, Usage};
use crate::failpoint::{self, Failpoint};
use crate::nspawn::argv::{self, Target};
use crate::nspawn::ports::{self, Addresses};
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_host_error};
use crate::nspawn::version::{self, Feature};
use crate::nspawn::{idmap, ownership, probe, skeleton};
use crate::signal::Signal;
use crate::state::state_dir::StateDirError;
use crate::state::task_dir::{self, Running};
use crate::state::{LaunchSpec, Pid1, TaskDir, TaskLock, state_dir};
use crate::supervisor::{
    self, Action, REQUEST_TIMEOUT, StartFailure, StartStep, Status, SupervisorClient, client,
};
use crate::sys::kernel;

/// A start that takes longer than this is aborted. Copying a large ephemeral root takes minutes; nothing takes longer.
const START_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a recovery waits for the first status of a supervisor that was found. It comes within a millisecond.
const FIRST_STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// How long systemd-nspawn may take to report its version.
const ANSWER: Duration = Duration::from_secs(10);

/// How often to check whether a supervisor that can't be asked is gone.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// What an operator may configure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The state directory, for the task directories.
    pub state_dir: PathBuf,
    /// The systemd-nspawn to use; `None` searches `search`.
    pub nspawn: Option<PathBuf>,
    /// The value of `PATH`.
    pub search: OsString,
    /// The driver's own binary, which every supervisor runs too.
    pub binary: PathBuf,
}

/// Runs containers with systemd-nspawn.
#[derive(Debug)]
pub struct NspawnBackend {
    settings: Arc<Settings>,
    kernel: (u32, u32),
    clients: Mutex<HashMap<PathBuf, SupervisorClient>>,
    /// The locks of this backend's starts, until they are removed.
    locks: Mutex<HashMap<PathBuf, TaskLock>>,
    /// Paths in the state directory that were left alone and have been logged.
    pub(super) named: Mutex<BTreeSet<PathBuf>>,
    version: Arc<tokio::sync::Mutex<Option<(Program, u32)>>>,
    /// Allows one probe of the host at a time, so that probes that hang hold one thread, and not one thread each.
    probing: Arc<tokio::sync::Mutex<()>>,
    /// The binary of the container init: one for all containers, made when the first of them starts.
    first: Arc<OnceLock<OwnedFd>>,
    tracker: TaskTracker,
}

/// The program file for which the version was determined.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    inode: u64,
    changed: i64,
}

impl NspawnBackend {
    /// A backend with these settings. Touches nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings: Arc::new(settings),
            kernel: kernel::version(),
            clients: Mutex::default(),
            locks: Mutex::default(),
            named: Mutex::default(),
            version: Arc::default(),
            probing: Arc::default(),
            first: Arc::default(),
            tracker: TaskTracker::new(),
        }
    }

    /// The program and its version, which is queried again only when the file changes.
    async fn installed(&self) -> Result<(PathBuf, u32), NoVersion> {
        let version = Arc::clone(&self.version);
        let settings = Arc::clone(&self.settings);
        let question = async {
            let known = version.lock_owned().await;
            // The lock moves into the work, so that on a file system that hangs all queries hold one thread, and not one thread
            // each.
            let (mut known, look) = blocking::run(move || {
                let look = look(&settings, known.as_ref());
                (known, look)
            })
            .await;
            match look? {
                Look::Known(program, version) => Ok((program.path, version)),
                Look::Asked(program, asked) => {
                    let version = read_version(&program.path, *asked).await?;
                    *known = Some((program.clone(), version));
                    Ok((program.path, version))
                }
            }
        };
        let answer = tokio::time::timeout(ANSWER, question).await;
        answer.unwrap_or_else(|_| {
            let path = self.settings.nspawn.as_deref();
            let path = path.unwrap_or_else(|| Path::new("systemd-nspawn"));
            Err(NoVersion {
                cause: Cause::Resources,
                reason: format!(
                    "{} --version does not answer within {} s",
                    path.display(),
                    ANSWER.as_secs()
                ),
            })
        })
    }

    fn known(&self, task_dir: &TaskDir) -> Option<SupervisorClient> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.get(task_dir.path()).cloned()
    }

    fn remember(&self, task_dir: &TaskDir, client: SupervisorClient) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.insert(task_dir.path().to_owned(), client);
    }

    fn forget(&self, task_dir: &TaskDir) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.remove(task_dir.path());
        self.locks().remove(task_dir.path());
    }

    fn locks(&self) -> MutexGuard<'_, HashMap<PathBuf, TaskLock>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client for the container of a handle; connects again if necessary.
    async fn resolve(&self, started: &Started) -> Result<SupervisorClient, BackendError> {
        let lost = |reason: &str| lost(started, reason);
        let boot = kernel::boot_id().map_err(|source| {
            io_error(
                "reading",
                Path::new("/proc/sys/kernel/random/boot_id"),
                source,
            )
        })?;
        if boot != started.boot {
            return Err(lost("the host has been started anew since"));
        }
        // The handle names the task directory, because an operator may have configured another state directory since. So the
        // directory is verified.
        let task_dir = TaskDir::new(&started.state);
        let state_dir = started.state.parent().unwrap_or_else(|| Path::new("/"));
        if TaskDir::for_task(state_dir, &started.id) != task_dir {
            return Err(lost("its state lies in another one's place"));
        }
        if let Some(known) = self.known(&task_dir) {
            return Ok(known);
        }
        let (place, handle) = (task_dir.clone(), started.clone());
        let (lock, recorded) = blocking::run(move || recorded(&place, &handle)).await?;
        let attached = client::attach(&task_dir, &recorded, &self.tracker).await;
        let attached = attached
            .map_err(|source| io_error("connecting to", &task_dir.control_socket(), source))?;
        let client =
            attached.ok_or_else(|| lost("its supervisor is gone and has left no exit record"))?;
        self.remember(&task_dir, client.clone());
        self.locks().insert(task_dir.path().to_owned(), lock);
        Ok(client)
    }

    /// Creates and locks the task directory of a new start and writes its launch spec.
    async fn ordered(
        &self,
        spec: ContainerSpec,
        task_dir: &TaskDir,
        installed: (PathBuf, u32),
    ) -> Result<(), BackendError> {
        let place = task_dir.clone();
        let lock = blocking::run_start(move || TaskLock::create(&place)).await;
        let lock =
            lock.map_err(|source| io_error("making the directory", task_dir.path(), source))?;
        self.locks().insert(task_dir.path().to_owned(), lock);
        let (place, kernel) = (task_dir.clone(), self.kernel);
        blocking::run_start(move || prepare(&spec, &place, installed, kernel)).await
    }

    async fn launch_supervisor(&self, task_dir: &TaskDir) -> Result<Started, StartFailure> {
        let failed = |error: io::Error| {
            let reason = format!("its supervisor can't be started: {error}");
            StartFailure::new(StartStep::Watch, cause_of_host_error(&error), reason)
        };
        let (settings, tracker) = (Arc::clone(&self.settings), self.tracker.clone());
        let (first, place) = (Arc::clone(&self.first), task_dir.clone());
        let launched = blocking::run_start(move || {
            failpoint::hit(&place, Failpoint::OrderWritten);
            let program = init_binary(&first, &settings.state_dir)?;
            client::launch(&settings.binary, &place, program, &tracker)
        });
        let client = launched.await.map_err(failed)?;
        self.remember(task_dir, client.clone());
        match tokio::time::timeout(START_TIMEOUT, client.start_outcome()).await {
            Ok(Status::Up(started)) => Ok((*started).clone()),
            Ok(Status::Failed(failure)) => Err((*failure).clone()),
            // The command exited before the event of its start was read.
            Ok(Status::Ended(_)) => {
                let place = task_dir.clone();
                let running = blocking::run(move || place.running()).await;
                running.map(|running| running.started).map_err(failed)
            }
            Ok(Status::Starting) => Err(StartFailure::new(
                StartStep::Watch,
                Cause::Unknown,
                "its supervisor died",
            )),
            Err(_) => {
                let reason = format!(
                    "the container did not come up within {} s",
                    START_TIMEOUT.as_secs()
                );
                Err(StartFailure::new(
                    StartStep::Nspawn,
                    Cause::Resources,
                    reason,
                ))
            }
        }
    }

    /// Kills and releases everything of the start in this task directory, and removes the directory. If another process is about
    /// to do the same, waits for it, so that a new start at the same path is not taken for the one that is being removed.
    async fn remove_start(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let claimed = self.locks().contains_key(task_dir.path());
        let _claim = match claimed {
            true => None,
            false => lock_task_dir(task_dir).await?,
        };
        self.remove_locked(task_dir).await
    }

    pub(super) async fn remove_locked(&self, task_dir: &TaskDir) -> Result<(), BackendError> {
        let place = task_dir.clone();
        let Some(machine) = blocking::run(move || roused(&place)).await else {
            self.forget(task_dir);
            return Ok(());
        };
        self.kill_via_supervisor(task_dir).await;
        let place = task_dir.clone();
        blocking::run(move || kill_supervisor(&place)).await;
        if let Some(known) = self.known(task_dir) {
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, known.wait_until_gone()).await;
        }
        if !wait_until_supervisor_exits(task_dir).await {
            return Err(BackendError::Stuck {
                machine,
                reason: "its supervisor does not end".to_owned(),
            });
        }
        let place = task_dir.clone();
        let ended = tokio::task::spawn_blocking(move || {
            failpoint::hit(&place, Failpoint::Removing);
            cleanup::kill_and_release(&place).and_then(|()| place.remove())
        })
        .await;
        self.forget(task_dir);
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if task_dir::is_of_later_form(&error) => {
                Err(BackendError::Unsupported {
                    machine,
                    reason: format!(
                        "{}: {error}; install the driver that wrote it, or remove the directory",
                        task_dir.path().display()
                    ),
                })
            }
            Ok(Err(error)) => Err(BackendError::Stuck {
                machine,
                reason: error.to_string(),
            }),
            Err(error) => Err(BackendError::Stuck {
                machine,
                reason: error.to_string(),
            }),
        }
    }

    /// Kills the supervisor of this task directory with its container. A supervisor that is just starting can't be asked yet, so
    /// the request is repeated until it is gone.
    async fn kill_via_supervisor(&self, task_dir: &TaskDir) {
        let end = Instant::now() + REQUEST_TIMEOUT;
        loop {
            if let Some(client) = self.connect(task_dir).await {
                let _ = tokio::time::timeout(REQUEST_TIMEOUT, client.request(Action::Kill)).await;
                let _ = tokio::time::timeout(REQUEST_TIMEOUT, client.wait_until_gone()).await;
            } else {
                client::request_kill(task_dir).await;
            }
            if !has_supervisor(task_dir).await || Instant::now() >= end {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The supervisor of this task directory, whichever process launched it, if it is alive.
    async fn connect(&self, task_dir: &TaskDir) -> Option<SupervisorClient> {
        // A client whose supervisor has exited may hide a new supervisor that another process has started.
        let known = self
            .known(task_dir)
            .filter(|known| matches!(known.status(), Status::Starting | Status::Up(_)));
        if known.is_some() {
            return known;
        }
        let place = task_dir.clone();
        let running = blocking::run(move || running_in_this_boot(&place)).await?;
        client::attach(task_dir, &running.started, &self.tracker)
            .await
            .ok()
            .flatten()
    }
}

#[async_trait]
impl ContainerBackend for NspawnBackend {
    async fn probe(&self) -> Probe {
        let installed = self.installed().await;
        let turn = Arc::clone(&self.probing).lock_owned().await;
        let (settings, kernel) = (Arc::clone(&self.settings), self.kernel);
        blocking::run(move || {
            let _turn = turn;
            Probe {
                idmapped_mounts: installed
                    .as_ref()
                    .is_ok_and(|(_, version)| Feature::MappedBinds.is_in(*version))
                    && kernel >= (5, 12),
                nspawn: installed
                    .map(|(_, version)| version)
                    .map_err(|error| error.reason),
                root: nix::unistd::geteuid().is_root(),
                cgroup: Layout::of_this_host().kind,
                user_namespaces: kernel::has_user_namespaces(),
                machined: probe::has_machined(),
                state_dir: state_dir::check(&settings.state_dir).map_err(|error| chain(&error)),
            }
        })
        .await
    }

    async fn start(&self, spec: ContainerSpec) -> Result<Started, BackendError> {
        let machine = spec.machine.clone();
        let task_dir = TaskDir::for_task(&self.settings.state_dir, &spec.id);
        let unsupported = |reason| BackendError::Unsupported {
            machine: machine.clone(),
            reason,
        };
        // The content of the state directory is trusted, so this comes first.
        let settings = Arc::clone(&self.settings);
        let secured = blocking::run_start(move || state_dir::secure(&settings.state_dir)).await;
        secured.map_err(|error| match error {
            StateDirError::Io { path, source } => io_error("making the directory", &path, source),
            refused => unsupported(refused.to_string()),
        })?;
        self.remove_start(&task_dir).await?;
        let (settings, id) = (Arc::clone(&self.settings), spec.id.clone());
        let earlier =
            blocking::run_start(move || TaskDir::previous_starts(&settings.state_dir, &id)).await;
        let earlier = earlier.map_err(|source| {
            let place = &self.settings.state_dir;
            io_error("looking for earlier starts in", place, source)
        })?;
        for earlier in earlier {
            self.remove_start(&earlier).await?;
        }
        let installed = self
            .installed()
            .await
            .map_err(|error| error.of_start(&machine))?;
        let up = match self.ordered(spec, &task_dir, installed).await {
            Ok(()) => {
                self.launch_supervisor(&task_dir)
                    .await
                    .map_err(|failure| BackendError::Start {
                        machine: machine.clone(),
                        step: failure.step.as_str(),
                        cause: failure.cause(),
                        reason: failure.reason,
                    })
            }
            Err(error) => Err(error),
        };
        if up.is_err()
            && let Err(error) = self.remove_start(&task_dir).await
        {
            tracing::error!(machine, %error, "a failed start could not be cleared");
        }
        up
    }

    async fn attach(&self, started: &Started) -> Result<Started, BackendError> {
        let client = self.resolve(started).await?;
        let task_dir = TaskDir::new(&started.state);
        // The running record is trusted, not the handle.
        let handle = started.clone();
        let recorded = blocking::run(move || {
            let running = task_dir.running();
            running.map_or(handle, |running| running.started)
        });
        let Ok(status) = tokio::time::timeout(FIRST_STATUS_TIMEOUT, client.start_outcome()).await
        else {
            // The supervisor was found, but the process at its control socket gets no CPU time now. That is no reason to give it
            // up.
            return Ok(recorded.await);
        };
        match status {
            Status::Up(found) => Ok((*found).clone()),
            Status::Ended(_) => Ok(recorded.await),
            Status::Failed(failure) => Err(BackendError::Lost {
                machine: started.machine.clone(),
                reason: failure.reason.clone(),
            }),
            Status::Starting => Err(BackendError::Lost {
                machine: started.machine.clone(),
                reason: "its supervisor is gone".to_owned(),
            }),
        }
    }

    async fn wait(&self, started: &Started) -> Result<Exit, BackendError> {
        // Boxed, because this future waits as long as the container runs, and the state of `resolve` is needed only at its
        // beginning.
        let client = Box::pin(self.resolve(started)).await?;
        client.end().await.ok_or_else(|| BackendError::Lost {
            machine: started.machine.clone(),
            reason: "it never came up".to_owned(),
        })
    }

    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError> {
        let client = self.resolve(started).await?;
        client::sigcont(started.supervisor);
        let asked = tokio::time::timeout(
            REQUEST_TIMEOUT,
            client.request(Action::Signal(signal.number())),
        )
        .await;
        let answer = asked.unwrap_or_else(|_| {
            let seconds = REQUEST_TIMEOUT.as_secs();
            Err(format!("its supervisor has not answered for {seconds} s"))
        });
        answer.map_err(|reason| BackendError::Stuck {
            machine: started.machine.clone(),
            reason: format!("{signal} can't be sent: {reason}"),
        })
    }

    async fn stop(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError> {
        let client = self.resolve(started).await?;
        client::sigcont(started.supervisor);
        let open = || matches!(client.status(), Status::Up(_) | Status::Starting);
        if !grace.is_zero() && open() {
            let verb = signal.map_or(Action::Stop, |signal| Action::Signal(signal.number()));
            let gracefully = async {
                // If the request fails, the container is killed after the grace time.
                if let Err(reason) = client.request(verb).await {
                    tracing::warn!(
                        machine = started.machine,
                        reason,
                        "the stop signal can't be sent"
                    );
                }
                client.end().await
            };
            let _ = tokio::time::timeout(grace, gracefully).await;
        }
        if !open() {
            return Ok(());
        }
        let by_force = async {
            let _ = client.request(Action::Kill).await;
            client.end().await
        };
        if tokio::time::timeout(REQUEST_TIMEOUT, by_force)
            .await
            .is_ok()
        {
            return Ok(());
        }
        // Kill a supervisor that does not answer. Its exit kills the container, see `supervisor`.
        client::kill_supervisor(started.supervisor).await;
        let stuck = || BackendError::Stuck {
            machine: started.machine.clone(),
            reason: "it does not die".to_owned(),
        };
        tokio::time::timeout(REQUEST_TIMEOUT, client.end())
            .await
            .map(|_| ())
            .map_err(|_| stuck())
    }

    async fn remove(&self, id: &str) -> Result<(), BackendError> {
        self.remove_start(&TaskDir::for_task(&self.settings.state_dir, id))
            .await
    }

    async fn usage(&self, started: &Started) -> Result<Usage, BackendError> {
        let Some(path) = started.cgroup.clone() else {
            return Ok(Usage::default());
        };
        let usage = tokio::task::spawn_blocking(move || Group::new(path).usage()).await;
        usage.map_err(|error| BackendError::Stuck {
            machine: started.machine.clone(),
            reason: error.to_string(),
        })
    }

    async fn reconcile(&self, alloc_roots: &BTreeSet<PathBuf>) {
        self.reconcile_state_dir(&self.settings.state_dir, alloc_roots)
            .await;
    }
}

/// Works out everything that must be known before anything is started, and writes the launch spec.
fn prepare(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    (program, version): (PathBuf, u32),
    kernel: (u32, u32),
) -> Result<(), BackendError> {
    let layout = Layout::of_this_host();
    let host = Target {
        version,
        cgroup: layout.kind,
    };
    if let Some(reason) = version::unusable(version, layout.kind) {
        return Err(BackendError::Unsupported {
            machine: spec.machine.clone(),
            reason,
        });
    }
    let (root, mut mounts) = root(spec, task_dir)?;
    mounts.extend(spec.mounts.iter().cloned());
    let mut notes = port_notes(spec)?;
    let (binds, unmapped) = idmap::binds(mounts, &spec.users, version, kernel);
    notes.extend(unmapped);
    notes.extend(ownership::notes(spec, version, kernel));
    let mut line = argv::command_line(spec, &root, &binds, host).map_err(|error| {
        BackendError::Unsupported {
            machine: spec.machine.clone(),
            reason: error.to_string(),
        }
    })?;
    line.environment.insert(
        "NOTIFY_SOCKET".to_owned(),
        task_dir.notify_socket().to_string_lossy().into_owned(),
    );
    let place = place(spec, task_dir, &layout);
    if place.is_none() {
        notes.push(
            "this host has no control groups that the driver can use: there are no statistics of this task"
                .to_owned(),
        );
    }
    let launch_spec = LaunchSpec {
        id: spec.id.clone(),
        alloc_dir: Some(spec.alloc_dir.clone()),
        machine: spec.machine.clone(),
        mode: spec.mode,
        boot: kernel::boot_id().map_err(|source| {
            io_error(
                "reading",
                Path::new("/proc/sys/kernel/random/boot_id"),
                source,
            )
        })?,
        program,
        arguments: line.arguments,
        first: line.init.as_ref().map_or(Pid1::Image, |init| Pid1::Driver {
            streams: init.streams,
        }),
        stdout: spec.stdout.clone(),
        stderr: spec.stderr.clone(),
        network_namespace: match &spec.network {
            Network::Join(path) => Some(path.clone()),
            _ => None,
        },
        resources: acquire::resources(spec, place, &root),
        notes,
    };
    failpoint::hit(task_dir, Failpoint::BeforeOrder);
    task_dir
        .write_launch_spec(&launch_spec, &line.environment, line.init.as_ref())
        .map_err(|source| io_error("writing the order in", task_dir.path(), source))
}

/// Only root can create cgroups; without them the supervisor identifies the container's processes by their parents.
fn place(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    layout: &Layout,
) -> Option<crate::cgroup::CgroupPath> {
    let leaf = task_dir.path().file_name()?.to_str()?;
    layout
        .path_for(spec.cgroup.as_deref(), leaf)
        .filter(|_| nix::unistd::geteuid().is_root())
}

fn root(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
) -> Result<(Root, Vec<crate::container::Mount>), BackendError> {
    let missing = skeleton::missing_mount_points(spec);
    let Root::Directory(image) = &spec.root else {
        return Ok((spec.root.clone(), Vec::new()));
    };
    if missing.is_empty() {
        return Ok((spec.root.clone(), Vec::new()));
    }
    let skeleton = task_dir.skeleton();
    let made = fs::create_dir(&skeleton)
        .and_then(|()| skeleton::build(image, &skeleton, &missing, spec.volatile));
    let binds = made.map_err(|source| io_error("making mount points in", &skeleton, source))?;
    Ok((Root::Directory(skeleton), binds))
}

/// The binary of the container init, made on first use. Two concurrent callers may both make it; one of the two is kept.
fn init_binary(made: &OnceLock<OwnedFd>, state_dir: &Path) -> io::Result<OwnedFd> {
    if let Some(program) = made.get() {
        return program.try_clone();
    }
    let program = supervisor::init_channel::init_binary(state_dir)?;
    made.get_or_init(|| program).try_clone()
}

/// What the user should know about the ports of a container. A port that would be reachable on more addresses than it was
/// allocated on is refused.
fn port_notes(spec: &ContainerSpec) -> Result<Vec<String>, BackendError> {
    let Network::Private { ports, .. } = &spec.network else {
        return Ok(Vec::new());
    };
    ports::check(ports, &Addresses::of_this_host()).map_err(|reason| BackendError::Unsupported {
        machine: spec.machine.clone(),
        reason,
    })
}

/// The living supervisors of a start without a running record, which would name its supervisor.
fn find_supervisors_by_cmdline(task_dir: &TaskDir) -> Vec<SupervisorProcess> {
    if !task_dir.has_supervisor() {
        return Vec::new();
    }
    orphans::supervisors_of(task_dir)
}

/// Sends SIGCONT to the supervisors of a start, in case they were SIGSTOPped, and returns its machine name; `None` if there is no
/// start.
fn roused(task_dir: &TaskDir) -> Option<String> {
    if !task_dir.path().exists() {
        return None;
    }
    match running_in_this_boot(task_dir) {
        Some(running) => client::sigcont(running.started.supervisor),
        None => find_supervisors_by_cmdline(task_dir)
            .iter()
            .for_each(SupervisorProcess::sigcont),
    }
    let launch_spec = task_dir.launch_spec();
    Some(launch_spec.map_or_else(
        |_| task_dir.path().display().to_string(),
        |launch_spec| launch_spec.machine,
    ))
}

/// Kills the supervisors of a start that have not exited.
fn kill_supervisor(task_dir: &TaskDir) {
    match running_in_this_boot(task_dir) {
        Some(running) => cleanup::kill(running.started.supervisor),
        None => find_supervisors_by_cmdline(task_dir)
            .iter()
            .for_each(SupervisorProcess::end),
    }
}

async fn has_supervisor(task_dir: &TaskDir) -> bool {
    let place = task_dir.clone();
    blocking::run(move || place.has_supervisor()).await
}

/// Waits until no supervisor of this start is alive; `false` if one still is after [`REQUEST_TIMEOUT`].
async fn wait_until_supervisor_exits(task_dir: &TaskDir) -> bool {
    let end = Instant::now() + REQUEST_TIMEOUT;
    while has_supervisor(task_dir).await {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    true
}

/// Why the version of systemd-nspawn is not known.
#[derive(Debug)]
struct NoVersion {
    cause: Cause,
    reason: String,
}

impl NoVersion {
    fn config(reason: String) -> Self {
        let cause = Cause::Config;
        Self { cause, reason }
    }

    fn not_run(program: &Path, error: &io::Error) -> Self {
        Self {
            cause: cause_of_exec_error(error),
            reason: format!("{} can't be run: {error}", program.display()),
        }
    }

    fn of_start(self, machine: &str) -> BackendError {
        let Self { cause, reason } = self;
        let machine = machine.to_owned();
        match cause {
            Cause::Config => BackendError::Unsupported { machine, reason },
            cause => BackendError::Start {
                machine,
                step: "asking systemd-nspawn for its version",
                reason,
                cause,
            },
        }
    }
}

/// What is known of the installed systemd-nspawn.
#[derive(Debug)]
enum Look {
    /// The version.
    Known(Program, u32),
    /// Not known yet: `--version` is running.
    Asked(Program, Box<Child>),
}

/// Finds the program, and starts it with `--version` if its version is not `known`.
fn look(settings: &Settings, known: Option<&(Program, u32)>) -> Result<Look, NoVersion> {
    let path = match &settings.nspawn {
        None => probe::find("systemd-nspawn", &settings.search).map_err(NoVersion::config)?,
        Some(path) if probe::is_executable(path) => path.clone(),
        Some(path) => {
            return Err(NoVersion::config(format!(
                "nspawn_path {} is not an executable file",
                path.display()
            )));
        }
    };
    let about = fs::metadata(&path)
        .map_err(|error| NoVersion::config(format!("{}: {error}", path.display())))?;
    let program = Program {
        path,
        inode: about.ino(),
        changed: about.ctime(),
    };
    if let Some((_, version)) = known.filter(|(asked, _)| *asked == program) {
        return Ok(Look::Known(program, *version));
    }
    let asked =
        query_version(&program.path).map_err(|error| NoVersion::not_run(&program.path, &error))?;
    Ok(Look::Asked(program, Box::new(asked)))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one question the backend asks a tool"
)]
fn query_version(program: &Path) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .kill_on_drop(true);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.spawn()
}

async fn read_version(program: &Path, asked: Child) -> Result<u32, NoVersion> {
    let said = asked.wait_with_output().await;
    let said = said.map_err(|error| NoVersion::not_run(program, &error))?;
    let text = String::from_utf8_lossy(&said.stdout);
    probe::parse_version(&text).ok_or_else(|| NoVersion {
        // If it succeeds with other output it is not systemd-nspawn. If it fails, an upgrade may be in progress.
        cause: match said.status.success() {
            true => Cause::Config,
            false => Cause::Unknown,
        },
        reason: format!(
            "{} --version ({}) does not tell a version: {:?}",
            program.display(),
            said.status,
            text.lines().next().unwrap_or("")
        ),
    })
}

/// Locks the start of a handle and returns the started container from its running record, if both match the handle.
fn recorded(task_dir: &TaskDir, started: &Started) -> Result<(TaskLock, Started), BackendError> {
    let lost = |reason: &str| lost(started, reason);
    let lock = TaskLock::lock_shared(task_dir)
        .map_err(|source| io_error("claiming", task_dir.path(), source))?
        .ok_or_else(|| lost("there is no record of it"))?;
    let foreign = orphans::reason_not_ours(task_dir)
        .map_err(|source| io_error("looking at", task_dir.path(), source))?;
    if let Some(reason) = foreign {
        return Err(lost(&format!(
            "what lies in its place is not the driver's: {reason}"
        )));
    }
    let recorded = match task_dir.running() {
        Ok(running) => running.started,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(lost("there is no record of it"));
        }
        Err(source) => return Err(io_error("reading the record in", task_dir.path(), source)),
    };
    if (&recorded.id, recorded.leader) != (&started.id, started.leader) {
        return Err(lost("the record in its place is another one's"));
    }
    failpoint::hit(task_dir, Failpoint::Recovering);
    client::sigcont(recorded.supervisor);
    Ok((lock, recorded))
}

fn lost(started: &Started, reason: &str) -> BackendError {
    BackendError::Lost {
        machine: started.machine.clone(),
        reason: reason.to_owned(),
    }
}

/// The running record of a start, if it is of this boot: after a reboot its pids mean other processes.
fn running_in_this_boot(task_dir: &TaskDir) -> Option<Running> {
    let running = task_dir.running().ok()?;
    (kernel::boot_id().ok()? == running.started.boot).then_some(running)
}

/// Takes a shared lock on a start, if it exists.
async fn lock_task_dir(task_dir: &TaskDir) -> Result<Option<TaskLock>, BackendError> {
    let place = task_dir.clone();
    let taken = blocking::run(move || TaskLock::lock_shared(&place)).await;
    taken.map_err(|source| io_error("claiming", task_dir.path(), source))
}

fn io_error(step: &'static str, path: &Path, source: io::Error) -> BackendError {
    BackendError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}
