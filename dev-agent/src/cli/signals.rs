//! The signals that stop the task of a `run`.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// A message for each SIGINT, SIGTERM and SIGHUP. SIGINT and SIGHUP stay ignored if they already are, as under `nohup`
/// and in a shell's background jobs. Needs a runtime.
pub(super) fn stops() -> std::io::Result<mpsc::Receiver<()>> {
    let ignored = ignored()?;
    let (sender, stops) = mpsc::channel(4);
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        if kind != SignalKind::terminate() && ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
            continue;
        }
        let mut signals = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                // If the channel is full, more stop requests are pending than make a difference.
                let _ = sender.try_send(());
            }
        });
    }
    Ok(stops)
}

/// The signals that this process ignores, signal n as bit n - 1.
fn ignored() -> std::io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    proc_files::signal_mask(&status, "SigIgn")
        .ok_or_else(|| std::io::Error::other("/proc/self/status has no SigIgn"))
}
