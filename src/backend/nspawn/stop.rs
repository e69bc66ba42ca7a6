//! Signals and stops, which the supervisor of the container carries out.

use std::time::Duration;

use super::NspawnBackend;
use crate::backend::BackendError;
use crate::blocking;
use crate::container::{Mode, Started};
use crate::exec;
use crate::signal::Signal;
use crate::supervisor::{Action, REQUEST_TIMEOUT, Status, client};

impl NspawnBackend {
    pub(super) async fn send_signal(
        &self,
        started: &Started,
        signal: Signal,
    ) -> Result<(), BackendError> {
        let client = self.resolve(started).await?;
        client::sigcont(started.supervisor);
        let asked = tokio::time::timeout(
            REQUEST_TIMEOUT,
            client.request(Action::Signal(signal.number())),
        )
        .await;
        let answer = asked.unwrap_or_else(|_| {
            let seconds = REQUEST_TIMEOUT.as_secs();
            Err(format!("its supervisor has not answered for {seconds} s"))
        });
        answer.map_err(|reason| BackendError::Stuck {
            machine: started.machine.clone(),
            reason: format!("{signal} can't be sent: {reason}"),
        })
    }

    pub(super) async fn stop_container(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError> {
        let client = self.resolve(started).await?;
        client::sigcont(started.supervisor);
        let open = || matches!(client.status(), Status::Up(_) | Status::Starting);
        if !grace.is_zero() && open() {
            end_sessions(started).await;
            let verb = signal.map_or(Action::Stop, |signal| Action::Signal(signal.number()));
            let gracefully = async {
                // If the request fails, the container is killed after the grace time.
                if let Err(reason) = client.request(verb).await {
                    tracing::warn!(
                        machine = started.machine,
                        reason,
                        "the stop signal can't be sent"
                    );
                }
                client.end().await
            };
            let explained = async {
                if started.mode == Mode::Boot {
                    tokio::time::sleep(grace / 2).await;
                    // A supervisor of an earlier driver does not know the request.
                    let _ = client.request(Action::ExplainStop).await;
                }
                std::future::pending().await
            };
            let stopped = async {
                tokio::select! {
                    _ = gracefully => {}
                    () = explained => {}
                }
            };
            let _ = tokio::time::timeout(grace, stopped).await;
        }
        if !open() {
            return Ok(());
        }
        let by_force = async {
            let _ = client.request(Action::Kill).await;
            client.end().await
        };
        if tokio::time::timeout(REQUEST_TIMEOUT, by_force)
            .await
            .is_ok()
        {
            return Ok(());
        }
        // Kill a supervisor that does not answer. Its exit kills the container, see `supervisor::client`.
        client::kill_supervisor(started.supervisor).await;
        let stuck = || BackendError::Stuck {
            machine: started.machine.clone(),
            reason: format!(
                "it still runs {} s after SIGKILL: look for processes in state D",
                REQUEST_TIMEOUT.as_secs()
            ),
        };
        tokio::time::timeout(REQUEST_TIMEOUT, client.end())
            .await
            .map(|_| ())
            .map_err(|_| stuck())
    }
}

/// An init that powers off waits up to 90 seconds for processes that ignore SIGTERM, and those of sessions are not its own services.
async fn end_sessions(started: &Started) {
    if started.mode == Mode::Boot {
        let started = started.clone();
        blocking::run(move || exec::kill_sessions(&started)).await;
    }
}
