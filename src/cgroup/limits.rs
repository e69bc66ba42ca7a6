//! Which file of which cgroup holds a limit, and the value that is written to it. Pure. `docs/resources.md` has the same table.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::Place;
use crate::container::{Resources, Swap};

/// A limit as the job names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// `memory`, or `memory_max` where it is set.
    Memory,
    /// `memory` where `memory_max` is set.
    MemoryReservation,
    /// `memory_swap`.
    Swap,
    /// `cpu`.
    Cpu,
    /// `cpu_hard_limit`.
    CpuHardLimit,
    /// `cores`.
    Cores,
    /// `pids_limit`.
    Pids,
    /// The number and depth of the cgroups that a container may make. No option sets it.
    Cgroups,
    /// The devices that a container may use, of which `devices` are a part.
    Devices,
    /// Any other, from a launch spec of a later driver.
    #[serde(other)]
    Unknown,
}

impl Limit {
    /// The name in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::MemoryReservation => "memory (the reservation beside memory_max)",
            Self::Swap => "memory_swap",
            Self::Cpu => "cpu",
            Self::CpuHardLimit => "cpu_hard_limit",
            Self::Cores => "cores",
            Self::Pids => "pids_limit",
            Self::Cgroups => "the number of cgroups",
            Self::Devices => "devices",
            Self::Unknown => "a limit that this driver does not know",
        }
    }
}

/// A value to be written to a file of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The limit that it enforces.
    pub limit: Limit,
    /// The file.
    pub file: PathBuf,
    /// The value.
    pub value: String,
}

/// A limit that the host does not enforce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unenforced {
    /// The limit.
    pub limit: Limit,
    /// Why.
    pub reason: String,
}

/// The settings of one container.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// Written before systemd-nspawn is started.
    pub(super) before: Vec<Setting>,
    /// Written when the container is up, before the command runs: to cgroups that systemd-nspawn makes, and what systemd-nspawn itself
    /// needs more of than the container.
    pub(super) up: Vec<Setting>,
    /// What this host has no controller for.
    pub(super) unenforced: Vec<Unenforced>,
}

/// The most cgroups that a container may make below its own, and how deep. A booted system makes about a hundred, at most seven deep,
/// and a container engine in it as many again for each of its containers. More would only make their removal slow.
pub(super) const MAX_DESCENDANTS: u32 = 4096;
pub(super) const MAX_DEPTH: u32 = 32;

/// The processes that systemd-nspawn needs in the cgroup of the start, besides those of the container: itself, and during the start the
/// one that makes the namespaces.
const NSPAWN_PROCESSES: u64 = 2;

/// Where a controller of a start is.
enum Home<'a> {
    V1(&'a Path),
    V2,
}

/// The settings of a container with these resources in this place. `v2` are the controllers of the cgroup v2 hierarchy.
pub(super) fn settings(place: &Place, v2: &BTreeSet<String>, resources: &Resources) -> Settings {
    let mut writer = Writer {
        place,
        v2,
        settings: Settings::default(),
    };
    writer.memory(resources);
    writer.cpu(resources);
    writer.cores(resources);
    writer.pids(resources);
    writer.cgroups();
    writer.settings
}

struct Writer<'a> {
    place: &'a Place,
    v2: &'a BTreeSet<String>,
    settings: Settings,
}

impl<'a> Writer<'a> {
    /// Where this controller is; none if this host has none, which is noted for the limit.
    fn home(&mut self, controller: &str, limits: &[Limit]) -> Option<Home<'a>> {
        if let Some(group) = self.place.controllers.get(controller) {
            return Some(Home::V1(group));
        }
        if self.v2.contains(controller) {
            return Some(Home::V2);
        }
        let reason = format!("this host has no {controller} controller");
        self.settings.unenforced.extend(limits.iter().map(|limit| {
            let (limit, reason) = (*limit, reason.clone());
            Unenforced { limit, reason }
        }));
        None
    }

    fn before(&mut self, limit: Limit, file: PathBuf, value: impl ToString) {
        let value = value.to_string();
        self.settings.before.push(Setting { limit, file, value });
    }

    fn up(&mut self, limit: Limit, file: PathBuf, value: impl ToString) {
        let value = value.to_string();
        self.settings.up.push(Setting { limit, file, value });
    }

    /// In cgroup v2: to the cgroup of the start, and to that of the payload, which is the root of the container's cgroup namespace.
    /// What the container sees there is then what holds.
    fn both(&mut self, limit: Limit, file: &str, value: impl ToString) {
        let value = value.to_string();
        self.before(limit, self.place.tracking.group.join(file), &value);
        self.up(limit, self.place.payload().join(file), &value);
    }

    fn memory(&mut self, resources: &Resources) {
        let memory = &resources.memory;
        let swap = match memory.swap {
            Swap::Limit(bytes) => Some(bytes),
            Swap::Unlimited => None,
        };
        let wanted = [
            memory.hard.map(|_| Limit::Memory),
            memory.reserved.map(|_| Limit::MemoryReservation),
            swap.map(|_| Limit::Swap),
        ];
        let wanted: Vec<Limit> = wanted.into_iter().flatten().collect();
        if wanted.is_empty() {
            return;
        }
        match self.home("memory", &wanted) {
            Some(Home::V2) => {
                if let Some(hard) = memory.hard {
                    self.both(Limit::Memory, "memory.max", hard);
                }
                if let Some(reserved) = memory.reserved {
                    // The kernel protects a cgroup at most as far as the one above it is protected.
                    for group in self.place.siblings() {
                        self.before(Limit::MemoryReservation, group.join("memory.low"), reserved);
                    }
                }
                if let Some(swap) = swap {
                    self.both(Limit::Swap, "memory.swap.max", swap);
                }
            }
            Some(Home::V1(group)) => {
                if let Some(hard) = memory.hard {
                    let file = group.join("memory.limit_in_bytes");
                    self.before(Limit::Memory, file, hard);
                }
                if let Some(reserved) = memory.reserved {
                    let file = group.join("memory.soft_limit_in_bytes");
                    self.before(Limit::MemoryReservation, file, reserved);
                }
                // Of memory and swap together, and not below the limit of memory, which is therefore written first.
                if let (Some(swap), Some(hard)) = (swap, memory.hard) {
                    let file = group.join("memory.memsw.limit_in_bytes");
                    self.before(Limit::Swap, file, hard.saturating_add(swap));
                }
            }
            None => {}
        }
    }

    fn cpu(&mut self, resources: &Resources) {
        let cpu = &resources.cpu;
        let wanted = [
            cpu.shares.map(|_| Limit::Cpu),
            cpu.quota.map(|_| Limit::CpuHardLimit),
        ];
        let wanted: Vec<Limit> = wanted.into_iter().flatten().collect();
        if wanted.is_empty() {
            return;
        }
        match self.home("cpu", &wanted) {
            Some(Home::V2) => {
                if let Some(shares) = cpu.shares {
                    // A weight counts among the children of one cgroup.
                    for group in self.place.siblings() {
                        self.before(Limit::Cpu, group.join("cpu.weight"), weight(shares));
                    }
                    let file = self.place.payload().join("cpu.weight");
                    self.up(Limit::Cpu, file, weight(shares));
                }
                if let Some(quota) = cpu.quota {
                    let value = format!("{} {}", quota.quota, quota.period);
                    self.both(Limit::CpuHardLimit, "cpu.max", value);
                }
            }
            Some(Home::V1(group)) => {
                if let Some(shares) = cpu.shares {
                    self.before(Limit::Cpu, group.join("cpu.shares"), shares);
                }
                if let Some(quota) = cpu.quota {
                    let file = group.join("cpu.cfs_period_us");
                    self.before(Limit::CpuHardLimit, file, quota.period);
                    let file = group.join("cpu.cfs_quota_us");
                    self.before(Limit::CpuHardLimit, file, quota.quota);
                }
            }
            None => {}
        }
    }

    /// Without `cores` nothing is written: the cores that Nomad shares among tasks change while they run, and the cgroup of the start
    /// follows those of the cgroup above it, or in cgroup v1 is Nomad's own.
    fn cores(&mut self, resources: &Resources) {
        let Some(cores) = &resources.cpu.cores else {
            return;
        };
        match self.home("cpuset", &[Limit::Cores]) {
            Some(Home::V2) => self.both(Limit::Cores, "cpuset.cpus", cores),
            Some(Home::V1(group)) => self.before(Limit::Cores, group.join("cpuset.cpus"), cores),
            None => {}
        }
    }

    fn pids(&mut self, resources: &Resources) {
        let Some(pids) = resources.pids else {
            return;
        };
        let with_nspawn = pids.saturating_add(NSPAWN_PROCESSES);
        let (group, payload) = match self.home("pids", &[Limit::Pids]) {
            Some(Home::V2) => (self.place.tracking.group.clone(), self.place.payload()),
            // systemd-nspawn is moved out of it once the container is up.
            Some(Home::V1(group)) => (group.to_owned(), group.to_owned()),
            None => return,
        };
        self.before(Limit::Pids, group.join("pids.max"), with_nspawn);
        self.up(Limit::Pids, payload.join("pids.max"), pids);
    }

    /// Only cgroup v2 can limit them. In cgroup v1 a container can make none but in the named hierarchy.
    fn cgroups(&mut self) {
        if self.place.version_2 {
            let group = self.place.tracking.group.clone();
            let file = group.join("cgroup.max.descendants");
            self.before(Limit::Cgroups, file, MAX_DESCENDANTS);
            self.before(Limit::Cgroups, group.join("cgroup.max.depth"), MAX_DEPTH);
        }
    }
}

/// The weight of cgroup v2 (1 to 10000, 100 by default) for shares of cgroup v1 (2 to 262144, 1024 by default), as runc and Nomad map
/// them: a curve through minimum, default and maximum of both.
fn weight(shares: u64) -> u64 {
    const MIN: u64 = 2;
    const MAX: u64 = 262_144;
    if shares <= MIN {
        return 1;
    }
    if shares >= MAX {
        return 10_000;
    }
    #[expect(clippy::cast_precision_loss, reason = "below 2^18")]
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 1 to 10000"
    )]
    let weight = 10f64.powf(exponent).ceil() as u64;
    weight.clamp(1, 10_000)
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
