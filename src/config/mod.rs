//! Decodes and validates configuration: msgpack and the task's context in, a `ContainerSpec` out. The only I/O is
//! looking up paths and what the host has. Rejects everything that is not meaningful or not allowed. Later modules reject only what depends on the
//! version of systemd-nspawn or on the host. Starts nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::container::{Cause, ContainerSpec};
use crate::network::pool::Pool;
use crate::nspawn::refusal::cause_of_exec_error;
use crate::proto::hclspec;

mod allowed;
mod cpu;
mod credentials;
mod decode;
mod description;
mod devices;
mod dns;
mod environment;
mod identity;
mod low_ports;
mod mount_block;
mod mount_targets;
mod mounts;
mod network;
mod options;
mod overlay_block;
mod paths;
mod plugin;
mod resources;
mod rlimits;
mod rootfs;
mod schema;
mod sources;
mod sysctls;
mod system;
mod task;
mod tmpfs;
mod users;
mod values;

#[cfg(test)]
mod docs_test;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use allowed::AllowedPaths;
use options::{Options as _, PluginOptions, TaskOptions};
pub use plugin::MAX_STATE_DIR_BYTES;

/// The validated agent's `plugin` block, as the operator set it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginConfig {
    /// Whether tasks may be placed on this node.
    pub enabled: bool,
    /// Whether jobs may mount host paths from outside their allocation.
    pub volumes: bool,
    /// The paths outside its allocation that a job may mount.
    pub volumes_allow: AllowedPaths,
    /// Whether jobs may use devices of the host by the option `devices`. Devices of Nomad's device plugins are not affected.
    pub devices: bool,
    /// Whether a task is refused if the host can't enforce one of its limits.
    pub require_limits: bool,
    /// Whether a command is run in a task whose seccomp filters can't be read, without filters.
    pub exec_unfiltered: bool,
    /// Whether seccomp filters that systemd-nspawn has built are installed in later containers of the same kind.
    pub seccomp_cache: bool,
    /// Whether a task that asks for no network has one of its own instead of the host's.
    pub private_network: bool,
    /// The addresses for containers with a network of their own.
    pub network_pool: Pool,
    /// The directory that holds the state of running tasks.
    pub state_dir: PathBuf,
    /// The systemd-nspawn to use; `None` searches `PATH`.
    pub nspawn_path: Option<PathBuf>,
    /// How long after the last recovery of a task the driver cleans up what the agent did not recover; `None` is never.
    pub reconcile_after: Option<Duration>,
}

/// What Nomad grants to one start of a task, converted to the driver's own types.
#[derive(Debug, Clone, Default, PartialEq)]
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
    /// Where stdout goes; an empty path or the null device discards it.
    pub stdout: PathBuf,
    /// Where stderr goes; an empty path or the null device discards it.
    pub stderr: PathBuf,
    /// Host and CSI volumes.
    pub mounts: Vec<VolumeMount>,
    /// The network namespace that Nomad made for the group (mode `bridge`, `cni/…`, `none`), if any.
    pub network_namespace: Option<PathBuf>,
    /// The `dns` block of the network.
    pub dns: RequestedDns,
    /// The host name that comes with the group's network.
    pub host_name: RequestedHostName,
    /// Ports of the group or of the task, with the number on the host and, where the job sets one, the number inside.
    pub ports: Vec<AllocatedPort>,
    /// The absolute path of the cgroup that Nomad made; it may not exist.
    pub cgroup: Option<PathBuf>,
    /// Memory and processor time.
    pub resources: AllocatedResources,
    /// Devices that Nomad's device plugins reserved for the task.
    pub devices: Vec<AllocatedDevice>,
}

/// What Nomad allocated to a task of memory and processor time. The numbers are those of the request: none of them is checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AllocatedResources {
    /// `memory` of the job, in MiB; 0 means not set.
    pub memory_mb: i64,
    /// `memory_max` of the job, in MiB; 0 means not set, -1 no limit.
    pub memory_max_mb: i64,
    /// `cpu` of the job in MHz, or that of its reserved cores; 0 means not set.
    pub cpu_mhz: i64,
    /// The same as a fraction of all processors that Nomad may use on this node; 0 means not set.
    pub cpu_fraction: f64,
    /// The processors that are reserved for the task, in the kernel's list format; empty if none are.
    pub cores: String,
}

/// What the network of a job says about name resolution. The texts are those of the request: none of them is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestedDns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Domains in which short names are looked up.
    pub searches: Vec<String>,
    /// Options of resolv.conf.
    pub options: Vec<String>,
}

/// A host name with its address, as in the request. Empty texts are not set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestedHostName {
    /// The name.
    pub name: String,
    /// The address in the network of the group.
    pub address: String,
}

/// A device that a device plugin reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocatedDevice {
    /// The device node on the host.
    pub source: PathBuf,
    /// The device node in the container.
    pub target: PathBuf,
    /// Some of the letters `r`, `w` and `m`, for read, write and mknod.
    pub permissions: String,
}

/// A volume that Nomad mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// Absolute host path.
    pub source: PathBuf,
    /// Path inside the container.
    pub target: PathBuf,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// `propagation_mode` as in the request, not checked.
    pub propagation: String,
}

/// A port that Nomad allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocatedPort {
    /// The label of the port in the job.
    pub label: String,
    /// The port number on the host.
    pub host: u16,
    /// The port number inside the container; 0 means the same number.
    pub to: u16,
    /// The one host address on which the port is allocated; `None` is every address.
    pub address: Option<IpAddr>,
    /// Whether it comes from a task-level `network` block (the old form, for `port_map`) rather than from the group's.
    pub task_level: bool,
}

/// The directories that are searched for images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSearchPath {
    /// The directory that holds the plugin's binary; relative image paths are relative to it.
    pub plugin_dir: PathBuf,
    /// The directories of registered machine images, in search order.
    pub machine_dirs: Vec<PathBuf>,
}

/// A validated container, and notes about it for the user.
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
    /// [`Cause::Config`], unless the host could not check the value: then nothing may be wrong with it.
    pub cause: Cause,
}

impl ConfigError {
    fn new(option: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            option: option.into(),
            reason: reason.into(),
            cause: Cause::Config,
        }
    }

    /// A value that could not be checked because of this error.
    fn on_host(option: impl Into<String>, reason: impl Into<String>, error: &io::Error) -> Self {
        Self {
            cause: cause_of_exec_error(error),
            ..Self::new(option, reason)
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
    /// Decodes and checks the msgpack that Nomad's agent makes of its `plugin` block. Zero bytes are an empty block.
    pub fn decode(bytes: &[u8]) -> Result<Self, ConfigError> {
        plugin::check(decode::block(bytes, "plugin")?)
    }
}

/// Decodes the msgpack of a task's `config` block and checks it against what Nomad granted and what the operator
/// allows.
///
/// The option of an error begins with `config.`, or with `task.` where a value that Nomad itself sent is the reason. An
/// error about the whole block has the option `config.*`.
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
