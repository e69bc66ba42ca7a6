//! What every backend promises, as scenarios. The same suite runs against the fake (in the hermetic tests) and against the real
//! systemd-nspawn (end to end), and must pass on both: that is what makes the fake worth trusting. Payloads are `/bin/sh`
//! scripts that both can run, and a scenario sees only what the hatch, the container's output and the host's `/proc` show.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nomad_driver_nspawn::backend::nspawn::Settings;
use nomad_driver_nspawn::backend::{BackendError, ContainerBackend, NspawnBackend};
use nomad_driver_nspawn::container::{
    Console, ContainerSpec, Exit, Mode, Network, Root, Started, Users, Volatile,
};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::supervisor::TaskDir;
use nomad_driver_nspawn::supervisor::failpoint::OLD_KERNEL;
use nomad_driver_nspawn::supervisor::process::{ProcessHandle, children, handles_signal, is_alive};

use rstest::rstest;
use support::not_applicable;

// The crate that plays the suite says, beside this module, what a world is.
use super::world;

mod degraded;
mod environment;
mod exits;
mod force;
mod lifecycle;
mod logs;
mod orphans;
mod own_end;
mod recover;
mod roots;
mod shared_tree;
mod signals;
mod stops;

/// No wait in a scenario is longer. A bound against hanging, not a measurement.
const LIMIT: Duration = Duration::from_secs(60);
/// A grace time that no scenario which ends politely uses up.
const AMPLE: Duration = Duration::from_secs(20);

const HEARS_TERM: &str = "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";

/// Everything one scenario owns.
pub(crate) struct World {
    /// Removed at the end.
    pub(crate) scratch: tempfile::TempDir,
    /// Another backend can be made from it.
    pub(crate) settings: Settings,
    /// The backend.
    pub(crate) backend: NspawnBackend,
    /// A tree with `/bin/sh` in it, this scenario's own.
    pub(crate) tree: PathBuf,
    /// Whether the driver knows of an end what an older kernel tells.
    old_kernel: bool,
}

impl World {
    /// A world with this binary of the driver, this systemd-nspawn, and a tree that `make_tree` fills.
    pub(crate) fn new(
        binary: &Path,
        nspawn: impl FnOnce(&Path) -> PathBuf,
        make_tree: impl FnOnce(&Path),
    ) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        fs::create_dir(&tree).unwrap();
        make_tree(&tree);
        let settings = Settings {
            state_dir: scratch.path().join("state"),
            nspawn: Some(nspawn(scratch.path())),
            search: std::ffi::OsString::new(),
            binary: binary.to_owned(),
        };
        Self {
            backend: NspawnBackend::new(settings.clone()),
            settings,
            scratch,
            tree,
            old_kernel: false,
        }
    }

    /// The same with a driver that knows of an end what an older kernel tells.
    pub(crate) fn on_an_old_kernel(self) -> Self {
        let mut directory = self.settings.state_dir.clone().into_os_string();
        directory.push(".pause");
        fs::create_dir_all(&directory).unwrap();
        fs::write(Path::new(&directory).join(OLD_KERNEL), "").unwrap();
        Self {
            old_kernel: true,
            ..self
        }
    }

    /// Whether the kernel tells how a process ended to others than its parent.
    pub(crate) fn kernel_tells(&self) -> bool {
        !self.old_kernel && nomad_driver_nspawn::nspawn::probe::kernel() >= (6, 15)
    }

    /// A plain container that runs a shell script.
    pub(crate) fn spec(&self, script: &str) -> ContainerSpec {
        self.named("task", script)
    }

    /// The same with a name for the task.
    pub(crate) fn named(&self, task: &str, script: &str) -> ContainerSpec {
        let unique = self
            .scratch
            .path()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace(|c: char| !c.is_ascii_alphanumeric(), "");
        ContainerSpec {
            id: format!("alloc-{unique}/{task}/00000001"),
            alloc_dir: self.scratch.path().join("allocations").join("alloc"),
            machine: format!("{task}-{unique}"),
            root: Root::Directory(self.tree.clone()),
            mode: Mode::Plain,
            command: vec!["/bin/sh".into(), "-c".into(), script.into()],
            environment: BTreeMap::new(),
            working_directory: None,
            user: None,
            ephemeral: false,
            read_only: false,
            volatile: Volatile::No,
            pivot_root: None,
            resolv_conf: Some("off".into()),
            console: Console::Pipe,
            users: Users::Host,
            mounts: Vec::new(),
            capabilities: Vec::new(),
            network: Network::Host,
            stdout: Some(self.file("stdout")),
            stderr: Some(self.file("stderr")),
            cgroup: None,
        }
    }

    /// The directory that holds the allocations of its agent.
    pub(crate) fn alloc_roots(&self) -> BTreeSet<PathBuf> {
        BTreeSet::from([self.scratch.path().join("allocations")])
    }

    /// Where the records of the start with this name for its task lie.
    pub(crate) fn task_dir(&self, task: &str) -> TaskDir {
        TaskDir::for_task(&self.settings.state_dir, &self.named(task, "").id)
    }

    /// The records of a start once more for another one, as a dead plugin would have left them; `change` may alter every file.
    pub(crate) fn copied(
        &self,
        of: &Started,
        task: &str,
        change: impl Fn(&mut serde_json::Value),
    ) -> TaskDir {
        let id = self.named(task, "").id;
        let task_dir = self.task_dir(task);
        task_dir.create().unwrap();
        for name in ["order", "running", "exit"] {
            let Ok(text) = fs::read(of.state.join(name)) else {
                continue;
            };
            let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
            let leaf = task_dir.path().file_name().unwrap();
            match name {
                "order" => {
                    value["id"] = id.as_str().into();
                    // As a driver before the list of resources wrote it.
                    value.as_object_mut().unwrap().remove("resources");
                    for kind in ["group", "mirror"] {
                        if let Some(group) = value["place"][kind].as_str() {
                            let moved = Path::new(group).with_file_name(leaf);
                            value["place"][kind] = moved.to_str().into();
                        }
                    }
                }
                "running" => value["started"]["id"] = id.as_str().into(),
                _ => {}
            }
            change(&mut value);
            fs::write(task_dir.path().join(name), value.to_string()).unwrap();
        }
        task_dir
    }

    /// An empty file for a stream.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        if !path.exists() {
            fs::write(&path, "").unwrap();
        }
        path
    }

    /// What a stream's file holds.
    pub(crate) fn said(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap()
    }

    /// Waits until the payload has written this word on stdout: it is as far as the scenario needs it.
    pub(crate) async fn received(&self, word: &str) {
        within(async {
            while !self.said("stdout").contains(word) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Waits until the first process is seen to have a handler for this signal. The fake shows it a moment after its payload
    /// has it.
    pub(crate) async fn handles(&self, started: &Started, name: &str) {
        within(async {
            while !handles_signal(started.leader.pid, signal(name)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Starts a container that must come up.
    pub(crate) async fn start(&self, spec: ContainerSpec) -> Started {
        within(self.backend.start(spec)).await.unwrap()
    }

    /// Starts a container that must come up, and waits until its payload says so.
    pub(crate) async fn up(&self, spec: ContainerSpec) -> Started {
        let started = self.start(spec).await;
        self.received("up").await;
        started
    }

    /// Starts a container that must not come up.
    pub(crate) async fn refused(&self, spec: ContainerSpec) -> BackendError {
        within(self.backend.start(spec)).await.unwrap_err()
    }

    /// Waits for the end.
    pub(crate) async fn end(&self, started: &Started) -> Exit {
        within(self.backend.wait(started)).await.unwrap()
    }

    /// Frees what has been started, and sees that nothing is left.
    pub(crate) async fn leave(self, all: &[&Started]) {
        for started in all {
            within(self.backend.remove(&started.id)).await.unwrap();
            assert!(
                !started.state.exists(),
                "{} is left",
                started.state.display()
            );
            assert!(!is_alive(started.leader), "the leader is left");
            assert!(!is_alive(started.supervisor), "the supervisor is left");
            assert!(
                started.cgroup.as_ref().is_none_or(|group| !group.exists()),
                "{:?} is left",
                started.cgroup
            );
            let propagate = Path::new("/run/systemd/nspawn/propagate").join(&started.machine);
            assert!(!propagate.exists(), "{} is left", propagate.display());
        }
        let state: Vec<_> = fs::read_dir(&self.settings.state_dir)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        assert!(state.is_empty(), "left in the state directory: {state:?}");
        let marker = self.scratch.path().to_string_lossy().into_owned();
        let left = processes_that_name(&marker);
        assert!(left.is_empty(), "left running: {left:?}");
        let copies: Vec<_> = fs::read_dir(self.scratch.path())
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name.to_string_lossy().starts_with(".#"))
            .collect();
        assert!(copies.is_empty(), "left beside the tree: {copies:?}");
    }
}

/// A bound against hanging.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what)
        .await
        .expect("not within 60 s")
}

/// Command lines on this host in which `marker` stands.
fn processes_that_name(marker: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(text) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let text = String::from_utf8_lossy(&text).replace('\0', " ");
        if text.contains(marker) {
            found.push(format!("{} {text}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// An exit as (code, signal).
pub(crate) fn ended(exit: &Exit) -> (i32, i32) {
    (exit.code, exit.signal)
}

/// Sends a signal to a process of this host from outside, as an operator would.
pub(crate) fn strike(pid: i32, signal: Signal) {
    ProcessHandle::open(pid).unwrap().signal(signal).unwrap();
}

/// The signal with this name.
pub(crate) fn signal(name: &str) -> Signal {
    name.parse().unwrap()
}

/// Everything below a leader, held so that its end can be seen.
pub(crate) fn offspring(leader: i32) -> Vec<ProcessHandle> {
    let mut pending = children(leader);
    let mut found = Vec::new();
    while let Some(pid) = pending.pop() {
        pending.extend(children(pid));
        found.extend(ProcessHandle::open(pid).ok());
    }
    found
}

pub(crate) async fn lost(world: &World, started: &Started) {
    let other = NspawnBackend::new(world.settings.clone());
    let error = within(other.attach(started)).await.unwrap_err();
    assert!(matches!(error, BackendError::Lost { .. }), "{error:?}");
    assert!(!error.is_transient());
}

/// Force after a short grace, which ends all of these processes.
pub(crate) async fn ended_by_force(world: &World, started: &Started, inner: Vec<ProcessHandle>) {
    let grace = Duration::from_millis(50);
    within(world.backend.stop(started, None, grace))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(started).await), (137, 9));
    assert!(inner.iter().all(|held| held.wait(LIMIT)), "one lives on");
}

/// With a grace that never ends, so that only the payload itself can have ended it.
pub(crate) async fn stopped_politely(backend: &NspawnBackend, started: &Started, want: (i32, i32)) {
    within(backend.stop(started, None, Duration::MAX))
        .await
        .unwrap();
    let exit = within(backend.wait(started)).await.unwrap();
    assert_eq!((ended(&exit), &exit.error), (want, &None));
}
