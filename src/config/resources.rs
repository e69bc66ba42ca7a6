//! Validates what a container may use of the host, which Nomad's `resources` block and options of the job say: limits and the sizes of its
//! temporary file systems. Processor time is in `cpu`, devices, resource limits and kernel settings are in modules of their own. What
//! the host has is compared last.

use std::ops::RangeInclusive;
use std::path::Path;

use crate::container::{Memory, NetworkNamespace, Resources, Swap, TmpfsSizes};
use crate::sys::kernel;

use super::cpu::CpuOptions;
use super::decode::{Number, quoted};
use super::devices::{self, RequestedDevice};
use super::options::TaskOptions;
use super::values::{bytes, whole};
use super::{AllocatedResources, ConfigError, PluginConfig, TaskContext, rlimits, sysctls};

const MEMORY: &str = "task.resources.memory";
const MEMORY_MAX: &str = "task.resources.memory_max";
const MEMORY_SWAP: &str = "config.memory_swap";
const OOM_SCORE_ADJ: &str = "config.oom_score_adj";
const PIDS_LIMIT: &str = "config.pids_limit";

/// The kernel's own limit of process ids on 64-bit hosts.
const PIDS: RangeInclusive<i64> = 1..=4_194_304;

/// What a container may use, as far as the host does not matter.
#[derive(Debug)]
pub(super) struct ResourceOptions {
    /// Without processor time and devices.
    resources: Resources,
    cpu: CpuOptions,
    devices: Vec<RequestedDevice>,
}

impl ResourceOptions {
    /// Validates the options and what Nomad allocated.
    pub(super) fn of(
        options: &TaskOptions,
        context: &TaskContext,
        plugin_config: &PluginConfig,
        network: &NetworkNamespace,
    ) -> Result<Self, ConfigError> {
        let memory = memory(&context.resources, options.memory_swap.as_deref())?;
        Ok(Self {
            cpu: CpuOptions::of(options, &context.resources)?,
            resources: Resources {
                cgroup: context.cgroup.clone(),
                memory,
                pids: pids(options.pids_limit.as_ref())?,
                oom_score_adj: oom_score_adj(&options.oom_score_adj)?,
                rlimits: rlimits::rlimits(options.ulimit.as_ref())?,
                sysctls: sysctls::sysctls(options.sysctl.as_ref(), network)?,
                tmpfs: tmpfs(options, memory.hard)?,
                required: plugin_config.require_limits,
                ..Resources::default()
            },
            devices: devices::devices(options, context, plugin_config)?,
        })
    }

    /// The memory limit of the task, in bytes.
    pub(super) fn memory_limit(&self) -> Option<u64> {
        self.resources.memory.hard
    }

    /// The options of the devices, and their paths in the container.
    pub(super) fn devices(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.devices.iter().map(RequestedDevice::target)
    }

    /// The resources on this host. Fails for what it does not have or does not allow.
    pub(super) fn find(self, context: &TaskContext) -> Result<Resources, ConfigError> {
        if context.resources.memory_mb > 0 {
            let most = kernel::memory_bytes().map_err(|error| {
                let reason = format!("the memory of this host can't be read: {error}");
                ConfigError::on_host(MEMORY, reason, &error)
            })?;
            check_memory(context.resources.memory_mb, most)?;
        }
        rlimits::check_on_host(&self.resources.rlimits)?;
        let devices = self.devices.into_iter().map(RequestedDevice::find);
        Ok(Resources {
            cpu: self.cpu.on_host()?,
            devices: devices.collect::<Result<_, _>>()?,
            ..self.resources
        })
    }
}

/// The limits of memory. Without `memory` in the request, which only old agents send so, there is none.
fn memory(given: &AllocatedResources, swap: Option<&str>) -> Result<Memory, ConfigError> {
    let memory = mebibytes(MEMORY, given.memory_mb)?;
    let (hard, reserved) = match given.memory_max_mb {
        0 => (memory, None),
        -1 => (None, memory),
        most => (mebibytes(MEMORY_MAX, most)?, memory),
    };
    if let (Some(hard), Some(reserved)) = (hard, reserved)
        && hard < reserved
    {
        let (max, memory) = (given.memory_max_mb, given.memory_mb);
        let reason = format!("{max} MiB is less than memory, {memory} MiB");
        return Err(ConfigError::new(MEMORY_MAX, reason));
    }
    Ok(Memory {
        hard,
        reserved,
        swap: self::swap(hard, swap)?,
    })
}

/// MiB as bytes; 0 is nothing.
fn mebibytes(option: &str, number: i64) -> Result<Option<u64>, ConfigError> {
    let refused = |fault: String| Err(ConfigError::new(option, format!("{number} MiB {fault}")));
    // The kernel counts in pages, and at most that many bytes.
    let most = i64::MAX.unsigned_abs() >> 20;
    match u64::try_from(number) {
        Err(_) if option == MEMORY_MAX => {
            refused("is negative: use -1 for no limit, or at least 1".to_owned())
        }
        Err(_) => refused("is negative: use at least 1".to_owned()),
        Ok(number) if number > most => refused(format!("is more than {most} MiB")),
        Ok(number) => Ok(Some(number << 20).filter(|bytes| *bytes > 0)),
    }
}

/// `memory_swap` is the limit of memory and swap together.
fn swap(hard: Option<u64>, text: Option<&str>) -> Result<Swap, ConfigError> {
    let refused = |reason: String| Err(ConfigError::new(MEMORY_SWAP, reason));
    match (text, hard) {
        (Some("-1"), _) | (None, None) => Ok(Swap::Unlimited),
        (None, Some(_)) => Ok(Swap::Limit(0)),
        (Some(text), None) => refused(format!(
            "{} is a limit of memory and swap together, but the memory of this task is not limited: use -1, or set memory_max",
            quoted(text)
        )),
        (Some(text), Some(hard)) => match bytes(MEMORY_SWAP, text)?.checked_sub(hard) {
            Some(swap) => Ok(Swap::Limit(swap)),
            None => refused(format!(
                "{} is less than the memory limit of the task, {hard} bytes: it is the limit of memory and swap together",
                quoted(text)
            )),
        },
    }
}

/// Rejects more memory than the host has. A `memory_max` above it is allowed: one job may run on hosts of different size.
fn check_memory(mebibytes: i64, host: u64) -> Result<(), ConfigError> {
    let host = host >> 20;
    if u64::try_from(mebibytes).is_ok_and(|number| number <= host) {
        return Ok(());
    }
    let reason = format!("{mebibytes} MiB is more than this host has, {host} MiB");
    Err(ConfigError::new(MEMORY, reason))
}

fn pids(number: Option<&Number>) -> Result<Option<u64>, ConfigError> {
    let Some(number) = number.filter(|number| !["0", "-1"].contains(&number.0.as_str())) else {
        return Ok(None);
    };
    let Ok(limit) = whole(PIDS_LIMIT, number, PIDS) else {
        let reason = format!(
            "{} is not a whole number from {} to {}, or 0 or -1 for no limit",
            number.shown(),
            PIDS.start(),
            PIDS.end()
        );
        return Err(ConfigError::new(PIDS_LIMIT, reason));
    };
    Ok(Some(limit.unsigned_abs()))
}

fn oom_score_adj(number: &Number) -> Result<i32, ConfigError> {
    let text = number.0.as_str();
    match text.parse() {
        Ok(score @ 0..=1000) => Ok(score),
        Ok(-1000..0) => {
            let reason = format!(
                "{text} would let the kernel kill processes of the host before those of the task: use 0 to 1000"
            );
            Err(ConfigError::new(OOM_SCORE_ADJ, reason))
        }
        _ => whole(OOM_SCORE_ADJ, number, 0..=1000).map(|_| 0),
    }
}

/// The sizes of the temporary file systems. By default they are shares of the task's memory as the kernel (`/tmp`, `/dev/shm`) and
/// systemd (`/run`) take them of the host's.
fn tmpfs(options: &TaskOptions, hard: Option<u64>) -> Result<TmpfsSizes, ConfigError> {
    let size = |option, text: Option<&str>| match text {
        None => Ok(hard.map(|hard| hard / 2)),
        Some(text) => tmpfs_size(option, text, hard).map(Some),
    };
    Ok(TmpfsSizes {
        shm: size("config.shm_size", options.shm_size.as_deref())?,
        tmp: size("config.tmp_size", options.tmp_size.as_deref())?,
        run: hard.map(|hard| hard / 5),
    })
}

/// The size of a temporary file system, if the memory limit of the task leaves room for it.
pub(super) fn tmpfs_size(option: &str, text: &str, hard: Option<u64>) -> Result<u64, ConfigError> {
    let size = bytes(option, text)?;
    let fault = match hard {
        _ if size == 0 => "is no size: use at least 1 byte, or leave it out".to_owned(),
        Some(hard) if size > hard => {
            format!("is more than the memory limit of the task, {hard} bytes")
        }
        _ => return Ok(size),
    };
    let reason = format!("{} {fault}", quoted(text));
    Err(ConfigError::new(option, reason))
}
