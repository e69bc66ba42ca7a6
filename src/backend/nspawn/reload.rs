//! Restores the networks of containers in the host's firewall after a reload of it, which removes what others have made. The kernel reports
//! it while a plugin runs; a recovered container is checked once, because the reload may have happened while none ran.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio_util::task::AbortOnDropHandle;

use super::NspawnBackend;
use crate::blocking;
use crate::container::Started;
use crate::network::watch::Watch;
use crate::network::{self, NetworkError};
use crate::state::TaskDir;

const LOST: &str = "rules for the network of this task were missing in the host's firewall, as after a reload of it";

/// Notices reloads, from the first container with a network of the driver's on.
#[derive(Debug, Default)]
pub(super) struct Reloads {
    /// How many there were.
    count: watch::Sender<u64>,
    listener: Mutex<Option<AbortOnDropHandle<()>>>,
    /// Held while one container is restored: transactions at the same time make each other fail.
    turn: AsyncMutex<()>,
}

impl Reloads {
    /// Begins to listen, unless that was done and has not failed since.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        let is_listening = listener.as_ref().map(|listening| !listening.is_finished());
        if is_listening != Some(true) && nix::unistd::geteuid().is_root() {
            match Watch::open() {
                Ok(watch) => {
                    if is_listening.is_some() {
                        // Nothing was noticed since it failed.
                        self.count.send_modify(|count| *count += 1);
                    }
                    let listening = tokio::spawn(listen(watch, self.count.clone()));
                    *listener = Some(AbortOnDropHandle::new(listening));
                }
                Err(error) => log(&error),
            }
        }
        self.count.subscribe()
    }

    /// Waits until no container is being restored. A start whose supervisor has exited before is not restored any more.
    pub(super) async fn settled(&self) {
        drop(self.turn.lock().await);
    }
}

async fn listen(mut watch: Watch, count: watch::Sender<u64>) {
    loop {
        match watch.lost().await {
            Ok(()) => count.send_modify(|count| *count += 1),
            Err(error) => return log(&error),
        }
    }
}

fn log(error: &std::io::Error) {
    tracing::warn!(%error, "reloads of the host's firewall can't be noticed");
}

impl NspawnBackend {
    /// Waits for a reload that has removed something of this container, and restores it. Returns what the user should know.
    pub(super) async fn restore_after_reload(&self, started: &Started) -> Option<String> {
        started.network.as_ref()?;
        let task_dir = TaskDir::new(&started.state);
        let mut count = self.reloads.watch();
        loop {
            let checked = self.registry.checked_reloads(&task_dir)?;
            let now = *count.wait_for(|now| Some(*now) != checked).await.ok()?;
            let _turn = self.reloads.turn.lock().await;
            self.registry.set_checked_reloads(&task_dir, now);
            let place = task_dir.clone();
            let note = blocking::run(move || restore(&place)).await;
            if note.is_some() {
                return note;
            }
        }
    }
}

/// Restores the network of a start, unless it is about to be released: then that would be left behind.
fn restore(task_dir: &TaskDir) -> Option<String> {
    let plan = task_dir.launch_spec().ok()?.network()?.clone();
    if !is_running(task_dir) {
        return None;
    }
    let restored = network::backend().restore(&plan);
    if !is_running(task_dir) {
        // Its supervisor may have released it before this made it again.
        let _ = network::backend().release(&plan);
        return None;
    }
    note(restored)
}

/// Whether the supervisor of a start still has to release it.
fn is_running(task_dir: &TaskDir) -> bool {
    task_dir.has_supervisor() && matches!(task_dir.exit(), Ok(None))
}

fn note(restored: Result<bool, NetworkError>) -> Option<String> {
    match restored {
        Ok(false) => None,
        Ok(true) => Some(format!("{LOST}: they have been restored")),
        Err(error) => Some(format!(
            "{LOST}, and can't be restored, so restart the task: {error}"
        )),
    }
}
