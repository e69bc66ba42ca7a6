//! Nomad's two gRPC services, base and driver, in the plugin process. Holds the operator's configuration, passes every request to
//! the module responsible, and converts the result to Nomad's messages.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::ContainerBackend;
use crate::config::{ImageSearchPath, PluginConfig};
use crate::container::Notes;
use crate::task::Tasks;
use crate::task::events::EventBus;

mod base;
mod convert;
mod exec;
mod fingerprint;
mod sampler;
mod service;
mod stats;
mod status;
mod stream;

pub use exec::ExecStream;
pub use stream::{EventStream, ProducerStream, StatsStream};

use sampler::Sampler;
use stats::Compute;
use status::CallError;

/// The driver's name in job files.
pub const NAME: &str = "nspawn";

type BackendFactory = dyn Fn(&PluginConfig) -> Arc<dyn ContainerBackend> + Send + Sync;

/// The latest configuration from the operator and the agent.
#[derive(Debug, Clone)]
struct Config {
    plugin_config: PluginConfig,
    backend: Arc<dyn ContainerBackend>,
    compute: Option<Compute>,
}

/// The driver. Clones share the same state.
#[derive(Clone)]
pub struct Driver {
    factory: Arc<BackendFactory>,
    search_path: Arc<ImageSearchPath>,
    /// `None` until it is set or first needed.
    config: watch::Sender<Option<Config>>,
    sampler: Sampler,
    tasks: Tasks,
    events: EventBus,
    /// Notified of every task that the agent recovers.
    recovered: watch::Sender<()>,
    /// The directories that contain this agent's allocations, learned from its requests.
    alloc_roots: watch::Sender<BTreeSet<PathBuf>>,
    /// Calls that run to completion even if the caller disconnects.
    calls: TaskTracker,
    root: CancellationToken,
    closing: Arc<AtomicBool>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("config", &self.config)
            .field("tasks", &self.tasks)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// A driver without tasks. `factory` creates one backend for each new configuration, which hands over what the users of tasks should know
    /// to the given [`Notes`]. Does not touch the host.
    pub fn new(
        factory: impl Fn(&PluginConfig, Notes) -> Arc<dyn ContainerBackend> + Send + Sync + 'static,
        search_path: ImageSearchPath,
    ) -> Self {
        let root = CancellationToken::new();
        let config = watch::Sender::new(None);
        let events = EventBus::default();
        let tasks = Tasks::new(events.clone(), root.child_token());
        let notes = tasks.notes();
        Self {
            factory: Arc::new(move |config| factory(config, notes.clone())),
            search_path: Arc::new(search_path),
            sampler: Sampler::new(config.subscribe()),
            config,
            tasks,
            events,
            recovered: watch::Sender::new(()),
            alloc_roots: watch::Sender::default(),
            calls: TaskTracker::new(),
            root,
            closing: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The root of the token tree: cancelling it ends everything in this process, but no task.
    pub fn root(&self) -> CancellationToken {
        self.root.clone()
    }

    /// Refuses further starts, kills every task and removes its leftovers; waits for at most `limit`.
    pub async fn end_tasks(&self, limit: Duration) {
        self.set_closing(true);
        let ended = tokio::time::timeout(limit, async {
            self.destroy_all().await;
            // A start that was accepted before may have become a task only now.
            self.calls.close();
            self.calls.wait().await;
            self.destroy_all().await;
        });
        if ended.await.is_err() {
            tracing::warn!(
                "some tasks could not be removed within {} s: look for their task directories",
                limit.as_secs()
            );
        }
    }

    async fn destroy_all(&self) {
        let mut destroying = tokio::task::JoinSet::new();
        for id in self.tasks.ids() {
            let driver = self.clone();
            destroying.spawn(async move { driver.destroy_by_force(&id).await });
        }
        destroying.join_all().await;
    }

    /// Ends everything that runs in this process, but no task; waits for at most `limit`. Does not wait for open calls.
    pub async fn close(&self, limit: Duration) {
        self.root.cancel();
        self.calls.close();
        self.tasks.close(limit).await;
    }

    /// Applies a configuration. An unchanged one keeps its backend; tasks keep the backend they were started with.
    fn configure(&self, plugin_config: PluginConfig, compute: Option<Compute>) {
        self.config.send_modify(|config| {
            let before = config.take();
            let compute = compute.or_else(|| before.as_ref()?.compute);
            let kept = before.filter(|before| before.plugin_config == plugin_config);
            let backend = kept.map_or_else(|| self.open(&plugin_config), |before| before.backend);
            *config = Some(Config {
                plugin_config,
                backend,
                compute,
            });
        });
    }

    /// The current configuration, or the defaults if none has been set.
    fn config(&self) -> Result<Config, CallError> {
        if let Some(config) = self.config.borrow().clone() {
            return Ok(config);
        }
        let defaults = PluginConfig::decode(&[])?;
        // A concurrent call may have set one first; that one is kept.
        self.config.send_if_modified(|config| {
            let missing = config.is_none();
            if missing {
                *config = Some(Config {
                    backend: self.open(&defaults),
                    plugin_config: defaults,
                    compute: None,
                });
            }
            missing
        });
        self.config()
    }

    /// Creates a backend for this configuration. Once the agent has had time to recover its tasks, the backend removes what was
    /// not recovered. A short-lived process, or a configuration that has been replaced, does not get that far.
    fn open(&self, plugin_config: &PluginConfig) -> Arc<dyn ContainerBackend> {
        let backend = (self.factory)(plugin_config);
        if let Some(after) = plugin_config.reconcile_after {
            let reconciling = self.clone().reconcile(Arc::clone(&backend), after);
            self.calls
                .spawn(self.root.clone().run_until_cancelled_owned(reconciling));
        }
        backend
    }

    /// Reconciles once the agent has had time to recover its tasks, and again whenever a request shows another directory with
    /// allocations of this agent: only then can its own leftovers be distinguished from those of another agent.
    async fn reconcile(self, backend: Arc<dyn ContainerBackend>, after: Duration) {
        let mut recovered = self.recovered.subscribe();
        let mut alloc_roots = self.alloc_roots.subscribe();
        loop {
            while let Ok(Ok(())) = tokio::time::timeout(after, recovered.changed()).await {}
            let in_use = self
                .config
                .borrow()
                .as_ref()
                .is_some_and(|config| Arc::ptr_eq(&config.backend, &backend));
            if !in_use {
                return;
            }
            let roots = alloc_roots.borrow_and_update().clone();
            backend.reconcile(&roots).await;
            if alloc_roots.changed().await.is_err() {
                return;
            }
        }
    }

    /// Records where this agent keeps its allocations: `alloc_dir` is the directory of one of them.
    fn note_alloc_dir(&self, alloc_dir: &str) {
        let root = Path::new(alloc_dir).parent();
        if let Some(root) = root.filter(|root| root.is_absolute()) {
            self.alloc_roots
                .send_if_modified(|roots| roots.insert(root.to_owned()));
        }
    }

    fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::Relaxed);
    }

    fn refuse_when_closing(&self) -> Result<(), CallError> {
        if self.closing.load(Ordering::Relaxed) {
            return Err(CallError::Closing);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
