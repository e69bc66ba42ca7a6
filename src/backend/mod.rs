//! The interface between driver logic and the host: thirteen operations, in neither Nomad's terms nor systemd's. Implemented by
//! [`nspawn::NspawnBackend`], and by a generated mock in the unit tests of `driver` and `task`. What a job may do is not decided
//! here but in `config`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::container::{ContainerSpec, Exit, Probe, Reading, Started};
use crate::exec::{ExecRequest, Session};
use crate::signal::Signal;

pub mod error;
pub mod nspawn;

pub use error::{BackendError, chain};
pub use nspawn::NspawnBackend;

/// Operations on the containers of a host.
///
/// Types enforce the order of calls: only [`start`](Self::start) and [`attach`](Self::attach) return a [`Started`], and the
/// operations that need a container take one.
#[cfg_attr(test, mockall::automock)]
#[async_trait]
pub trait ContainerBackend: Send + Sync + std::fmt::Debug + 'static {
    /// Reports what this host can do. Changes nothing.
    async fn probe(&self) -> Probe;

    /// Starts a container and returns once it is up. Leftovers of an interrupted earlier start of the same id are killed and
    /// cleaned up first. After an error nothing of this start is left.
    async fn start(&self, spec: ContainerSpec) -> Result<Arc<Started>, BackendError>;

    /// Recovers a container that this or an earlier process started. A container that has exited meanwhile is found as long as
    /// its exit is recorded: [`wait`](Self::wait) then returns at once. Never touches anything else.
    async fn attach(&self, started: &Started) -> Result<Arc<Started>, BackendError>;

    /// Waits for the container's exit. Any number of callers, early or late, get the same result. If the exit status was lost,
    /// the result is an [`Exit`] with an error text, not an error.
    async fn wait(&self, started: &Started) -> Result<Exit, BackendError>;

    /// Waits until the kernel has killed more than `seen` processes of the container because its memory was used up, while the container
    /// lives on, and returns how many it has killed. `None` if no more can follow.
    async fn oom_kills(&self, started: &Started, seen: u64) -> Option<u64>;

    /// Waits until others have removed something of the container's network from the host's firewall, and this has made it again. Returns
    /// what the user should know. `None` if the driver has made no network for the container, or if it is removed.
    async fn network_restored(&self, started: &Started) -> Option<String>;

    /// Delivers a signal to the payload: the command, or the image's init.
    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError>;

    /// Starts a further command in the container, as confined as the payload. It ends with the returned session, with this process, and
    /// with the container.
    async fn exec(&self, started: &Started, request: ExecRequest) -> Result<Session, BackendError>;

    /// Asks the payload to stop, with `signal` or in the way that suits its mode, and kills it after `grace`. Returns when it is
    /// gone. A container that has exited already is success.
    async fn stop(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError>;

    /// Kills what is left of the start with this id and releases everything it held on this host. Safe to repeat; an unknown id
    /// is success.
    async fn remove(&self, id: &str) -> Result<(), BackendError>;

    /// The addresses of the container's own network namespace, without loopback ones; none in the host's network.
    async fn addresses(&self, started: &Started) -> Vec<IpAddr>;

    /// Where to read what the container uses. Reads nothing yet; the reader keeps files open until it is dropped.
    fn usage_reader(&self, started: &Started) -> Box<dyn UsageReader>;

    /// Kills and cleans up what dead plugins left and no living plugin has locked. Locked is what was started or attached, and
    /// not removed, by a backend that still lives. Logs each thing it does in a line of its own. Never touches what the driver
    /// did not make or what may belong to another agent: `alloc_roots` are the directories that hold this agent's allocations. An
    /// attempt to lock a start meanwhile either wins, or finds that the start is gone.
    async fn reconcile(&self, alloc_roots: &BTreeSet<PathBuf>);
}

/// Reads what one container uses, again and again.
#[cfg_attr(test, mockall::automock)]
pub trait UsageReader: Send + std::fmt::Debug {
    /// What the container uses now, with or without its processes. `None` once it is gone. Reads files of the kernel, so it must not
    /// run on a thread that serves requests.
    fn read(&mut self, with_processes: bool) -> Option<Reading>;
}
