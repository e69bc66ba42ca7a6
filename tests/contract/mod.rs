//! The behaviour that every backend guarantees, as scenarios. The same suite runs against the fake (in the hermetic tests) and against the
//! real systemd-nspawn (end to end), and must pass on both; that is why the fake can be trusted. Payloads are `/bin/sh` scripts that run on
//! both, and a scenario observes only the backend interface, the container's output and the host's `/proc`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nomad_driver_nspawn::backend::nspawn::{Settings, Timeouts};
use nomad_driver_nspawn::backend::{BackendError, ContainerBackend, NspawnBackend};
use nomad_driver_nspawn::container::{
    ContainerSpec, Credential, Exit, Identity, Mode, NetworkNamespace, Root, Started, Users,
    Volatile,
};
use nomad_driver_nspawn::failpoint::OLD_KERNEL;
use nomad_driver_nspawn::network::pool::Pool;
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::{ProcessHandle, children, handles_signal, is_alive};

use rstest::rstest;
use support::{eventually, not_applicable, starts_in};

// Defined beside this module by the crate that runs the suite.
use super::world;

mod booted;
mod control_socket;
mod degraded;
mod devices;
mod environment;
mod exec;
mod exits;
mod filters;
mod force;
mod inside;
mod lifecycle;
mod limits;
mod logs;
mod network;
mod orphans;
mod own_end;
mod own_network;
mod ready;
mod recover;
mod release;
mod roots;
mod sessions;
mod shared_tree;
mod signals;
mod stops;

/// No wait in a scenario takes longer. A bound against hanging, not a measurement.
const LIMIT: Duration = Duration::from_secs(60);
/// A grace period that no scenario with a graceful stop uses up.
const AMPLE: Duration = Duration::from_secs(20);

const HEARS_TERM: &str = "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";

/// Everything that belongs to one scenario.
pub(crate) struct World {
    /// Removed at the end.
    pub(crate) scratch: tempfile::TempDir,
    /// To create further backends.
    pub(crate) settings: Settings,
    /// The backend.
    pub(crate) backend: NspawnBackend,
    /// A tree with `/bin/sh` in it, used by this scenario only.
    pub(crate) tree: PathBuf,
    /// Whether the driver is limited to the exit information of an older kernel.
    old_kernel: bool,
}

impl World {
    /// A world with this driver binary, this systemd-nspawn, and a tree that `make_tree` fills.
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
            exec_unfiltered: false,
            seccomp_cache: true,
            network_pool: Pool::default(),
            timeouts: Timeouts::default(),
        };
        Self {
            backend: NspawnBackend::new(settings.clone()),
            settings,
            scratch,
            tree,
            old_kernel: false,
        }
    }

    /// The same world, with a driver that is limited to the exit information of an older kernel.
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

    /// The same world, with a backend that waits this long for a supervisor when it removes a start.
    pub(crate) fn with_timeouts(mut self, timeouts: Timeouts) -> Self {
        self.settings.timeouts = timeouts;
        self.backend = NspawnBackend::new(self.settings.clone());
        self
    }

    /// Whether systemd-nspawn is the fake, which is linked in the world's directory.
    pub(crate) fn is_fake(&self) -> bool {
        let nspawn = self.settings.nspawn.as_ref();
        nspawn.is_some_and(|nspawn| nspawn.starts_with(self.scratch.path()))
    }

    /// Whether the kernel shows a process's exit status to processes other than its parent.
    pub(crate) fn kernel_tells(&self) -> bool {
        !self.old_kernel && nomad_driver_nspawn::sys::kernel::version() >= (6, 15)
    }

    /// A plain container that runs a shell script.
    pub(crate) fn spec(&self, script: &str) -> ContainerSpec {
        self.named("task", script)
    }

    /// The same with a task name.
    pub(crate) fn named(&self, task: &str, script: &str) -> ContainerSpec {
        let unique = self
            .scratch
            .path()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace(|c: char| !c.is_ascii_alphanumeric(), "");
        ContainerSpec::for_test(task, &self.tree).with(|spec| {
            spec.identity = Identity {
                id: format!("alloc-{unique}/{task}/00000001"),
                alloc_dir: self.scratch.path().join("allocations").join("alloc"),
                machine: format!("{task}-{unique}"),
            };
            spec.payload.command = vec!["/bin/sh".into(), "-c".into(), script.into()];
            spec.payload.stdout = Some(self.file("stdout"));
            spec.payload.stderr = Some(self.file("stderr"));
            spec.network.resolv_conf = Some("off".into());
        })
    }

    /// The allocation root of its agent.
    pub(crate) fn alloc_roots(&self) -> BTreeSet<PathBuf> {
        BTreeSet::from([self.scratch.path().join("allocations")])
    }

    /// The task directory of the start with this task name.
    pub(crate) fn task_dir(&self, task: &str) -> TaskDir {
        TaskDir::for_task(&self.settings.state_dir, &self.named(task, "").identity.id)
    }

    /// Copies a task directory for another task, as a dead plugin would have left it; `change` can modify every file.
    pub(crate) fn copied(
        &self,
        of: &Started,
        task: &str,
        change: impl Fn(&mut serde_json::Value),
    ) -> TaskDir {
        let id = self.named(task, "").identity.id;
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
                    // Drivers from before the list of resources did not write it.
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

    /// The file of a stream, created empty.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        if !path.exists() {
            fs::write(&path, "").unwrap();
        }
        path
    }

    /// The content of a stream's file.
    pub(crate) fn said(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap()
    }

    /// Waits until the payload has printed this word on stdout, which means that it is ready for the next step.
    pub(crate) async fn received(&self, word: &str) {
        within(async {
            while !self.said("stdout").contains(word) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Waits until the container's PID 1 shows a handler for this signal. The fake shows it shortly after its payload has installed it.
    pub(crate) async fn handles(&self, started: &Started, name: &str) {
        within(async {
            while !handles_signal(started.leader.pid, signal(name)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Starts a container; the start must succeed.
    pub(crate) async fn start(&self, spec: ContainerSpec) -> Started {
        let started = within(self.backend.start(spec)).await.unwrap();
        Started::clone(&started)
    }

    /// Starts a container and waits until its payload prints `up`.
    pub(crate) async fn up(&self, spec: ContainerSpec) -> Started {
        let started = self.start(spec).await;
        self.received("up").await;
        started
    }

    /// Starts a container; the start must fail.
    pub(crate) async fn refused(&self, spec: ContainerSpec) -> BackendError {
        within(self.backend.start(spec)).await.unwrap_err()
    }

    /// Waits for the exit.
    pub(crate) async fn end(&self, started: &Started) -> Exit {
        within(self.backend.wait(started)).await.unwrap()
    }

    /// Removes what was started and checks that nothing is left.
    pub(crate) async fn leave(self, all: &[&Started]) {
        for started in all {
            within(self.backend.remove(&started.id)).await.unwrap();
            assert!(
                !started.state.exists(),
                "{} is left",
                started.state.display()
            );
            assert!(!is_alive(started.leader), "the leader is left");
            // Its parent waits for it on a task of its own, if another backend has removed the start.
            eventually("the supervisor is gone", || !is_alive(started.supervisor)).await;
            assert!(
                started.cgroup.as_ref().is_none_or(|group| !group.exists()),
                "{:?} is left",
                started.cgroup
            );
            let controllers = started.controllers.values();
            let own = controllers.filter(|group| group.file_name() == started.state.file_name());
            for group in own {
                assert!(!group.exists(), "{} is left", group.display());
            }
            let propagate = Path::new("/run/systemd/nspawn/propagate").join(&started.machine);
            assert!(!propagate.exists(), "{} is left", propagate.display());
        }
        let state = starts_in(&self.settings.state_dir);
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

/// The command lines on this host that contain `marker`.
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

/// All descendants of a leader, as handles that can wait for their end.
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

/// Stops by force after a short grace period; all of these processes must end.
pub(crate) async fn ended_by_force(world: &World, started: &Started, inner: Vec<ProcessHandle>) {
    let grace = Duration::from_millis(50);
    within(world.backend.stop(started, None, grace))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(started).await), (137, 9));
    assert!(inner.iter().all(|held| held.wait(LIMIT)), "one lives on");
}

/// Stops with an infinite grace period, so that only the payload itself can have ended.
pub(crate) async fn stopped_politely(backend: &NspawnBackend, started: &Started, want: (i32, i32)) {
    within(backend.stop(started, None, Duration::MAX))
        .await
        .unwrap();
    let exit = within(backend.wait(started)).await.unwrap();
    assert_eq!((ended(&exit), &exit.error), (want, &None));
}
