//! What a container uses: as a whole, and its processes one by one.

use super::Process;

/// The resource usage of a container at one moment. A value is `None` if this host does not provide it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode since the start, nanoseconds.
    pub cpu_user_ns: Option<u64>,
    /// CPU time in the kernel since the start, nanoseconds.
    pub cpu_system_ns: Option<u64>,
    /// Periods in which the CPU limit was hit.
    pub throttled_periods: Option<u64>,
    /// Time throttled by the CPU limit, nanoseconds.
    pub throttled_ns: Option<u64>,
    /// Anonymous memory in bytes.
    pub memory_rss: Option<u64>,
    /// Page cache in bytes, tmpfs included.
    pub memory_cache: Option<u64>,
    /// All memory charged, bytes.
    pub memory_usage: Option<u64>,
    /// The highest amount ever charged, bytes.
    pub memory_peak: Option<u64>,
    /// Swap in bytes.
    pub memory_swap: Option<u64>,
    /// Memory that the kernel uses for the container, bytes; part of [`memory_usage`](Self::memory_usage).
    pub memory_kernel: Option<u64>,
    /// The highest amount of it ever, bytes.
    pub memory_kernel_peak: Option<u64>,
}

/// What one process of a container uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessUsage {
    /// The process.
    pub process: Process,
    /// CPU time in user mode since its start, nanoseconds.
    pub cpu_user_ns: u64,
    /// CPU time in the kernel since its start, nanoseconds.
    pub cpu_system_ns: u64,
    /// Resident memory in bytes, shared pages included.
    pub memory_rss: u64,
}

/// One reading of what a container uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// The container as a whole.
    pub usage: Usage,
    /// Some of its processes in no particular order, if the caller asked for them.
    pub processes: Option<Vec<ProcessUsage>>,
}
