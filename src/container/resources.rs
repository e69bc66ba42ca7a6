//! What a container may use of the host: limits, and what it gets of the host's devices and kernel settings.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a container may use of the host. The default is no limit at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// The cgroup that Nomad created for this task, absolute. It may not exist.
    pub cgroup: Option<PathBuf>,
    /// Memory and swap.
    pub memory: Memory,
    /// Processor time and cores.
    pub cpu: Cpu,
    /// The maximum number of processes and threads; `None` is no limit.
    pub pids: Option<u64>,
    /// The badness adjustment of the container's processes, 0 to 1000: which of them the kernel kills first when memory runs out.
    pub oom_score_adj: i32,
    /// Resource limits of the container's processes (setrlimit(2)), ordered by name.
    pub rlimits: Vec<Rlimit>,
    /// Kernel settings of the container's own namespaces. A name has `.` between its parts, and `/` for a `.` in a part, as in
    /// `net.ipv4.conf.eth0/1.forwarding`: its file below `/proc/sys` has the two swapped.
    pub sysctls: BTreeMap<String, String>,
    /// Devices of the host that the container may use besides the usual ones.
    pub devices: Vec<Device>,
    /// The sizes of the container's temporary file systems.
    pub tmpfs: TmpfsSizes,
    /// Refuse to start if the host can't enforce one of the limits.
    pub required: bool,
}

/// Limits of memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// The hard limit; above it the kernel kills a process. `None` is no limit.
    pub hard: Option<u64>,
    /// What is reclaimed last when the host is short of memory; `None` is nothing.
    pub reserved: Option<u64>,
    /// The limit of swap alone.
    pub swap: Swap,
}

/// The limit of swap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Swap {
    /// No limit.
    #[default]
    Unlimited,
    /// At most this many bytes; 0 is no swap.
    Limit(u64),
}

/// Limits of processor time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// The share of processor time relative to other tasks when the processors are busy: the MHz of the job, from 2 to 262144. `None`
    /// is the kernel's default.
    pub shares: Option<u64>,
    /// The most processor time per period.
    pub quota: Option<CpuQuota>,
    /// The cores that are reserved for this task, in the kernel's list format (`2,4-5`); `None` is every core that Nomad shares among
    /// tasks.
    pub cores: Option<String>,
}

/// Processor time per period, both in microseconds. A quota above the period is more than one core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuQuota {
    /// The time that the processes of the container may run in each period.
    pub quota: u64,
    /// The length of a period.
    pub period: u64,
}

/// A resource limit of the container's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rlimit {
    /// The name without the prefix, in upper case: `NOFILE`.
    pub name: &'static str,
    /// The soft limit; `None` is unlimited.
    pub soft: Option<u64>,
    /// The hard limit; `None` is unlimited.
    pub hard: Option<u64>,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The device node on the host, absolute; it was one when it was checked.
    pub host: PathBuf,
    /// The node in the container, below `/dev`.
    pub container: PathBuf,
    /// Whether it may be read.
    pub read: bool,
    /// Whether it may be written.
    pub write: bool,
    /// Whether the container may make such a node.
    pub mknod: bool,
}

/// The sizes of the container's temporary file systems, in bytes. `None` leaves the size to systemd-nspawn: a share of the host's
/// memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsSizes {
    /// `/tmp`.
    pub tmp: Option<u64>,
    /// `/run`.
    pub run: Option<u64>,
    /// `/dev/shm`.
    pub shm: Option<u64>,
}

/// What is applied to a container once systemd-nspawn has made it, because systemd-nspawn has no option for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InsideSettings {
    /// The sizes of its temporary file systems.
    #[serde(default)]
    pub tmpfs: TmpfsSizes,
    /// Kernel settings of its namespaces.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// Device nodes.
    #[serde(default)]
    pub devices: Vec<Device>,
}

impl InsideSettings {
    /// Whether there is nothing to apply.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Resources {
    /// The part that is applied once systemd-nspawn has made the container.
    pub fn inside(&self) -> InsideSettings {
        InsideSettings {
            tmpfs: self.tmpfs,
            sysctls: self.sysctls.clone(),
            devices: self.devices.clone(),
        }
    }
}
