//! The fault matrix: every process of a task is killed at every step of the task's life, and then Nomad does what it does next.
//! One suite, two worlds: `main.rs` plays every cell on the fake, the end-to-end tests play more than a third on the real systemd-nspawn.
//! A cell that can't be says why. What a cell owes is in [`plan`], how it is played in [`play`].

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nomad_driver_nspawn::host::{Plugin, TaskSpec};
use serde_json::Value;

mod plan;
mod play;
mod table;
pub(crate) mod trap;

use plan::{Again, Step, Victim};
pub(crate) use plan::{Cell, cells};

/// One cell's machine: a state directory and a tree of its own, and a systemd-nspawn.
pub(crate) trait World {
    /// The plugin's state directory.
    fn state(&self) -> PathBuf;
    /// An existing directory for allocations.
    fn allocations(&self) -> PathBuf;
    /// What a plugin is configured with.
    fn config(&self) -> Value;
    /// Starts a plugin as Nomad does, configured.
    fn plugin(&self) -> impl Future<Output = Plugin>;
    /// A task that runs this shell text, as the first process or as the second.
    fn task(&self, text: &str, process_two: bool) -> TaskSpec;
    /// A file that stands where the payload sees it: its path here, and its path there.
    fn gate(&self) -> (PathBuf, String);
    /// A trap for the next systemd-nspawn at this moment.
    fn hold_nspawn(&self, moment: Moment) -> trap::Trap;
    /// The driver's own first program of a container with this first process.
    fn init(&self, leader: i32) -> Option<i32>;
    /// The plugins' log so far.
    fn log(&self) -> String;
    /// Fails if a process, a mount or a file is left when this plugin alone still runs.
    fn assert_clean(&self, plugin: i32) -> impl Future<Output = ()>;
    /// The end of a cell that was played through, when its plugin is gone too.
    fn leave(self);
}

/// Where a systemd-nspawn can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The container is started, the notification not sent.
    BeforeNotify,
    /// The container has ended, systemd-nspawn has not.
    BeforeExit,
}

/// What a run was asked for on its command line: `--list`, or parts of the names of cells.
#[derive(Debug)]
pub(crate) struct Asked {
    list: bool,
    words: Vec<String>,
}

impl Asked {
    /// As the words of this process have it. The test runner's own options are passed over.
    pub(crate) fn of_this_process() -> Self {
        let mut asked = Self {
            list: false,
            words: Vec::new(),
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match &*word {
                "--list" => asked.list = true,
                "--test-threads" | "--skip" | "--format" | "--color" | "--logfile" => {
                    words.next();
                }
                option if option.starts_with('-') => {}
                _ => asked.words.push(word),
            }
        }
        asked
    }

    fn wants(&self, cell: &Cell) -> bool {
        let name = cell.to_string();
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word))
    }
}

/// Plays those of the cells that are asked for, and prints what came of them: the failures, then the table.
pub(crate) fn report<W: World>(
    mut cells: Vec<Cell>,
    at_once: usize,
    world: impl Fn() -> W + Sync,
) -> ExitCode {
    let asked = Asked::of_this_process();
    cells.retain(|cell| asked.wants(cell));
    let mut out = std::io::stdout().lock();
    if asked.list {
        for cell in cells {
            let _ = writeln!(out, "{cell}: test");
        }
        return ExitCode::SUCCESS;
    }
    if cells.is_empty() {
        let _ = writeln!(out, "the fault matrix: no cell is called {:?}", asked.words);
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    let results = run(&cells, at_once, world);
    let time = start.elapsed();
    let played: Vec<_> = cells.into_iter().zip(results).collect();
    let mut failed = false;
    for (cell, result) in &played {
        if let Err(text) = result {
            failed = true;
            let _ = writeln!(out, "FAILED {cell}: {text}");
        }
    }
    let _ = out.write_all(table::table(&played, time).as_bytes());
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// Plays these cells in as many worlds at a time as `at_once` says, and gives what came out, in the order of the cells.
fn run<W: World>(
    cells: &[Cell],
    at_once: usize,
    world: impl Fn() -> W + Sync,
) -> Vec<Result<String, String>> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(vec![Err("not played".to_owned()); cells.len()]);
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some((index, cell)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    cells.get(index).map(|cell| (index, *cell))
                } {
                    let result = one(cell, &world);
                    results.lock().unwrap_or_else(PoisonError::into_inner)[index] = result;
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn one<W: World>(cell: Cell, world: &(impl Fn() -> W + Sync)) -> Result<String, String> {
    // A thread of its own, so that a panic is this cell's failure alone and its text is told with the cell's name.
    let played = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(cell.to_string());
        let thread = thread.spawn_scoped(scope, || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(play::play(world(), cell))
        });
        thread.unwrap().join()
    });
    played.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}
