//! Secrets: no value of a variable, no template's content and no token is visible on the host, neither while a task with them runs nor
//! after it has died in any way. The fake takes values in the same way as each version of systemd-nspawn; a real one as its own.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use dev_agent::Allocation;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::{children, first_child};
use serde_json::{Value, json};
use support::secrecy::{self, Marker, Mode, Search, shown};
use support::trap::Trap;
use support::wire::Task;
use support::{eventually, not_applicable};
use tokio::task::JoinHandle;

use super::*;

/// A variable that obviously contains a secret.
const SECRET: &str = "DB_PASSWORD";

/// Not a valid variable name.
const NO_NAME: &str = "no=name";

/// The files that contain the secrets until the start has read them.
const ON_DISK: [&str; 3] = ["environment", "exec", "init"];

/// Versions of systemd-nspawn that differ in how they take values; later ones pass them in the same way as 250, and refuse hosts with cgroup
/// v1.
const VERSIONS: [u32; 5] = [247, 249, 250, 252, 257];

/// One task with secrets, and where they may be.
pub(super) struct Case<W> {
    pub(super) world: W,
    pub(super) marker: Marker,
    mode: Mode,
    pub(super) version: u32,
    pub(super) since: i64,
}

/// How a task with secrets ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Exit(i32),
    Signal(i32),
    Stop,
    Leader,
    /// The leader's child: the driver's own init if there is one, or the command.
    Inside,
    Nspawn,
    Supervisor,
    Plugin,
}

const DEATHS: [Death; 9] = [
    Death::Exit(0),
    Death::Exit(3),
    Death::Signal(11),
    Death::Stop,
    Death::Leader,
    Death::Inside,
    Death::Nspawn,
    Death::Supervisor,
    Death::Plugin,
];

impl<W: World> Case<W> {
    /// A task in this world, whose systemd-nspawn is one of this version. `None`, after a report, if it is another one.
    pub(super) fn new(world: W, mode: Mode, version: u32) -> Option<Self> {
        let version = match world.use_version(version, &VERSIONS) {
            Ok(version) => version,
            Err(reason) => {
                not_applicable(&reason);
                world.unused();
                return None;
            }
        };
        if mode == Mode::Boot {
            world.use_init(version, &Value::Null);
        }
        Some(Self {
            world,
            marker: Marker::new(),
            mode,
            version,
            since: secrecy::now(),
        })
    }

    /// A task of this mode with secrets in its environment.
    pub(super) fn task(&self, script: &str) -> Task {
        self.in_mode(self.world.shell(script))
            .env(SECRET, &self.marker.secret("value"))
            .env("NOMAD_TOKEN", &self.marker.secret("token"))
            .env("LINES", &format!("a\n{}\n", self.marker.secret("lines")))
    }

    /// A task in this mode.
    pub(super) fn in_mode(&self, task: Task) -> Task {
        match self.mode {
            Mode::Plain => task,
            Mode::ProcessTwo => task.with("process_two", true),
            Mode::Boot => task.with("boot", true).with("command", json!([])),
        }
    }

    /// An allocation as Nomad creates it, with the files of a template and a token.
    pub(super) fn allocation(&self, task: Task) -> Arc<Allocation> {
        let allocation = self.world.allocation(task);
        let secrets = allocation.task_dir().join("secrets");
        for name in ["file.env", "nomad_token"] {
            fs::write(secrets.join(name), self.marker.secret(name)).unwrap();
        }
        Arc::new(allocation)
    }

    /// Directories that may contain the secrets: Nomad's own, and that of the fake's scenario and call log; and the plugin's.
    fn spared(&self) -> Vec<PathBuf> {
        ["alloc", "bin", "plugins"]
            .map(|name| self.world.join(name))
            .into()
    }

    /// Searches the whole host. `nspawn` is the running systemd-nspawn.
    pub(super) fn search(&self, when: &str, nspawn: Option<i32>) {
        self.search_but(when, nspawn, &[]);
    }

    /// The same, but files with these names in the task directory may contain the secrets. Returns how many files do.
    fn search_but(&self, when: &str, nspawn: Option<i32>, on_disk: &[&str]) -> usize {
        let found = Search {
            marker: &self.marker,
            in_arguments: shown(self.mode, self.version, false).is_some(),
            own: self.world.path(),
            state: &self.world.state(),
            spared: &self.spared(),
            since: self.since,
        }
        .run(when, nspawn, on_disk);
        let log = self.world.log().text().join("\n");
        self.marker.not_in("the plugin's log", &log);
        found
    }

    async fn dies(&self, plugin: Plugin, death: Death) -> Plugin {
        // In `boot` mode the image's init runs, not the script.
        let instead = match death {
            Death::Exit(code) if self.mode == Mode::Boot => json!({"exit": code}),
            Death::Signal(number) if self.mode == Mode::Boot => json!({"signal": number}),
            _ => Value::Null,
        };
        let task = match death {
            Death::Exit(code) => self.task(&format!("exit {code}")),
            Death::Signal(number) => self.task(&format!("kill -{number} $$")),
            _ => self.task(ON_AND_ON),
        };
        // No program can get this variable: an event reports it.
        let task = task.env(NO_NAME, &self.marker.secret("event"));
        if self.mode == Mode::Boot && !self.world.use_init(self.version, &instead) {
            return plugin;
        }
        let allocation = self.allocation(task);
        let running = self.world.start_in(&plugin, allocation).await;
        let running = running.unwrap_or_else(|error| panic!("{error}"));
        let kept = String::from_utf8_lossy(&running.started.handle.driver_state).into_owned();
        self.marker.not_in("the state that Nomad keeps", &kept);
        let by_itself = matches!(death, Death::Exit(_) | Death::Signal(_));
        if !by_itself {
            self.is_up(&running).await;
            self.search("while it runs", Some(running.nspawn()));
        }
        let plugin = self.strike(plugin, &running, death).await;
        let exit = running.wait(&plugin).await;
        self.marker.not_in("the exit", &format!("{exit:?}"));
        let reported = running.inspect(&plugin).await.unwrap();
        self.marker
            .not_in("what InspectTask says", &format!("{reported:?}"));
        // The exit is reported a moment before systemd-nspawn and the last processes have ended.
        let left = self.marker.in_environments();
        eventually("the end of all processes of the task", || {
            !left.keys().any(|pid| self.marker.in_environment(*pid))
                && self.marker.in_command_lines().is_empty()
        })
        .await;
        self.search(&format!("after {death:?}"), None);
        running.destroy(&plugin).await;
        let said = running.stdout.all().await + &running.stderr.all().await;
        self.marker.not_in("the task's log", &said);
        self.world.is_clean(&plugin).await;
        self.search(&format!("destroyed after {death:?}"), None);
        plugin
    }

    /// Waits until the payload runs and has the secrets, so that the search has something to find.
    pub(super) async fn is_up(&self, running: &Running) {
        if self.mode != Mode::Boot {
            running.stdout.contains("up").await;
        }
        let inside = || {
            let mut pending = vec![running.leader()];
            while let Some(pid) = pending.pop() {
                if self.marker.in_environment(pid) {
                    return true;
                }
                pending.extend(children(pid));
            }
            false
        };
        eventually("the payload has its secrets", inside).await;
    }

    async fn strike(&self, mut plugin: Plugin, running: &Running, death: Death) -> Plugin {
        let end = |pid: i32| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        match death {
            Death::Exit(_) | Death::Signal(_) => {}
            Death::Stop => {
                running.stop(&plugin, Duration::from_millis(100), "").await;
            }
            Death::Leader => end(running.leader()),
            // A plain command is the leader itself, except with the fake.
            Death::Inside => end(first_child(running.leader()).unwrap_or_else(|| running.leader())),
            Death::Nspawn => end(running.nspawn()),
            Death::Supervisor => end(running.supervisor()),
            Death::Plugin => {
                plugin.kill().await;
                self.search("without a plugin", Some(running.nspawn()));
                plugin = self.world.recovered(running).await;
                self.search("recovered", Some(running.nspawn()));
                running.stop(&plugin, Duration::ZERO, "").await;
            }
        }
        plugin
    }
}

#[rstest]
#[tokio::test]
async fn no_exit_of_a_task_shows_a_secret(
    world: impl World,
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
    #[values(247, 249, 250, 252, 257)] version: u32,
) {
    let Some(case) = Case::new(world, mode, version) else {
        return;
    };
    let mut plugin = case.world.plugin().await;
    let reported = events(&plugin).await;
    // An init that is simulated has no child.
    let can_be = |death: &Death| mode != Mode::Boot || *death != Death::Inside;
    for death in DEATHS.into_iter().filter(can_be) {
        plugin = case.dies(plugin, death).await;
    }
    // The last death was that of this plugin, so its event stream has ended.
    let reported = within("the end of the events", reported).await.unwrap();
    assert!(reported.contains(NO_NAME), "{reported}");
    case.marker.not_in("an event", &reported);
    case.world.leave(plugin).await;
}

/// Collects all events of a plugin as text until its stream ends.
async fn events(plugin: &Plugin) -> JoinHandle<String> {
    let mut events = plugin.events().await.unwrap();
    tokio::spawn(async move {
        let mut reported = String::new();
        while let Ok(Some(event)) = events.message().await {
            reported += &format!("{event:?}\n");
        }
        reported
    })
}

/// While the secrets are in files on disk, and while they are passed on: no other process has them at these moments.
#[rstest]
#[tokio::test]
async fn a_paused_start_shows_no_secret(
    world: impl World,
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
    #[values(
        Failpoint::OrderWritten,
        Failpoint::CgroupMade,
        Failpoint::Entered,
        Failpoint::Spawned,
        Failpoint::Heard
    )]
    point: Failpoint,
) {
    let Some(case) = Case::new(world, mode, 252) else {
        return;
    };
    let plugin = Arc::new(case.world.plugin().await);
    let mut trap = Trap::at(&case.world.state(), point);
    let allocation = case.allocation(case.task(ON_AND_ON));
    let _logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(&plugin));
    let start = tokio::spawn(async move { line.start(config).await });
    let (_, held) = within("the step", trap.reached()).await;
    let (nspawn, on_disk): (_, &[&str]) = match point {
        Failpoint::Entered => (Some(held), &[]),
        // The process continues meanwhile and may or may not have read them.
        Failpoint::Spawned => (first_child(held), &ON_DISK),
        Failpoint::Heard => (first_child(held), &[]),
        _ => (None, &ON_DISK),
    };
    let found = case.search_but(&format!("at {point:?}"), nspawn, on_disk);
    let lie_there = matches!(point, Failpoint::OrderWritten | Failpoint::CgroupMade);
    assert!(!lie_there || found > 0, "nothing was there to be found");
    drop(trap);
    within("StartTask", start).await.unwrap().unwrap();
    let record = TaskDir::for_task(&case.world.state(), &id).running();
    case.search("while it runs", Some(record.unwrap().nspawn.pid));
    within("DestroyTask", plugin.destroy(&id, true))
        .await
        .unwrap();
    case.search("destroyed", None);
    case.world.leave(Arc::into_inner(plugin).unwrap()).await;
}
