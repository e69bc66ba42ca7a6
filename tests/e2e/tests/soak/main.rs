//! Runs hundreds of tasks while plugin, supervisors, systemd-nspawn and payloads are killed at random moments, and the host reacts each
//! time as Nomad would. No exit may be lost without an error, nothing may hang, and nothing may be left in the end. `SOAK_SEED` repeats the
//! choices of a run, `SOAK_LIVES` changes its length. The exact moments depend on the scheduler.

#![expect(
    clippy::print_stdout,
    reason = "the run prints its figures and its seed"
)]

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dev_agent::{HostError, Plugin, TaskExit};
use e2e::stage::{Namespace, Stage, Task, end, within};
use e2e::udev::Udev;
use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::cleanup::orphans::supervisors;
use nomad_driver_nspawn::proto::driver::TaskHandle;
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::{ProcessHandle, first_child};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

mod fate;

use fate::{Dice, Fate, Role, judge, strike};

mod machine;

use machine::{Machine, holds, idle_threads_end, own_memory};

const LIVES: usize = 500;
/// The number of concurrent tasks.
const WORKERS: usize = 6;
/// The number of parts of the last plugin's run; its memory is measured after each.
const PARTS: usize = 10;
/// How many measurements at the end of each half are compared, each after the plugin has been idle.
const COMPARED: usize = 3;
/// The allowed growth of the plugin's own memory over the second half of the parts: allocators keep used memory, and grow ever less.
const GROWTH_KIB: u64 = 320;
/// The allowed growth of the kernel's own memory meanwhile, per task: other programs use the machine too.
const KERNEL_KIB: u64 = 64;

/// The current plugin. A dead one is replaced by another, as Nomad's agent does.
#[derive(Debug)]
struct Arena {
    stage: Stage,
    udev: Udev,
    network: Namespace,
    plugin: watch::Sender<Arc<Plugin>>,
    launching: tokio::sync::Mutex<()>,
    /// The pids of the killed plugins.
    killed: Mutex<Vec<i32>>,
    /// The time from start to removal of every task.
    took: Mutex<Vec<(Duration, String)>>,
    trees: AtomicUsize,
    /// The current step of each worker.
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
        // Recorded before the death can be noticed. A plugin that another worker has killed is not killed again.
        if !killed.contains(&pid) {
            killed.push(pid);
            ProcessHandle::open(pid)
                .unwrap()
                .signal(Signal::KILL)
                .unwrap();
        }
    }

    /// Whether this plugin was killed, so that a call to it may fail.
    fn is_killed(&self, plugin: &Plugin) -> bool {
        self.killed.lock().unwrap().contains(&plugin.pid())
    }

    /// An unused tree and image.
    fn home(&self) -> Home {
        let tree = self.tree();
        let name = tree.with_extension("raw");
        let image = self
            .stage
            .image(name.file_name().unwrap().to_str().unwrap(), &tree);
        Home { tree, image }
    }

    /// An unused tree, with an init that takes a shell's arguments.
    fn tree(&self) -> PathBuf {
        let number = self.trees.fetch_add(1, Ordering::Relaxed);
        let tree = self.stage.tree(&format!("tree{number}"));
        // Ephemeral trees are copied completely, so everything that is not used is removed.
        let used = ["busybox", "getent", "sh", "sleep"].map(OsString::from);
        for entry in fs::read_dir(tree.join("bin")).unwrap().flatten() {
            if !used.contains(&entry.file_name()) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        fs::create_dir_all(tree.join("sbin")).unwrap();
        let init = tree.join("sbin/init");
        fs::write(&init, "#!/bin/sh\nexec /bin/sh \"$@\"\n").unwrap();
        fs::set_permissions(init, fs::Permissions::from_mode(0o755)).unwrap();
        tree
    }

    /// Records a worker's current step, for the report if it hangs.
    fn at(&self, worker: usize, step: &str, id: &str) {
        *self.steps[worker].lock().unwrap() = format!("{step} {id}");
    }

    /// Everything known about a worker that hangs.
    fn report(&self, worker: usize, what: &str) -> String {
        let step = self.steps[worker].lock().unwrap().clone();
        let id = step.split(' ').nth(1).unwrap_or_default();
        let task_dir = TaskDir::for_task(&self.stage.join("state"), id);
        let files = fs::read_dir(task_dir.path())
            .into_iter()
            .flatten()
            .flatten();
        let files: Vec<_> = files.map(|entry| entry.file_name()).collect();
        let processes: Vec<_> = self.stage.marks().processes();
        let processes: Vec<_> = processes
            .iter()
            .map(|found| format!("{} {}", found.pid, found.command))
            .collect();
        format!(
            "{what} hangs in {step}, record {} with {files:?}\nprocesses:\n{}\nlog:\n{}",
            task_dir.path().display(),
            processes.join("\n"),
            self.stage.log()
        )
    }

    /// The response to a call, which may fail only if the plugin was killed.
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

    /// The plugin after this dead one.
    async fn successor(&self, dead: &Plugin) -> Arc<Plugin> {
        let _one_at_a_time = self.launching.lock().await;
        if self.plugin().pid() == dead.pid() {
            self.launch().await;
        }
        self.plugin()
    }

    /// Launches another plugin, without reconciliation: on a busy machine it may take long until all tasks are recovered.
    async fn launch(&self) {
        let next = self
            .stage
            .plugin_for_images(&self.udev, json!({ "reconcile_after": "0" }));
        self.plugin.send_replace(Arc::new(next.await));
    }

    /// The task directories.
    fn recorded(&self) -> Vec<PathBuf> {
        support::starts_in(&self.stage.join("state"))
    }

    /// Runs a plugin that removes the leftovers of dead ones.
    async fn clear_away(&self) {
        let plugin = self
            .stage
            .plugin_with(&json!({ "reconcile_after": "100ms" }))
            .await;
        // The first task of its agent shows the plugin which leftovers belong to this agent.
        let task = self.stage.start(&plugin, self.stage.shell("exit 0")).await;
        task.wait(&plugin).await;
        task.destroy(&plugin).await;
        within("an empty state directory", async {
            while !self.recorded().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        end(plugin).await;
    }
}

/// The roots of one worker.
#[derive(Debug)]
struct Home {
    tree: PathBuf,
    image: PathBuf,
}

/// One of the ways of running a task.
fn vary(arena: &Arena, dice: &mut Dice, home: &Home, script: &str) -> Task {
    let task = arena.stage.shell(script).with("image", json!(home.tree));
    match dice.roll(10) {
        0 => task.with("ephemeral", true),
        1 => task.with("volatile", "overlay"),
        2 => task.with("process_two", true),
        3 => task.with("read_only", true),
        4 => task.with("user_namespacing", true),
        5 => task.with("image", json!(home.image)),
        6 => task
            .with("image", json!(home.image))
            .with("ephemeral", true),
        7 => task
            .with("boot", true)
            .with("command", json!(["-c", script])),
        8 => task.network(&arena.network.path()),
        _ => task,
    }
}

/// Runs one worker's tasks sequentially, each in the worker's own tree.
async fn work(
    arena: Arc<Arena>,
    worker: usize,
    seed: u64,
    left: Arc<AtomicUsize>,
    plugin_may_die: bool,
) {
    let mut home = arena.home();
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
        let task = vary(&arena, &mut dice, &home, &fate.script());
        let network = task
            .network
            .as_ref()
            .map_or("", |_| ", a network of its own");
        let what = format!("{fate:?} with {}{network}", task.spec.config);
        let begin = Instant::now();
        let life = live(&arena, worker, &mut dice, task, &mut home, fate);
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
    mut task: Task,
    home: &mut Home,
    fate: Fate,
) {
    let two = task.spec.config["process_two"] == true;
    let Some(Up {
        mut plugin,
        handle,
        mut said,
    }) = start(arena, worker, dice, &mut task, home, fate).await
    else {
        return;
    };
    let id = handle.config.as_ref().unwrap().id.clone();
    // It prints something, or it has exited: an early kill may have hit it.
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
        // As Nomad does: after an interrupted WaitTask it recovers the task on the next plugin.
        loop {
            arena.at(worker, "WaitTask", &id);
            let exit = plugin.wait(&id).await;
            if let Some(exit) = arena.made(&plugin, "WaitTask", fate, exit) {
                judge(fate, &exit, &task.spec.config);
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

/// A started task.
struct Up {
    plugin: Arc<Plugin>,
    handle: TaskHandle,
    /// True once it has printed something or can't any more.
    said: watch::Receiver<bool>,
}

/// Reads a stream to its end and reports the first output.
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

/// Starts a task, on the next plugin if this one dies. `None` if the kill made the start fail with an error.
async fn start(
    arena: &Arena,
    worker: usize,
    dice: &mut Dice,
    task: &mut Task,
    home: &mut Home,
    fate: Fate,
) -> Option<Up> {
    let mut plugin = arena.plugin();
    let mut again = false;
    loop {
        let allocation = arena.stage.allocation(task);
        let logs = allocation.open_logs().expect("the logs");
        let (said, _) = (listen(logs.stdout), listen(logs.stderr));
        let config = plugin.task_config(&allocation).await;
        let Some(mut config) = arena.made(&plugin, "TaskConfigSchema", fate, config) else {
            plugin = arena.successor(&plugin).await;
            continue;
        };
        config.network_isolation_spec = task.isolation();
        let id = config.id.clone();
        arena.at(worker, "StartTask", &id);
        let moment = Duration::from_micros(dice.roll(60_000));
        let attack = async {
            // Not a wait for something: the random moment of the kill.
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
                // The container may be running without the new plugin knowing it, and then keeps its tree locked for a while.
                let on_disk = task.spec.config["image"] == json!(home.image);
                *home = arena.home();
                let root = if on_disk { &home.image } else { &home.tree };
                task.spec.config["image"] = json!(root);
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
async fn hundreds_of_tasks_leave_nothing_behind() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let seed =
        number("SOAK_SEED").unwrap_or_else(|| u64::from_str_radix(&e2e::unique(), 16).unwrap());
    let lives = number("SOAK_LIVES").map_or(LIVES, |lives| usize::try_from(lives).unwrap());
    println!("SOAK_SEED={seed} SOAK_LIVES={lives}");
    let begin = Instant::now();
    let stage = Stage::new();
    let udev = stage.udev();
    let network = Namespace::new(stage.name());
    let options = json!({ "reconcile_after": "0" });
    let first = stage.plugin_for_images(&udev, options).await;
    let arena = Arc::new(Arena {
        stage,
        udev,
        network,
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
    // The leftovers of dead plugins belong to no plugin and are removed here. After that a single plugin runs, which leaves nothing and
    // whose memory can be compared over time.
    arena.kill_plugin();
    arena.clear_away().await;
    arena.launch().await;
    let pid = arena.plugin().pid();
    let threads = holds(pid, "task");
    let part = lives / 2 / PARTS;
    let mut memory = Vec::new();
    let mut machine = Vec::new();
    let mut descriptors = Vec::new();
    for number in 1..=PARTS {
        let seed = seed.wrapping_add(u64::try_from(number).unwrap());
        crowd(&arena, part, seed, false).await;
        if (number - 1) % (PARTS / 2) >= PARTS / 2 - COMPARED {
            idle_threads_end(pid, threads).await;
        }
        memory.push(own_memory(pid));
        machine.push(Machine::now());
        descriptors.push(holds(pid, "fd"));
        assert_eq!(
            arena.recorded(),
            Vec::<PathBuf>::new(),
            "after part {number}"
        );
    }
    assert_eq!(arena.plugin().pid(), pid, "the plugin died by itself");
    println!(
        "{lives} lives in {:.1} s: {} deaths of the plugin, {} tasks lost with it and their supervisor, {} struck while starting",
        begin.elapsed().as_secs_f64(),
        arena.killed.lock().unwrap().len(),
        arena.lost.load(Ordering::Relaxed),
        arena.refused.load(Ordering::Relaxed),
    );
    println!("the plugin's own memory in KiB, every {part} lives: {memory:?}");
    println!(
        "its descriptors after each part: {descriptors:?}; its threads: {threads} at first, {} now",
        holds(pid, "task")
    );
    let mut took = std::mem::take(&mut *arena.took.lock().unwrap());
    took.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    println!(
        "half of them took at most {:?}; the longest:",
        took[took.len() / 2].0
    );
    for (time, what) in took.iter().take(10) {
        println!("  {time:?} {what}");
    }
    let (early, late) = (machine[0], machine[PARTS - 1]);
    println!("the machine: {early:?} early, {late:?} late");
    // Removed cgroups disappear with a delay.
    let lives = u64::try_from(part * (PARTS - 1)).unwrap();
    let deadline = Instant::now() + e2e::DEADLINE;
    let mut now = Machine::now();
    while !now.is_flat(&early, lives) {
        assert!(Instant::now() < deadline, "the machine still holds {now:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
        now = Machine::now();
    }
    let half = PARTS / 2;
    let (early, late) = (&memory[half - COMPARED..half], &memory[PARTS - COMPARED..]);
    // A leak is in every later measurement. What is not in all of them is memory that is free but lies between what is in use.
    let (most, least) = (early.iter().max().unwrap(), late.iter().min().unwrap());
    assert!(
        *least <= most + GROWTH_KIB,
        "the plugin grew from {early:?} to {late:?} KiB"
    );
    // The init binary of the first task and a user namespace stay open for the others; nothing else does.
    within("the descriptors that it had", async {
        while holds(pid, "fd") != descriptors[0] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // Idle threads exit with a delay.
    within("the threads that it had", async {
        while holds(pid, "task") > threads {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let arena = Arc::into_inner(arena).expect("all workers have ended");
    let plugin = arena.plugin();
    drop(arena.network);
    drop(arena.plugin);
    end(Arc::into_inner(plugin).expect("nobody else has it")).await;
    arena.stage.leave();
}
