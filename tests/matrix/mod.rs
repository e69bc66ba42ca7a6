//! The fault matrix: kills every process of a task at every step of the task's life and then acts as Nomad does next. One suite, two
//! worlds: `main.rs` runs every cell on the fake, the end-to-end tests run more than a third of them on the real systemd-nspawn. A cell
//! that is impossible gives a reason. [`plan`] defines the expected result of each cell, [`play`] runs it.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use support::wire;

mod plan;
mod play;
mod table;

use plan::{Again, Step, Victim};
pub(crate) use plan::{Cell, cells};

/// The machine of one cell: what every test of the plugin has, and what only the matrix needs.
pub(crate) trait World: wire::World {
    /// A trap for the next systemd-nspawn at this moment.
    fn hold_nspawn(&self, moment: Moment) -> support::trap::Trap;
    /// The driver's own init in the container with this leader.
    fn init(&self, leader: i32) -> Option<i32>;
}

/// The points at which a systemd-nspawn can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The container is started, the notification not sent.
    BeforeNotify,
    /// The container has ended, systemd-nspawn has not.
    BeforeExit,
}

/// Runs each cell as a test and prints the table of those that ran. At most `at_once` worlds exist at a time, unless `--test-threads` gives
/// another number.
pub(crate) fn report<W: World>(
    cells: Vec<Cell>,
    at_once: usize,
    world: impl Fn() -> W + Clone + Send + Sync + 'static,
) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(at_once);
    let (sender, results) = std::sync::mpsc::channel();
    let trial = |cell: Cell| {
        let (world, sender) = (world.clone(), sender.clone());
        Trial::test(cell.to_string(), move || {
            let result = one(cell, &world);
            let _ = sender.send((cell, result.clone()));
            result.map(drop).map_err(Failed::from)
        })
    };
    let trials = cells.into_iter().map(trial).collect();
    let start = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let played: Vec<_> = results.try_iter().collect();
    // nextest runs one cell per process, which makes no table.
    if played.len() > 1 {
        let text = table::table(&played, start.elapsed());
        let _ = std::io::stdout().write_all(text.as_bytes());
    }
    conclusion.exit_code()
}

fn one<W: World>(cell: Cell, world: &(impl Fn() -> W + Sync)) -> Result<String, String> {
    // In a thread of its own, so that a panic fails only this cell and its message is reported with the cell's name.
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
