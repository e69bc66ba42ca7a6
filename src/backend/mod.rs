//! The interface between driver logic and the host: nine operations, in neither Nomad's terms nor systemd's. Implemented by
//! [`nspawn::NspawnBackend`], and by a generated mock in the unit tests of `driver` and `task`.
//! It decides nothing about what a job may do: `config` did.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

use crate::container::{ContainerSpec, Exit, Probe, Started, Usage};
use crate::signal::Signal;

mod acquire;
pub mod error;
pub mod nspawn;
mod reconcile;

pub use error::{BackendError, chain};
pub use nspawn::NspawnBackend;

/// What a host does with containers.
///
/// Order is carried by types: only [`start`](Self::start) and [`attach`](Self::attach) give a [`Started`], and the verbs that
/// need a container take one.
#[cfg_attr(test, mockall::automock)]
#[async_trait]
pub trait ContainerBackend: Send + Sync + std::fmt::Debug + 'static {
    /// What this host can do. Changes nothing.
    async fn probe(&self) -> Probe;

    /// Starts a container and returns once it is up. What an interrupted earlier start of the same id left is ended and
    /// cleared first. After an error nothing of this start is left.
    async fn start(&self, spec: ContainerSpec) -> Result<Started, BackendError>;

    /// Finds a container again that this or an earlier process started. A container that ended in the meantime is found as
    /// long as its end is known: [`wait`](Self::wait) then answers at once. Never touches anything else.
    async fn attach(&self, started: &Started) -> Result<Started, BackendError>;

    /// Waits for the end. Any number of callers, early or late, get the same answer. A watch that was lost is an [`Exit`]
    /// with an error text, not an error.
    async fn wait(&self, started: &Started) -> Result<Exit, BackendError>;

    /// Delivers a signal to the payload: the command, or the image's init.
    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError>;

    /// Asks the payload to end, with `signal` or the way that suits its mode, and ends it by force after `grace`. Returns
    /// when it is gone. A container that has ended already is success.
    async fn stop(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError>;

    /// Ends what is left of the start with this id and frees everything it held on this host. Safe to repeat; an unknown id
    /// is success.
    async fn remove(&self, id: &str) -> Result<(), BackendError>;

    /// What the container uses now.
    async fn usage(&self, started: &Started) -> Result<Usage, BackendError>;

    /// Ends and clears away what dead plugins left and no living one claims: claimed is what was started or attached by any
    /// backend that still lives, and not removed. Says in the log what it did, a line for each thing; never touches what the
    /// driver did not make, and what may be another agent's: `alloc_roots` are the directories that hold this agent's allocations.
    /// A claim that is made meanwhile wins, or finds that the start is gone.
    async fn reconcile(&self, alloc_roots: &BTreeSet<PathBuf>);
}
