//! Commands in a running task, beside raw_exec, pair by pair: the time from connecting to the agent's websocket to the exit of `true`, and
//! how fast data passes in both directions.

use std::time::{Duration, Instant};

use anyhow::bail;
use e2e::agent::{Agent, Allocation, Exec, Message};

use crate::{Report, job, median};

/// Pairs of measurements; the first ones warm the caches and are not counted.
const PAIRS: usize = 60;
const WARM_UP: usize = 5;
/// Between two commands: what the kernel still does after the end of one must not count for the other.
const PAUSE: Duration = Duration::from_millis(100);
/// The budget for a command: this many times raw_exec.
const COMMAND: f64 = 2.0;
/// What passes through `cat`, and in which pieces.
const VOLUME: usize = 64 << 20;
const PIECE: usize = 64 << 10;

pub(crate) fn measure(agent: &Agent, image: &str, report: &mut Report) -> anyhow::Result<()> {
    let ours = agent.run(&job("exec"), &[("image", image)]);
    let raw = agent.run(&job("raw-exec"), &[]);
    ours.running();
    raw.running();
    commands(&ours, &raw, report)?;
    volume(&ours, &raw, report)?;
    ours.stop();
    raw.stop();
    Ok(())
}

fn commands(
    ours: &Allocation<'_>,
    raw: &Allocation<'_>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let run = |allocation: &Allocation<'_>| -> anyhow::Result<f64> {
        std::thread::sleep(PAUSE);
        let clock = Instant::now();
        let mut exec = allocation.exec(&["/bin/true"], false);
        // raw_exec waits for the end of the input too.
        exec.close_stdin();
        match exec.finish().2 {
            Message::Exited(0) => Ok(clock.elapsed().as_secs_f64() * 1000.0),
            other => bail!("{other:?}"),
        }
    };
    let (mut our_times, mut raw_times) = (Vec::new(), Vec::new());
    for pair in 0..WARM_UP + PAIRS {
        let (of_raw, of_ours) = (run(raw)?, run(ours)?);
        if pair >= WARM_UP {
            raw_times.push(of_raw);
            our_times.push(of_ours);
        }
    }
    let (of_raw, of_ours) = (median(raw_times), median(our_times));
    report.say(&format!(
        "connect to exit of true, median of {PAIRS}: raw_exec {of_raw:.2} ms, nspawn {of_ours:.2} ms"
    ));
    report.judge("a command", of_ours / of_raw, COMMAND);
    Ok(())
}

/// Data through `cat` and back, over the agent's websocket, which encodes it as base64 in JSON.
fn volume(ours: &Allocation<'_>, raw: &Allocation<'_>, report: &mut Report) -> anyhow::Result<()> {
    let of_raw = through(raw)?;
    let of_ours = through(ours)?;
    report.say(&format!(
        "through cat and back, {} MiB over the agent: raw_exec {of_raw:.0} MiB/s, nspawn {of_ours:.0} MiB/s ({:.2} times)",
        VOLUME >> 20,
        of_ours / of_raw
    ));
    Ok(())
}

fn through(allocation: &Allocation<'_>) -> anyhow::Result<f64> {
    let mut exec: Exec = allocation.exec(&["/bin/cat"], false);
    let mut other = exec.sender();
    let clock = Instant::now();
    let writer = std::thread::spawn(move || {
        let piece = vec![b'x'; PIECE];
        for _ in 0..VOLUME / PIECE {
            other.write(&piece);
        }
        other.close_stdin();
    });
    let mut received = 0;
    loop {
        match exec.receive() {
            Message::Stdout(data) => received += data.len(),
            Message::Exited(0) if received == VOLUME => break,
            other => bail!("{other:?} after {received} bytes"),
        }
    }
    let span = clock.elapsed();
    if writer.join().is_err() {
        bail!("the input could not be written");
    }
    Ok(f64::from(u32::try_from(VOLUME >> 20)?) / span.as_secs_f64())
}
