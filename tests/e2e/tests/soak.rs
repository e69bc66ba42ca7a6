//! Hundreds of tasks live and die while something kills plugin, supervisors, systemd-nspawn and payloads at random moments, and the
//! host does each time what Nomad would. Nothing may be lost without a word, nothing may hang, and in the end nothing may be
//! left. `SOAK_SEED` repeats the choices of a run, `SOAK_LIVES` makes it shorter or longer. The moments are the scheduler's.

#![expect(
    clippy::print_stdout,
    reason = "the figures and the seed of a run are for its reader"
)]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::stage::{Stage, end, within};
use nomad_driver_nspawn::host::{HostError, Plugin, TaskExit, TaskSpec};
use nomad_driver_nspawn::proto::driver::TaskHandle;
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::supervisor::Records;
use nomad_driver_nspawn::supervisor::orphans::supervisors;
use nomad_driver_nspawn::supervisor::process::{Held, first_child};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

const LIVES: usize = 500;
/// How many live at the same time.
const WORKERS: usize = 6;
/// Into how many parts the life of the last plugin is cut, whose memory is looked at after each.
const PARTS: usize = 10;
/// What the plugin's own memory may grow by over the second half of them: allocators keep what they once had.
const GROWTH_KIB: u64 = 512;

/// Numbers that look like chance and can be had again (splitmix64).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let count = u64::try_from(choices.len()).unwrap();
        choices[usize::try_from(self.roll(count)).unwrap()]
    }
}

/// What becomes of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It ends by itself, with this code.
    Ends(i32),
    /// The agent stops it, with so many milliseconds of grace.
    Stopped(u64),
    /// The agent destroys it while it runs.
    Destroyed,
    /// Somebody kills one of its processes while it runs.
    Struck(Role),
    /// Somebody kills one of its processes while it is started.
    StruckEarly(Role),
    /// Somebody kills the plugin while it runs.
    PluginDies,
    /// Somebody kills the plugin while it is started.
    PluginDiesEarly,
    /// Somebody kills the plugin and the task's supervisor.
    BothDie,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Supervisor,
    Nspawn,
    Leader,
    Payload,
}

impl Fate {
    fn choose(dice: &mut Dice, plugin_may_die: bool) -> Self {
        let early = [Role::Supervisor, Role::Nspawn, Role::Leader];
        match dice.roll(100) {
            0..25 => Self::Ends(dice.one_of(&[0, 1, 7, 42, 255])),
            25..40 => Self::Stopped(dice.one_of(&[0, 50, 20_000])),
            40..48 => Self::Destroyed,
            48..72 => Self::Struck(dice.one_of(&[
                Role::Supervisor,
                Role::Nspawn,
                Role::Leader,
                Role::Payload,
            ])),
            72..92 => Self::StruckEarly(dice.one_of(&early)),
            _ if !plugin_may_die => Self::Ends(3),
            92..96 => Self::PluginDies,
            96..98 => Self::PluginDiesEarly,
            _ => Self::BothDie,
        }
    }

    /// Whether nobody may be left who can tell its end.
    fn may_be_lost(self) -> bool {
        matches!(
            self,
            Self::BothDie | Self::Struck(Role::Supervisor) | Self::StruckEarly(Role::Supervisor)
        )
    }

    fn script(self) -> String {
        match self {
            Self::Ends(code) => format!("echo up; exit {code}"),
            Self::Stopped(20_000) => {
                "trap 'exit 9' TERM; echo up; while :; do sleep 0.02; done".to_owned()
            }
            _ => "trap '' TERM INT; echo up; while :; do sleep 0.05; done".to_owned(),
        }
    }
}

/// The plugin of the moment. A dead one is followed by another, as by Nomad's agent.
#[derive(Debug)]
struct Arena {
    stage: Stage,
    plugin: watch::Sender<Arc<Plugin>>,
    launching: tokio::sync::Mutex<()>,
    /// The pids of those that were killed.
    killed: Mutex<Vec<i32>>,
    /// How long every task took from its start to its removal.
    took: Mutex<Vec<(Duration, String)>>,
    trees: AtomicUsize,
    /// What each worker is at.
    steps: [Mutex<String>; WORKERS],
    lost: AtomicUsize,
    refused: AtomicUsize,
}

impl Arena {
    fn plugin(&self) -> Arc<Plugin> {
        Arc::clone(&self.plugin.borrow())
    }

    fn kill_plugin(&self) {
        let pid = self.plugin().pid();
        let mut killed = self.killed.lock().unwrap();
        // Noted before anybody can notice. One that another worker has killed is as dead as it should be.
        if !killed.contains(&pid) {
            killed.push(pid);
            Held::by_pid(pid).unwrap().signal(Signal::KILL).unwrap();
        }
    }

    /// Whether this plugin was killed, so that a call on it may fail.
    fn is_killed(&self, plugin: &Plugin) -> bool {
        self.killed.lock().unwrap().contains(&plugin.pid())
    }

    /// A tree that nobody has used.
    fn tree(&self) -> PathBuf {
        let number = self.trees.fetch_add(1, Ordering::Relaxed);
        let tree = self.stage.tree(&format!("tree{number}"));
        // Ephemeral ones are copied whole, and nothing else is used.
        let used = ["busybox", "getent", "sh", "sleep"].map(OsString::from);
        for entry in fs::read_dir(tree.join("bin")).unwrap().flatten() {
            if !used.contains(&entry.file_name()) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        tree
    }

    /// Notes what a worker is at, for the case that it hangs.
    fn at(&self, worker: usize, step: &str, id: &str) {
        *self.steps[worker].lock().unwrap() = format!("{step} {id}");
    }

    /// All that is known of a worker that hangs.
    fn report(&self, worker: usize, what: &str) -> String {
        let step = self.steps[worker].lock().unwrap().clone();
        let id = step.split(' ').nth(1).unwrap_or_default();
        let records = Records::of(&self.stage.join("state"), id);
        let files = fs::read_dir(records.path()).into_iter().flatten().flatten();
        let files: Vec<_> = files.map(|entry| entry.file_name()).collect();
        let processes: Vec<_> = self.stage.marks().processes();
        let processes: Vec<_> = processes
            .iter()
            .map(|found| format!("{} {}", found.pid, found.command))
            .collect();
        format!(
            "{what} hangs in {step}, record {} with {files:?}\nprocesses:\n{}\nlog:\n{}",
            records.path().display(),
            processes.join("\n"),
            self.stage.log()
        )
    }

    /// A call that may only fail because the plugin was killed.
    #[track_caller]
    fn made<T>(
        &self,
        plugin: &Plugin,
        what: &str,
        fate: Fate,
        answer: Result<T, HostError>,
    ) -> Option<T> {
        match answer {
            Ok(answer) => Some(answer),
            Err(_) if self.is_killed(plugin) => None,
            Err(error) => panic!("{what} of {fate:?}: {error:?}\n{}", self.stage.log()),
        }
    }

    /// The one after this one, which has died.
    async fn successor(&self, dead: &Plugin) -> Arc<Plugin> {
        let _one_at_a_time = self.launching.lock().await;
        if self.plugin().pid() == dead.pid() {
            let next = self.stage.plugin_with_one_heap(options("3s")).await;
            self.plugin.send_replace(Arc::new(next));
        }
        self.plugin()
    }
}

fn options(reconcile_after: &str) -> Value {
    json!({ "reconcile_after": reconcile_after })
}

/// One worker's tasks, one after the other, each in the worker's own tree.
async fn work(
    arena: Arc<Arena>,
    worker: usize,
    seed: u64,
    left: Arc<AtomicUsize>,
    plugin_may_die: bool,
) {
    let mut tree = arena.tree();
    let mut dice = Dice(
        seed ^ u64::try_from(worker)
            .unwrap()
            .wrapping_mul(0x517c_c1b7_2722_0a95),
    );
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        })
        .is_ok()
    {
        let fate = Fate::choose(&mut dice, plugin_may_die);
        let mut task = arena.stage.shell(&fate.script()).with("image", json!(tree));
        match dice.roll(5) {
            0 => task = task.with("ephemeral", true),
            1 => task = task.with("volatile", "overlay"),
            2 => task = task.with("process_two", true),
            3 => task = task.with("read_only", true),
            _ => {}
        }
        let what = format!("{fate:?} with {}", task.spec.config);
        let begin = Instant::now();
        let life = live(&arena, worker, &mut dice, task.spec, &mut tree, fate);
        tokio::time::timeout(e2e::DEADLINE, life)
            .await
            .unwrap_or_else(|_| panic!("{}", arena.report(worker, &what)));
        arena.took.lock().unwrap().push((begin.elapsed(), what));
    }
}

async fn live(
    arena: &Arena,
    worker: usize,
    dice: &mut Dice,
    mut spec: TaskSpec,
    tree: &mut PathBuf,
    fate: Fate,
) {
    let two = spec.config["process_two"] == true;
    let Some(Up {
        mut plugin,
        handle,
        mut said,
    }) = start(arena, worker, dice, &mut spec, tree, fate).await
    else {
        return;
    };
    let id = handle.config.as_ref().unwrap().id.clone();
    // It says so, or it has ended: an early strike may have hit it.
    arena.at(worker, "output", &id);
    let _ = said.wait_for(|said| *said).await;
    match fate {
        Fate::Struck(role) => strike(&arena.stage, &id, role, two),
        Fate::PluginDies => arena.kill_plugin(),
        Fate::BothDie => {
            arena.kill_plugin();
            strike(&arena.stage, &id, Role::Supervisor, two);
        }
        Fate::Stopped(grace) => {
            arena.at(worker, "StopTask", &id);
            let stopped = plugin.stop(&id, Duration::from_millis(grace), "").await;
            arena.made(&plugin, "StopTask", fate, stopped);
        }
        Fate::StruckEarly(_) | Fate::PluginDiesEarly => {
            arena.at(worker, "StopTask", &id);
            let stopped = plugin.stop(&id, Duration::ZERO, "").await;
            arena.made(&plugin, "StopTask", fate, stopped);
        }
        Fate::Ends(_) | Fate::Destroyed => {}
    }
    if fate != Fate::Destroyed {
        // As Nomad: a wait that breaks off is followed by a recovery on the next plugin.
        loop {
            arena.at(worker, "WaitTask", &id);
            let exit = plugin.wait(&id).await;
            if let Some(exit) = arena.made(&plugin, "WaitTask", fate, exit) {
                judge(fate, &exit);
                break;
            }
            arena.at(worker, "Launch", &id);
            plugin = arena.successor(&plugin).await;
            arena.at(worker, "RecoverTask", &id);
            match plugin.recover(handle.clone()).await {
                Err(_) if fate.may_be_lost() && !arena.is_killed(&plugin) => {
                    arena.lost.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                recovered => {
                    arena.made(&plugin, "RecoverTask", fate, recovered);
                }
            }
            if !matches!(fate, Fate::Ends(_)) {
                arena.at(worker, "StopTask", &id);
                let stopped = plugin.stop(&id, Duration::ZERO, "").await;
                arena.made(&plugin, "StopTask", fate, stopped);
            }
        }
    }
    loop {
        arena.at(worker, "DestroyTask", &id);
        let destroyed = plugin.destroy(&id, true).await;
        if arena
            .made(&plugin, "DestroyTask", fate, destroyed)
            .is_some()
        {
            return;
        }
        arena.at(worker, "Launch", &id);
        plugin = arena.successor(&plugin).await;
    }
}

/// A task that has started.
struct Up {
    plugin: Arc<Plugin>,
    handle: TaskHandle,
    /// Whether it has said something, or never will.
    said: watch::Receiver<bool>,
}

/// Reads a stream to its end and tells of its beginning.
fn listen(mut from: tokio::net::unix::pipe::Receiver) -> watch::Receiver<bool> {
    let (saying, said) = watch::channel(false);
    tokio::spawn(async move {
        let mut buffer = [0; 1024];
        while from.read(&mut buffer).await.unwrap_or(0) > 0 {
            saying.send_replace(true);
        }
        saying.send_replace(true);
    });
    said
}

/// Starts a task, on the next plugin if this one dies. `None` if what was struck failed the start, with a reason.
async fn start(
    arena: &Arena,
    worker: usize,
    dice: &mut Dice,
    spec: &mut TaskSpec,
    tree: &mut PathBuf,
    fate: Fate,
) -> Option<Up> {
    let mut plugin = arena.plugin();
    let mut again = false;
    loop {
        let allocation = arena.stage.allocation_of(spec);
        let logs = allocation.open_logs().expect("the logs");
        let (said, _) = (listen(logs.stdout), listen(logs.stderr));
        let config = plugin.task_config(&allocation).await;
        let Some(config) = arena.made(&plugin, "TaskConfigSchema", fate, config) else {
            plugin = arena.successor(&plugin).await;
            continue;
        };
        let id = config.id.clone();
        arena.at(worker, "StartTask", &id);
        let moment = Duration::from_micros(dice.roll(60_000));
        let attack = async {
            // Not a wait: the moment of the attack is what is random here.
            tokio::time::sleep(moment).await;
            match fate {
                Fate::StruckEarly(role) => strike(&arena.stage, &id, role, false),
                Fate::PluginDiesEarly if !again => arena.kill_plugin(),
                _ => {}
            }
        };
        let (started, ()) = tokio::join!(plugin.start(config), attack);
        match started {
            Ok(started) => {
                let handle = started.handle;
                return Some(Up {
                    plugin,
                    handle,
                    said,
                });
            }
            Err(_) if arena.is_killed(&plugin) => {
                again = true;
                // It may be up without anybody who knows of it, and then it keeps its tree for a while.
                *tree = arena.tree();
                spec.config["image"] = json!(tree);
                plugin = arena.successor(&plugin).await;
            }
            Err(_) if matches!(fate, Fate::StruckEarly(_)) => {
                arena.refused.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            Err(error) => panic!("StartTask of {fate:?}: {error}\n{}", arena.stage.log()),
        }
    }
}

/// Kills one of a task's processes, if it is there.
fn strike(stage: &Stage, id: &str, role: Role, two: bool) {
    let state_dir = stage.join("state");
    let records = Records::of(&state_dir, id);
    let found = supervisors(&state_dir)
        .into_iter()
        .find(|supervisor| supervisor.directory == records.path());
    let Some(supervisor) = found.map(|found| found.held) else {
        return;
    };
    let nspawn = || first_child(supervisor.process().pid);
    let leader = || first_child(nspawn()?);
    let target = match role {
        Role::Supervisor => Some(supervisor.process().pid),
        Role::Nspawn => nspawn(),
        Role::Leader => leader(),
        // The command is the leader itself, but for a second process.
        Role::Payload if two => leader().and_then(first_child),
        Role::Payload => leader(),
    };
    if let Some(held) = target.and_then(|pid| Held::by_pid(pid).ok()) {
        held.signal(Signal::KILL).unwrap();
    }
}

/// Whether this end is a true one for this fate.
fn judge(fate: Fate, exit: &TaskExit) {
    let fine = match fate {
        Fate::Ends(code) => exit.code == code && exit.error.is_none(),
        Fate::Stopped(20_000) => exit.code == 9 || exit.code == 137,
        Fate::Struck(Role::Supervisor | Role::Nspawn) => exit.code != 0 && exit.error.is_some(),
        _ => exit.code != 0,
    };
    assert!(fine, "{fate:?}: {exit:?}");
}

/// The memory that is a process's own, in KiB.
fn own_memory(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap()
}

/// Control groups, mounts, processes and files of systemd-nspawn on the machine. Others may be at work on it, so they are only told.
fn machine() -> [usize; 4] {
    fn below(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| 1 + below(&entry.path()))
            .sum()
    }
    let count = |dir: &str| fs::read_dir(dir).into_iter().flatten().count();
    let numbers = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().parse::<i32>().is_ok();
    [
        below(Path::new("/sys/fs/cgroup")),
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count(),
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(numbers)
            .count(),
        ["propagate", "locks", "unix-export"]
            .map(|name| count(&format!("/run/systemd/nspawn/{name}")))
            .iter()
            .sum(),
    ]
}

async fn crowd(arena: &Arc<Arena>, lives: usize, seed: u64, plugin_may_die: bool) {
    let left = Arc::new(AtomicUsize::new(lives));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            tokio::spawn(work(
                Arc::clone(arena),
                worker,
                seed,
                Arc::clone(&left),
                plugin_may_die,
            ))
        })
        .collect();
    for worker in workers {
        worker.await.expect("a worker");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_hundreds_of_lives_and_deaths_nothing_is_left() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let seed =
        number("SOAK_SEED").unwrap_or_else(|| u64::from_str_radix(&e2e::unique(), 16).unwrap());
    let lives = number("SOAK_LIVES").map_or(LIVES, |lives| usize::try_from(lives).unwrap());
    println!("SOAK_SEED={seed} SOAK_LIVES={lives}");
    let before = machine();
    let begin = Instant::now();
    let stage = Stage::new();
    let first = stage.plugin_with_one_heap(options("3s")).await;
    let arena = Arc::new(Arena {
        stage,
        plugin: watch::Sender::new(Arc::new(first)),
        launching: tokio::sync::Mutex::default(),
        killed: Mutex::default(),
        took: Mutex::default(),
        steps: Default::default(),
        trees: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
    });
    crowd(&arena, lives / 2, seed, true).await;
    // From here on it is one plugin, whose memory can be compared with itself.
    let plugin = arena.plugin();
    if arena.is_killed(&plugin) {
        arena.successor(&plugin).await;
    }
    drop(plugin);
    let pid = arena.plugin().pid();
    let mut memory = Vec::new();
    for part in 1..=PARTS {
        let seed = seed.wrapping_add(u64::try_from(part).unwrap());
        crowd(&arena, lives / 2 / PARTS, seed, false).await;
        memory.push(own_memory(pid));
    }
    assert_eq!(arena.plugin().pid(), pid, "the plugin died by itself");

    // What dead plugins have left is nobody's: the next one clears it away.
    arena.kill_plugin();
    let last = arena.stage.plugin_with(options("100ms")).await;
    let state = arena.stage.join("state");
    within("an empty state directory", async {
        while fs::read_dir(&state).unwrap().next().is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    end(last).await;
    let arena = Arc::into_inner(arena).expect("all workers have ended");
    println!(
        "{lives} lives in {:.1} s: {} deaths of the plugin, {} tasks lost with it and their supervisor, {} struck while starting",
        begin.elapsed().as_secs_f64(),
        arena.killed.lock().unwrap().len(),
        arena.lost.load(Ordering::Relaxed),
        arena.refused.load(Ordering::Relaxed),
    );
    println!(
        "the plugin's own memory in KiB, every {} lives: {memory:?}",
        lives / 2 / PARTS
    );
    let mut took = arena.took.into_inner().unwrap();
    took.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    println!(
        "half of them took at most {:?}; the longest:",
        took[took.len() / 2].0
    );
    for (time, what) in took.iter().take(10) {
        println!("  {time:?} {what}");
    }
    drop(arena.plugin);
    arena.stage.leave();
    println!(
        "groups, mounts, processes, files of systemd-nspawn: {before:?} before, {:?} after",
        machine()
    );
    let (warm, hot) = (memory[PARTS / 2 - 1], memory[PARTS - 1]);
    assert!(
        hot <= warm + GROWTH_KIB,
        "the plugin grew from {warm} to {hot} KiB"
    );
}
