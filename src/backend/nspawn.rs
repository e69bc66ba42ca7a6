//! The one real backend: a supervisor and systemd-nspawn for every container. Puts the whole order together before anything is
//! started, so that a failed start has one undo step. Holds nothing that can't be rebuilt from the state directory.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{BackendError, ContainerBackend, chain};
use crate::cgroup::{Group, Layout};
use crate::container::{
    Cause, ContainerSpec, Exit, Network, Probe, Root, Started, Usage, Users, Volatile,
};
use crate::nspawn::argv::{self, Host};
use crate::nspawn::ports::{self, Addresses};
use crate::nspawn::refusal::{cause_of_exec_error, cause_of_host_error};
use crate::nspawn::version::{self, Feature};
use crate::nspawn::{idmap, ownership, probe, root};
use crate::signal::Signal;
use crate::supervisor::orphans::{self, Supervisor};
use crate::supervisor::pause::{self, Point};
use crate::supervisor::record::{self, Running};
use crate::supervisor::state_dir::StateDirError;
use crate::supervisor::{
    self, Claim, Failure, First, Order, PROMPT, Records, Status, Step, Supervised, Verb, remains,
    state_dir,
};
use crate::tree::copy_place;

/// A start that takes longer than this is given up. Copying a large ephemeral root takes minutes; nothing takes longer.
const START: Duration = Duration::from_secs(600);

/// How long a recovery waits for the first word of a supervisor that was found. It comes within a millisecond.
const WORD: Duration = Duration::from_secs(1);

/// How often it is looked whether a supervisor that can't be asked is gone.
const LOOK: Duration = Duration::from_millis(2);

/// How long systemd-nspawn may take to tell its version.
const ANSWER: Duration = Duration::from_secs(10);

/// What an operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where the state of running containers lies.
    pub state_dir: PathBuf,
    /// The systemd-nspawn to use; `None` looks along `search`.
    pub nspawn: Option<PathBuf>,
    /// The value of `PATH`.
    pub search: OsString,
    /// The driver's own binary, which is also every supervisor's.
    pub binary: PathBuf,
}

/// Containers by systemd-nspawn.
#[derive(Debug)]
pub struct NspawnBackend {
    settings: Settings,
    kernel: (u32, u32),
    supervised: Mutex<HashMap<PathBuf, Supervised>>,
    /// The starts that are this backend's, until they are removed.
    claims: Mutex<HashMap<PathBuf, Claim>>,
    /// What was found in the state directory, left alone and named in the log.
    pub(super) named: Mutex<BTreeSet<PathBuf>>,
    version: tokio::sync::Mutex<Option<(Program, u32)>>,
    /// The first program of containers: one for all, made when the first of them starts.
    first: Mutex<Option<OwnedFd>>,
    tracker: TaskTracker,
}

/// A program as it was when it was asked for its version.
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
            settings,
            kernel: probe::kernel(),
            supervised: Mutex::default(),
            claims: Mutex::default(),
            named: Mutex::default(),
            version: tokio::sync::Mutex::default(),
            first: Mutex::default(),
            tracker: TaskTracker::new(),
        }
    }

    fn program(&self) -> Result<Program, String> {
        let path = match &self.settings.nspawn {
            None => probe::find("systemd-nspawn", &self.settings.search)?,
            Some(path) if probe::is_executable(path) => path.clone(),
            Some(path) => {
                return Err(format!(
                    "nspawn_path {} is not an executable file",
                    path.display()
                ));
            }
        };
        let about = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Program {
            path,
            inode: about.ino(),
            changed: about.ctime(),
        })
    }

    /// The program and its version, asked once as long as the file stays the same.
    async fn installed(&self) -> Result<(PathBuf, u32), NoVersion> {
        let program = self.program().map_err(|reason| NoVersion {
            cause: Cause::Config,
            reason,
        })?;
        let mut known = self.version.lock().await;
        if let Some((_, version)) = known.as_ref().filter(|(asked, _)| *asked == program) {
            return Ok((program.path, *version));
        }
        let version = ask_version(&program.path).await?;
        *known = Some((program.clone(), version));
        Ok((program.path, version))
    }

    fn known(&self, records: &Records) -> Option<Supervised> {
        let supervised = self
            .supervised
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        supervised.get(records.path()).cloned()
    }

    fn remember(&self, records: &Records, one: Supervised) {
        let mut supervised = self
            .supervised
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        supervised.insert(records.path().to_owned(), one);
    }

    fn forget(&self, records: &Records) {
        let mut supervised = self
            .supervised
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        supervised.remove(records.path());
        self.claims().remove(records.path());
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<PathBuf, Claim>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The supervised container of a handle, found again if need be.
    async fn find(&self, started: &Started) -> Result<Supervised, BackendError> {
        let lost = |reason: &str| BackendError::Lost {
            machine: started.machine.clone(),
            reason: reason.to_owned(),
        };
        let boot = probe::boot_id().map_err(|source| {
            io_error(
                "reading",
                Path::new("/proc/sys/kernel/random/boot_id"),
                source,
            )
        })?;
        if boot != started.boot {
            return Err(lost("the host has been started anew since"));
        }
        // The handle names the place: an operator may have chosen another state directory since. So the place has to prove itself.
        let records = Records::at(&started.state);
        let state_dir = started.state.parent().unwrap_or_else(|| Path::new("/"));
        if Records::of(state_dir, &started.id) != records {
            return Err(lost("its state lies in another one's place"));
        }
        if let Some(known) = self.known(&records) {
            return Ok(known);
        }
        let claim = claim(&records)
            .await?
            .ok_or_else(|| lost("there is no record of it"))?;
        let foreign = orphans::foreign(&records)
            .map_err(|source| io_error("looking at", records.path(), source))?;
        if let Some(reason) = foreign {
            return Err(lost(&format!(
                "what lies in its place is not the driver's: {reason}"
            )));
        }
        let recorded = match records.running() {
            Ok(running) => running.started,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(lost("there is no record of it"));
            }
            Err(source) => return Err(io_error("reading the record in", records.path(), source)),
        };
        if (&recorded.id, recorded.leader) != (&started.id, started.leader) {
            return Err(lost("the record in its place is another one's"));
        }
        pause::at(&records, Point::Recovering);
        supervisor::rouse(recorded.supervisor);
        let attached = supervisor::attach(&records, &recorded, &self.tracker).await;
        let attached =
            attached.map_err(|source| io_error("connecting to", &records.lifeline(), source))?;
        let one =
            attached.ok_or_else(|| lost("its supervisor is gone and has left no exit record"))?;
        self.remember(&records, one.clone());
        self.claims().insert(records.path().to_owned(), claim);
        Ok(one)
    }

    /// Everything that has to be known before anything is started, written down.
    fn prepare(
        &self,
        spec: &ContainerSpec,
        records: &Records,
        program: PathBuf,
        version: u32,
    ) -> Result<(), BackendError> {
        let layout = Layout::of_this_host();
        let host = Host {
            version,
            cgroup: layout.kind,
        };
        if let Some(reason) = version::unusable(version, layout.kind) {
            return Err(BackendError::Unsupported {
                machine: spec.machine.clone(),
                reason,
            });
        }
        let claim = Claim::create(records)
            .map_err(|source| io_error("making the directory", records.path(), source))?;
        self.claims().insert(records.path().to_owned(), claim);
        let (root, mut mounts) = self.root(spec, records)?;
        mounts.extend(spec.mounts.iter().cloned());
        let mut notes = port_notes(spec)?;
        let (binds, unmapped) = idmap::binds(mounts, &spec.users, version, self.kernel);
        notes.extend(unmapped);
        notes.extend(ownership::notes(spec, version, self.kernel));
        let mut line = argv::command_line(spec, &root, &binds, host).map_err(|error| {
            BackendError::Unsupported {
                machine: spec.machine.clone(),
                reason: error.to_string(),
            }
        })?;
        line.environment.insert(
            "NOTIFY_SOCKET".to_owned(),
            records.notify().to_string_lossy().into_owned(),
        );
        let place = self.place(spec, records, &layout);
        if place.is_none() {
            notes.push(
                "this host has no control groups that the driver can use: there are no statistics of this task"
                    .to_owned(),
            );
        }
        let order = Order {
            id: spec.id.clone(),
            alloc_dir: Some(spec.alloc_dir.clone()),
            machine: spec.machine.clone(),
            mode: spec.mode,
            boot: probe::boot_id().map_err(|source| {
                io_error(
                    "reading",
                    Path::new("/proc/sys/kernel/random/boot_id"),
                    source,
                )
            })?,
            program,
            arguments: line.arguments,
            first: line.init.as_ref().map_or(First::Image, |init| First::Ours {
                streams: init.streams,
            }),
            stdout: spec.stdout.clone(),
            stderr: spec.stderr.clone(),
            place,
            network_namespace: match &spec.network {
                Network::Join(path) => Some(path.clone()),
                _ => None,
            },
            locks: locks_of(spec),
            shares: shares(spec, &root),
            copies: copies_of(spec),
            picks: matches!(&spec.users, Users::Private { range, .. } if range == "pick"),
            zone: match &spec.network {
                Network::Private { zone, .. } => zone.clone(),
                _ => None,
            },
            notes,
        };
        pause::at(records, Point::BeforeOrder);
        records
            .write_order(&order, &line.environment, line.init.as_ref())
            .map_err(|source| io_error("writing the order in", records.path(), source))
    }

    /// Groups are root's to make; without them the supervisor falls back to descent.
    fn place(
        &self,
        spec: &ContainerSpec,
        records: &Records,
        layout: &Layout,
    ) -> Option<crate::cgroup::Place> {
        let leaf = records.path().file_name()?.to_str()?;
        layout
            .place(spec.cgroup.as_deref(), leaf)
            .filter(|_| nix::unistd::geteuid().is_root())
    }

    fn root(
        &self,
        spec: &ContainerSpec,
        records: &Records,
    ) -> Result<(Root, Vec<crate::container::Mount>), BackendError> {
        let missing = root::missing_mount_points(spec);
        let Root::Directory(image) = &spec.root else {
            return Ok((spec.root.clone(), Vec::new()));
        };
        if missing.is_empty() {
            return Ok((spec.root.clone(), Vec::new()));
        }
        let skeleton = records.skeleton();
        let made = fs::create_dir(&skeleton)
            .and_then(|()| root::skeleton(image, &skeleton, &missing, spec.volatile));
        let binds = made.map_err(|source| io_error("making mount points in", &skeleton, source))?;
        Ok((Root::Directory(skeleton), binds))
    }

    fn first_program(&self) -> io::Result<OwnedFd> {
        let mut made = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *made {
            Some(program) => program.try_clone(),
            none => none
                .insert(supervisor::first::program(&self.settings.state_dir)?)
                .try_clone(),
        }
    }

    async fn bring_up(&self, records: &Records) -> Result<Started, Failure> {
        let failed = |error: io::Error| {
            let reason = format!("its supervisor can't be started: {error}");
            Failure::new(Step::Watch, cause_of_host_error(&error), reason)
        };
        pause::at(records, Point::OrderWritten);
        let one = self
            .first_program()
            .and_then(|program| {
                supervisor::launch(&self.settings.binary, records, program, &self.tracker)
            })
            .map_err(failed)?;
        self.remember(records, one.clone());
        match tokio::time::timeout(START, one.settled()).await {
            Ok(Status::Up(started)) => Ok((*started).clone()),
            Ok(Status::Failed(failure)) => Err((*failure).clone()),
            // A command that is over before the news of its start was read.
            Ok(Status::Ended(_)) => records
                .running()
                .map(|running| running.started)
                .map_err(failed),
            Ok(Status::Starting) => Err(Failure::new(
                Step::Watch,
                Cause::Unknown,
                "its supervisor died",
            )),
            Err(_) => {
                let reason = format!("the container did not come up within {} s", START.as_secs());
                Err(Failure::new(Step::Nspawn, Cause::Resources, reason))
            }
        }
    }

    /// Ends and frees whatever stands in these records, and forgets them. Somebody else who is about to do the same is waited
    /// for, so that a successor in the same place is not taken for what is cleared away.
    async fn clear(&self, records: &Records) -> Result<(), BackendError> {
        let claimed = self.claims().contains_key(records.path());
        let _claim = match claimed {
            true => None,
            false => claim(records).await?,
        };
        self.clear_claimed(records).await
    }

    pub(super) async fn clear_claimed(&self, records: &Records) -> Result<(), BackendError> {
        if !records.path().exists() {
            self.forget(records);
            return Ok(());
        }
        let machine = records.order().map_or_else(
            |_| records.path().display().to_string(),
            |order| order.machine,
        );
        match running_now(records) {
            Some(running) => supervisor::rouse(running.started.supervisor),
            None => unrecorded(records).await.iter().for_each(Supervisor::rouse),
        }
        self.dismiss(records).await;
        match running_now(records) {
            Some(running) => supervisor::put_down(running.started.supervisor).await,
            None => {
                for supervisor in unrecorded(records).await {
                    let _ = tokio::task::spawn_blocking(move || supervisor.end()).await;
                }
            }
        }
        if let Some(known) = self.known(records) {
            let _ = tokio::time::timeout(PROMPT, known.gone()).await;
        }
        pause::at(records, Point::Removing);
        if !unwatched(records).await {
            return Err(BackendError::Stuck {
                machine,
                reason: "its supervisor does not end".to_owned(),
            });
        }
        let owned = records.clone();
        let ended =
            tokio::task::spawn_blocking(move || remains::end(&owned).and_then(|()| owned.remove()))
                .await;
        self.forget(records);
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if record::is_of_later_form(&error) => Err(BackendError::Unsupported {
                machine,
                reason: format!(
                    "{}: {error}; install the driver that wrote it, or remove the directory",
                    records.path().display()
                ),
            }),
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

    /// Ends the supervisor of these records with its container. One that is just being started can't be asked yet; it is asked
    /// again until it is gone.
    async fn dismiss(&self, records: &Records) {
        let end = Instant::now() + PROMPT;
        loop {
            if let Some(one) = self.reach(records).await {
                let _ = tokio::time::timeout(PROMPT, one.ask(Verb::Kill)).await;
                let _ = tokio::time::timeout(PROMPT, one.gone()).await;
            } else {
                supervisor::dismiss(records).await;
            }
            if !records.is_watched() || Instant::now() >= end {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The supervisor of these records, whoever launched it, if it lives.
    async fn reach(&self, records: &Records) -> Option<Supervised> {
        // One that has ended may stand in for a successor that another process has started.
        let known = self
            .known(records)
            .filter(|known| matches!(known.status(), Status::Starting | Status::Up(_)));
        if known.is_some() {
            return known;
        }
        let running = running_now(records)?;
        supervisor::attach(records, &running.started, &self.tracker)
            .await
            .ok()
            .flatten()
    }
}

#[async_trait]
impl ContainerBackend for NspawnBackend {
    async fn probe(&self) -> Probe {
        let installed = self.installed().await;
        Probe {
            idmapped_mounts: installed
                .as_ref()
                .is_ok_and(|(_, version)| Feature::MappedBinds.is_in(*version))
                && self.kernel >= (5, 12),
            nspawn: installed
                .map(|(_, version)| version)
                .map_err(|error| error.reason),
            root: nix::unistd::geteuid().is_root(),
            cgroup: Layout::of_this_host().kind,
            user_namespaces: probe::has_user_namespaces(),
            machined: probe::has_machined(),
            state_dir: state_dir::check(&self.settings.state_dir).map_err(|error| chain(&error)),
        }
    }

    async fn start(&self, spec: ContainerSpec) -> Result<Started, BackendError> {
        let machine = spec.machine.clone();
        let records = Records::of(&self.settings.state_dir, &spec.id);
        let unsupported = |reason| BackendError::Unsupported {
            machine: machine.clone(),
            reason,
        };
        // What lies there is believed, so this comes first.
        state_dir::secure(&self.settings.state_dir).map_err(|error| match error {
            StateDirError::Io { path, source } => io_error("making the directory", &path, source),
            refused => unsupported(refused.to_string()),
        })?;
        self.clear(&records).await?;
        let earlier = Records::earlier(&self.settings.state_dir, &spec.id).map_err(|source| {
            let place = &self.settings.state_dir;
            io_error("looking for earlier starts in", place, source)
        })?;
        for earlier in earlier {
            self.clear(&earlier).await?;
        }
        let (program, version) = self
            .installed()
            .await
            .map_err(|error| error.of_start(&machine))?;
        let prepared = self.prepare(&spec, &records, program, version);
        let up = match prepared {
            Ok(()) => self
                .bring_up(&records)
                .await
                .map_err(|failure| BackendError::Start {
                    machine: machine.clone(),
                    step: failure.step.as_str(),
                    cause: failure.cause(),
                    reason: failure.reason,
                }),
            Err(error) => Err(error),
        };
        if up.is_err()
            && let Err(error) = self.clear(&records).await
        {
            tracing::error!(machine, %error, "a failed start could not be cleared");
        }
        up
    }

    async fn attach(&self, started: &Started) -> Result<Started, BackendError> {
        let one = self.find(started).await?;
        let records = Records::at(&started.state);
        // The record is believed, and not the handle.
        let recorded = || {
            records
                .running()
                .map_or_else(|_| started.clone(), |running| running.started)
        };
        let Ok(status) = tokio::time::timeout(WORD, one.settled()).await else {
            // It was found, and has somebody at its lifeline, who gets no processor time now. That is no reason to give it up.
            return Ok(recorded());
        };
        match status {
            Status::Up(found) => Ok((*found).clone()),
            Status::Ended(_) => Ok(recorded()),
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
        // Boxed, because this waits as long as the container runs and the search is long over then.
        let one = Box::pin(self.find(started)).await?;
        one.end().await.ok_or_else(|| BackendError::Lost {
            machine: started.machine.clone(),
            reason: "it never came up".to_owned(),
        })
    }

    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError> {
        let one = self.find(started).await?;
        supervisor::rouse(started.supervisor);
        let asked = tokio::time::timeout(PROMPT, one.ask(Verb::Signal(signal.number()))).await;
        let answer = asked.unwrap_or_else(|_| {
            let seconds = PROMPT.as_secs();
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
        let one = self.find(started).await?;
        supervisor::rouse(started.supervisor);
        let open = || matches!(one.status(), Status::Up(_) | Status::Starting);
        if !grace.is_zero() && open() {
            let verb = signal.map_or(Verb::Stop, |signal| Verb::Signal(signal.number()));
            let politely = async {
                // A request that fails leaves the wait for the grace time, and then force.
                if let Err(reason) = one.ask(verb).await {
                    tracing::warn!(
                        machine = started.machine,
                        reason,
                        "the stop signal can't be sent"
                    );
                }
                one.end().await
            };
            let _ = tokio::time::timeout(grace, politely).await;
        }
        if !open() {
            return Ok(());
        }
        let by_force = async {
            let _ = one.ask(Verb::Kill).await;
            one.end().await
        };
        if tokio::time::timeout(PROMPT, by_force).await.is_ok() {
            return Ok(());
        }
        // A supervisor that does not answer is put down; its end ends the container, see `supervisor`.
        supervisor::put_down(started.supervisor).await;
        let stuck = || BackendError::Stuck {
            machine: started.machine.clone(),
            reason: "it does not die".to_owned(),
        };
        tokio::time::timeout(PROMPT, one.end())
            .await
            .map(|_| ())
            .map_err(|_| stuck())
    }

    async fn remove(&self, id: &str) -> Result<(), BackendError> {
        self.clear(&Records::of(&self.settings.state_dir, id)).await
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
        self.clear_orphans(&self.settings.state_dir, alloc_roots)
            .await;
    }
}

/// Where the throw-away copy of a container's root is made, if there is one.
fn copies_of(spec: &ContainerSpec) -> Option<PathBuf> {
    let (Root::Directory(root) | Root::Image(root)) = &spec.root;
    spec.ephemeral.then(|| copy_place(root))
}

/// What the user should know about the ports of a container. A port that would be reached on more addresses than it is allotted on is
/// refused.
fn port_notes(spec: &ContainerSpec) -> Result<Vec<String>, BackendError> {
    let Network::Private { ports, .. } = &spec.network else {
        return Ok(Vec::new());
    };
    ports::check(ports, &Addresses::of_this_host()).map_err(|reason| BackendError::Unsupported {
        machine: spec.machine.clone(),
        reason,
    })
}

/// The supervisors that are alive of a start that has not recorded its container, so that it does not name them.
async fn unrecorded(records: &Records) -> Vec<Supervisor> {
    if !records.is_watched() {
        return Vec::new();
    }
    let owned = records.clone();
    let search = move || orphans::supervisors_of(&owned);
    tokio::task::spawn_blocking(search)
        .await
        .unwrap_or_default()
}

/// Waits until no supervisor of this start is alive; false where one goes on.
async fn unwatched(records: &Records) -> bool {
    let end = Instant::now() + PROMPT;
    while records.is_watched() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(LOOK).await;
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

/// Whether systemd-nspawn shares its lock of the tree. A stand-in for the root is this container's alone.
fn shares(spec: &ContainerSpec, root: &Root) -> bool {
    (spec.read_only || spec.volatile != Volatile::No) && *root == spec.root
}

/// What systemd-nspawn locks for a container.
fn locks_of(spec: &ContainerSpec) -> Option<PathBuf> {
    let (Root::Directory(root) | Root::Image(root)) = &spec.root;
    (!spec.ephemeral).then(|| root.clone())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one question the backend asks a tool"
)]
async fn ask_version(program: &Path) -> Result<u32, NoVersion> {
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
    let program = program.display();
    let said = tokio::time::timeout(ANSWER, command.output()).await;
    let said = said.map_err(|_| NoVersion {
        cause: Cause::Resources,
        reason: format!(
            "{program} --version does not answer within {} s",
            ANSWER.as_secs()
        ),
    })?;
    let said = said.map_err(|error| NoVersion {
        cause: cause_of_exec_error(&error),
        reason: format!("{program} can't be run: {error}"),
    })?;
    let text = String::from_utf8_lossy(&said.stdout);
    probe::parse_version(&text).ok_or_else(|| NoVersion {
        // A program that succeeds with other words is another program. One that fails may be in the middle of an upgrade.
        cause: match said.status.success() {
            true => Cause::Config,
            false => Cause::Unknown,
        },
        reason: format!(
            "{program} --version ({}) does not tell a version: {:?}",
            said.status,
            text.lines().next().unwrap_or("")
        ),
    })
}

/// The fact of a start, if it is of this boot: in another one its numbers mean other processes.
fn running_now(records: &Records) -> Option<Running> {
    let running = records.running().ok()?;
    (probe::boot_id().ok()? == running.started.boot).then_some(running)
}

/// Claims a start, if it is there.
async fn claim(records: &Records) -> Result<Option<Claim>, BackendError> {
    let owned = records.clone();
    let taken = tokio::task::spawn_blocking(move || Claim::take(&owned)).await;
    taken
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|source| io_error("claiming", records.path(), source))
}

fn io_error(step: &'static str, path: &Path, source: io::Error) -> BackendError {
    BackendError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}
