//! What passes through a command in a running task, over the plugin's socket: how long a command takes from the call to its exit, how fast
//! data passes in both directions at once, compared byte for byte, and how the memory of plugin and supervisor grows meanwhile. Needs root, systemd-nspawn and
//! busybox (Debian: busybox-static). The comparison with Nomad's own driver needs an agent: `tests/e2e/benches/exec.rs`.
//!
//! `--check` exits with status 1 if a budget is exceeded. On a busy machine the result means little.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use dev_agent::{Allocation, ExecSession, Launch, Plugin, TaskSpec};
use nomad_driver_nspawn::proto::driver::{ExecTaskStreamingIoOperation, ExecTaskStreamingRequest};
use nomad_driver_nspawn::state::task_dir::TaskDir;
use serde_json::json;

mod figures;

use figures::{driver, is_check, kib, make_tree, ms, run};

/// Commands that are measured; the first ones warm the caches and are not counted.
const COMMANDS: usize = 60;
const WARM_UP: usize = 5;
const PAUSE: Duration = Duration::from_millis(100);
/// The budget from the call to the exit of `true`, in milliseconds.
const COMMAND: f64 = 10.0;
/// What passes through `cat` and back, and in which pieces.
const VOLUME: usize = 1 << 30;
const PIECE: usize = 64 << 10;
/// The budget for the speed in each direction, in MiB/s.
const SPEED: f64 = 100.0;
/// The budget for the growth of plugin and supervisor while it passes, in KiB.
const GROWTH: f64 = 4096.0;

fn main() -> anyhow::Result<ExitCode> {
    run(is_check(std::env::args().skip(1))?, measure())
}

/// Whether all budgets are met.
async fn measure() -> anyhow::Result<bool> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree, &["sh", "sleep", "true", "cat"])?;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    let state = scratch.path().join("state");
    plugin.configure(&json!({ "state_dir": state })).await?;
    let config =
        json!({ "image": tree, "boot": false, "command": ["/bin/sh", "-c", "exec sleep 100000"] });
    let allocation = Allocation::create(scratch.path(), TaskSpec::new("bench", config))?;
    let _logs = allocation.open_logs()?;
    let task = plugin.task_config(&allocation).await?;
    let id = task.id.clone();
    plugin.start(task).await?;
    let supervisor = TaskDir::for_task(&state, &id)
        .running()?
        .started
        .supervisor
        .pid;

    let mut times = Vec::new();
    for round in 0..WARM_UP + COMMANDS {
        tokio::time::sleep(PAUSE).await;
        let clock = Instant::now();
        let session = plugin.exec_streaming(&id, &["/bin/true"], None).await?;
        ensure!(exited(session).await? == 0, "true has failed");
        if round >= WARM_UP {
            times.push(ms(clock.elapsed()));
        }
    }
    times.sort_by(f64::total_cmp);
    let command = times[times.len() / 2];

    pass(&plugin, &id, VOLUME / 16).await?;
    let processes = [plugin.pid(), supervisor];
    let memory = || processes.map(|pid| kib(pid, "status", "VmRSS:"));
    let before = memory();
    let clock = Instant::now();
    let most = pass_watched(&plugin, &id, VOLUME, memory).await?;
    let speed = f64::from(u32::try_from(VOLUME >> 20)?) / clock.elapsed().as_secs_f64();
    let growth = (most[0] - before[0]).max(most[1] - before[1]);
    plugin.destroy(&id, true).await?;
    allocation.remove()?;
    plugin.shutdown().await;

    let mut met = true;
    let mut out = std::io::stdout().lock();
    for (what, figure, unit, budget, holds) in [
        (
            "from the call to the exit of true, median",
            command,
            "ms",
            COMMAND,
            command <= COMMAND,
        ),
        (
            "1 GiB through cat and back at once",
            speed,
            "MiB/s",
            SPEED,
            speed >= SPEED,
        ),
        (
            "growth of plugin or supervisor meanwhile",
            growth,
            "KiB",
            GROWTH,
            growth <= GROWTH,
        ),
    ] {
        let mark = if holds { "ok  " } else { "MISS" };
        writeln!(
            out,
            "{mark} {what}: {figure:.1} {unit}, the budget is {budget}"
        )?;
        met &= holds;
    }
    Ok(met)
}

/// Receives everything, and returns the exit code.
async fn exited(mut session: ExecSession) -> anyhow::Result<i32> {
    let mut code = None;
    while let Some(response) = session.next().await? {
        if response.exited {
            code = response.result.map(|result| result.exit_code);
            break;
        }
    }
    code.context("no exit")
}

async fn pass(plugin: &Plugin, id: &str, volume: usize) -> anyhow::Result<()> {
    pass_watched(plugin, id, volume, || [0.0; 2]).await?;
    Ok(())
}

/// Passes data through `cat`. Returns the maxima of the memory that is measured meanwhile.
async fn pass_watched(
    plugin: &Plugin,
    id: &str,
    volume: usize,
    memory: impl Fn() -> [f64; 2],
) -> anyhow::Result<[f64; 2]> {
    let mut session = plugin.exec_streaming(id, &["/bin/cat"], None).await?;
    let messages = session.messages();
    let input = |data, close| ExecTaskStreamingRequest {
        stdin: Some(ExecTaskStreamingIoOperation { data, close }),
        ..ExecTaskStreamingRequest::default()
    };
    let writer = tokio::spawn(async move {
        for number in 0..volume / PIECE {
            messages.send(input(piece(number), false)).await?;
        }
        messages.send(input(Vec::new(), true)).await
    });
    let mut received = Received::default();
    let (mut measured, mut most) = (0, [0.0_f64; 2]);
    let mut code = None;
    while let Some(response) = session.next().await? {
        received.compare(&response.stdout.unwrap_or_default().data)?;
        if received.length >= measured {
            measured += volume / 64;
            let now = memory();
            most = [most[0].max(now[0]), most[1].max(now[1])];
        }
        if response.exited {
            code = response.result.map(|result| result.exit_code);
        }
    }
    writer.await?.ok().context("the input was not taken")?;
    ensure!(
        (code, received.length) == (Some(0), volume),
        "cat ended with {code:?} after {} bytes",
        received.length
    );
    Ok(most)
}

/// What is sent. No two pieces are equal.
fn piece(number: usize) -> Vec<u8> {
    let mut piece = vec![0; PIECE];
    let (words, _) = piece.as_chunks_mut::<8>();
    for (index, word) in words.iter_mut().enumerate() {
        *word = (number * PIECE + index)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes();
    }
    piece
}

/// What has come back so far, in whatever chunks.
#[derive(Debug, Default)]
struct Received {
    length: usize,
    /// The piece whose first bytes have come.
    piece: Vec<u8>,
}

impl Received {
    /// Compares the next bytes with what was sent.
    fn compare(&mut self, mut data: &[u8]) -> anyhow::Result<()> {
        while !data.is_empty() {
            let at = self.length % PIECE;
            if at == 0 {
                self.piece = piece(self.length / PIECE);
            }
            let (some, rest) = data.split_at(data.len().min(PIECE - at));
            ensure!(
                *some == self.piece[at..at + some.len()],
                "other data came back than was sent, within {} bytes after byte {}",
                some.len(),
                self.length
            );
            self.length += some.len();
            data = rest;
        }
        Ok(())
    }
}
