//! The one real backend: runs a supervisor and systemd-nspawn for every container. Keeps nothing that can't be rebuilt from the state
//! directory. Runs in the plugin. One file for each operation.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::task::TaskTracker;

use super::{BackendError, ContainerBackend, UsageReader, chain};
use crate::blocking;
use crate::cgroup::{Layout, UsageFiles, has_device_policy};
use crate::container::{ContainerSpec, Exit, Notes, Probe, Reading, Started};
use crate::exec::{ExecRequest, FilterCache, Session};
use crate::network::pool::Pool;
use crate::nspawn::probe;
use crate::signal::Signal;
use crate::state::{TaskDir, state_dir};
use crate::supervisor::REQUEST_TIMEOUT;
use crate::sys::kernel;

mod acquire;
mod addresses;
mod attach;
mod exec;
mod filters;
mod ids;
mod installed;
mod mounts;
mod name_files;
mod own_network;
mod prepare;
mod reconcile;
mod registry;
mod reload;
mod remove;
mod start;
mod stop;

use filters::CapturedFilters;
use installed::Installed;
use registry::Registry;
use reload::Reloads;

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
    /// Whether a command is run in a container whose seccomp filters can't be read, without filters.
    pub exec_unfiltered: bool,
    /// Whether seccomp filters that systemd-nspawn has built are installed in later containers of the same kind.
    pub seccomp_cache: bool,
    /// The addresses for containers with a network of their own.
    pub network_pool: Pool,
    /// How long a removal waits for a supervisor. Not configurable; shorter in tests.
    pub timeouts: Timeouts,
}

/// How long the removal of a start waits for its supervisor before it kills that and goes on without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until the supervisor has reported that the container, which it is to kill, has ended.
    pub kill: Duration,
    /// From that report until everything is released. A copy of gigabytes takes minutes.
    pub release: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            kill: REQUEST_TIMEOUT,
            release: Duration::from_secs(600),
        }
    }
}

/// Runs containers with systemd-nspawn.
#[derive(Debug)]
pub struct NspawnBackend {
    settings: Arc<Settings>,
    kernel: (u32, u32),
    registry: Registry,
    installed: Installed,
    /// Paths in the state directory that reconciliation does not remove and has logged.
    logged: Mutex<BTreeSet<PathBuf>>,
    /// Allows one probe of the host at a time, so that probes that hang hold one thread, and not one thread each.
    probing: Arc<tokio::sync::Mutex<()>>,
    /// The binary of the container init: one for all containers, made when the first of them starts.
    init: Arc<OnceLock<OwnedFd>>,
    /// The seccomp filters of containers, for commands that are run in them.
    filters: Arc<FilterCache>,
    captured: Arc<CapturedFilters>,
    reloads: Reloads,
    notes: Notes,
    tracker: TaskTracker,
}

impl NspawnBackend {
    /// A backend with these settings. Touches nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings: Arc::new(settings),
            kernel: kernel::version(),
            registry: Registry::default(),
            installed: Installed::default(),
            logged: Mutex::default(),
            probing: Arc::default(),
            init: Arc::default(),
            filters: Arc::default(),
            captured: Arc::default(),
            reloads: Reloads::default(),
            notes: Notes::default(),
            tracker: TaskTracker::new(),
        }
    }

    /// The same, with a receiver of what the users of the containers should know while they start and run. To be called before the first
    /// [`start`](ContainerBackend::start) or [`attach`](ContainerBackend::attach).
    #[must_use]
    pub fn with_notes(mut self, notes: Notes) -> Self {
        self.notes = notes;
        self
    }

    fn task_dir(&self, id: &str) -> TaskDir {
        TaskDir::for_task(&self.settings.state_dir, id)
    }
}

#[async_trait]
impl ContainerBackend for NspawnBackend {
    async fn probe(&self) -> Probe {
        let installed = self.installed.get(&self.settings).await;
        let turn = Arc::clone(&self.probing).lock_owned().await;
        let (settings, kernel) = (Arc::clone(&self.settings), self.kernel);
        let (init, captured) = (Arc::clone(&self.init), Arc::clone(&self.captured));
        blocking::run(move || {
            let _turn = turn;
            let layout = Layout::of_this_host();
            let root = nix::unistd::geteuid().is_root();
            let program = || start::init_binary(&init, &settings.state_dir);
            Probe {
                seccomp_cache: captured.usable(&settings, program),
                controllers: match root {
                    true => controllers(&layout),
                    false => BTreeSet::new(),
                },
                idmapped_mounts: kernel >= (5, 12),
                nspawn: installed
                    .map(|(_, version)| version)
                    .map_err(|error| error.reason),
                root,
                cgroup: layout.kind,
                user_namespaces: kernel::has_user_namespaces(),
                machined: probe::has_machined(),
                openat2: probe::openat2(),
                state_dir: state_dir::check(&settings.state_dir).map_err(|error| chain(&error)),
            }
        })
        .await
    }

    async fn start(&self, spec: ContainerSpec) -> Result<Arc<Started>, BackendError> {
        self.start_container(spec).await
    }

    async fn attach(&self, started: &Started) -> Result<Arc<Started>, BackendError> {
        self.find(started).await
    }

    async fn wait(&self, started: &Started) -> Result<Exit, BackendError> {
        self.wait_for_exit(started).await
    }

    async fn oom_kills(&self, started: &Started, seen: u64) -> Option<u64> {
        // The start or the recovery has set the client. Not connected again here: this future exists as long as the container runs, and
        // should be small.
        let client = self.registry.client(&TaskDir::new(&started.state))?;
        client.oom_kills(seen).await
    }

    async fn network_restored(&self, started: &Started) -> Option<String> {
        self.restore_after_reload(started).await
    }

    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError> {
        self.send_signal(started, signal).await
    }

    async fn exec(&self, started: &Started, request: ExecRequest) -> Result<Session, BackendError> {
        self.start_session(started, request).await
    }

    async fn stop(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError> {
        self.stop_container(started, signal, grace).await
    }

    async fn remove(&self, id: &str) -> Result<(), BackendError> {
        self.remove_start(&self.task_dir(id)).await
    }

    async fn addresses(&self, started: &Started) -> Vec<IpAddr> {
        let leader = started.leader;
        blocking::run(move || addresses::of_container(leader)).await
    }

    fn usage_reader(&self, started: &Started) -> Box<dyn UsageReader> {
        let group = started.cgroup.as_deref();
        Box::new(UsageFiles::new(group, &started.controllers))
    }

    async fn reconcile(&self, alloc_roots: &BTreeSet<PathBuf>) {
        self.reconcile_state_dir(&self.settings.state_dir, alloc_roots)
            .await;
    }
}

impl UsageReader for UsageFiles {
    fn read(&mut self, with_processes: bool) -> Option<Reading> {
        Self::read(self, with_processes)
    }
}

/// The controllers with which the driver can limit a container, of whichever version. `devices` also where BPF takes its place.
fn controllers(layout: &Layout) -> BTreeSet<String> {
    let mut usable = layout.usable_controllers();
    if has_device_policy(layout) {
        usable.insert("devices".to_owned());
    }
    usable
}

/// The id of the current boot.
fn boot_id() -> Result<String, BackendError> {
    kernel::boot_id().map_err(|source| {
        let file = Path::new("/proc/sys/kernel/random/boot_id");
        io_error("reading", file, source)
    })
}

fn io_error(step: &'static str, path: &Path, source: io::Error) -> BackendError {
    BackendError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}
