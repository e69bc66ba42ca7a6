//! Decodes and validates configuration: msgpack and the task's context in, a `ContainerSpec` out. The only I/O is looking paths up.
//! Refuses everything that is not meaningful or not allowed, so that no later room asks again; starts nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::container::ContainerSpec;
use crate::proto::hclspec;

mod decode;
pub mod duration;
mod environment;
mod identity;
mod mounts;
mod network;
mod options;
mod paths;
mod plugin;
mod rootfs;
mod schema;
mod task;
mod values;

#[cfg(test)]
mod docs_test;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use options::{Options as _, PluginOptions, TaskOptions};
pub use plugin::MAX_STATE_DIR_BYTES;

/// What an operator set in the agent's `plugin` block, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginConfig {
    /// Whether tasks may be placed on this node at all.
    pub enabled: bool,
    /// Whether jobs may mount host paths from outside their allocation.
    pub volumes: bool,
    /// Where the state of running tasks lies.
    pub state_dir: PathBuf,
    /// The systemd-nspawn to use; `None` looks along `PATH`.
    pub nspawn_path: Option<PathBuf>,
    /// How long after the last recovery of a task what nobody asked for is cleared away; `None` is never.
    pub reconcile_after: Option<Duration>,
}

/// What Nomad granted to one start of a task, in our own words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskContext {
    /// `<allocation id>/<task name>/<8 hex digits>`.
    pub id: String,
    /// The task's name in the job.
    pub task: String,
    /// The allocation id.
    pub alloc_id: String,
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// The complete environment.
    pub environment: BTreeMap<String, String>,
    /// `task.user` of the job, or empty.
    pub user: String,
    /// Where stdout goes; empty or the null device discards.
    pub stdout: PathBuf,
    /// Where stderr goes; empty or the null device discards.
    pub stderr: PathBuf,
    /// Host and CSI volumes.
    pub mounts: Vec<VolumeMount>,
    /// The network namespace that Nomad made for the group (mode `bridge`, `cni/…`, `none`), if it did.
    pub network_namespace: Option<PathBuf>,
    /// Ports of the group or of the task, with the number on the host and, where the job gives one, inside.
    pub ports: Vec<AllocatedPort>,
    /// The control group Nomad made, absolute; it may not exist.
    pub cgroup: Option<PathBuf>,
}

/// A volume that Nomad mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// Absolute host path.
    pub source: PathBuf,
    /// Path inside.
    pub target: PathBuf,
    /// Whether it can't be written.
    pub read_only: bool,
}

/// A port that Nomad allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocatedPort {
    /// The job's name for it.
    pub label: String,
    /// On the host.
    pub host: u16,
    /// Inside; 0 is the same number.
    pub to: u16,
    /// The one address of the host on which it is allotted; `None` is every address.
    pub address: Option<IpAddr>,
    /// Whether it comes from a task-level `network` block (the old form, for `port_map`) rather than from the group's.
    pub task_level: bool,
}

/// Where images are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSearchPath {
    /// The directory that holds the plugin's binary; relative images are relative to it.
    pub plugin_dir: PathBuf,
    /// Where registered machine images lie, in the order of the search.
    pub machine_dirs: Vec<PathBuf>,
}

/// A checked container, and what the user should be told about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validated {
    /// The container.
    pub spec: ContainerSpec,
    /// Sentences for the task's events.
    pub notes: Vec<String>,
}

/// What is wrong with a configuration: the option, the value and what is allowed, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct ConfigError {
    /// The option with its path: `config.volatile`, `config.bind["/a"]`, `plugin.state_dir`.
    pub option: String,
    /// The value and what is allowed.
    pub reason: String,
}

impl ConfigError {
    fn new(option: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            option: option.into(),
            reason: reason.into(),
        }
    }
}

/// The schema of the agent's `plugin` block.
pub fn plugin_schema() -> hclspec::Spec {
    schema::block(PluginOptions::OPTIONS)
}

/// The schema of a task's `config` block.
pub fn task_schema() -> hclspec::Spec {
    schema::block(TaskOptions::OPTIONS)
}

impl PluginConfig {
    /// Reads and checks the msgpack that Nomad's agent makes of its `plugin` block. No bytes at all are an empty block.
    pub fn decode(bytes: &[u8]) -> Result<Self, ConfigError> {
        plugin::check(decode::block(bytes, "plugin")?)
    }
}

/// Reads and checks the msgpack of a task's `config` block against what Nomad granted and what the operator allows.
///
/// The option of an error begins with `config.`, or with `task.` where Nomad's own words are the reason. An error that is
/// about the whole block has the option `config.*`.
pub fn container(
    bytes: &[u8],
    context: &TaskContext,
    plugin_config: &PluginConfig,
    search_path: &ImageSearchPath,
) -> Result<Validated, ConfigError> {
    decode::block(bytes, "config")
        .and_then(|options: TaskOptions| task::check(options, context, plugin_config, search_path))
        .map_err(|error| environment::redact(error, &context.environment))
}
