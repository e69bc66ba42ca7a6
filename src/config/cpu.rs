//! Validates limits of processor time: the weight, the hard limit and reserved cores. What the host has is compared last.

use std::io;
use std::ops::RangeInclusive;

use crate::container::{Cpu, CpuQuota};
use crate::sys::kernel;

use super::decode::quoted;
use super::options::TaskOptions;
use super::values::whole;
use super::{AllocatedResources, ConfigError};

const CORES: &str = "task.resources.cores";
const CPU: &str = "task.resources.cpu";
const HARD_LIMIT: &str = "config.cpu_hard_limit";
const PERIOD: &str = "config.cpu_cfs_period";

/// The kernel's bounds for the shares of cgroup v1; the driver converts them to the weight of cgroup v2.
const SHARES: RangeInclusive<u64> = 2..=262_144;
/// The smallest quota that the kernel accepts, in microseconds.
const MIN_QUOTA: u64 = 1000;

/// The limits of processor time as far as the host does not matter.
#[derive(Debug)]
pub(super) struct CpuOptions {
    shares: Option<u64>,
    cores: Option<(String, CpuList)>,
    hard_limit: Option<HardLimit>,
}

/// A limit relative to the processors of the host.
#[derive(Debug, Clone, Copy)]
struct HardLimit {
    /// More than 0 and at most 1.
    fraction: f64,
    /// In microseconds.
    period: u64,
}

impl CpuOptions {
    /// Validates the options and what Nomad allocated.
    pub(super) fn of(
        options: &TaskOptions,
        given: &AllocatedResources,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            shares: shares(given.cpu_mhz)?,
            cores: cores(&given.cores)?,
            hard_limit: hard_limit(options, given.cpu_fraction)?,
        })
    }

    /// The limits on this host. Fails if it lacks a reserved core.
    pub(super) fn on_host(self) -> Result<Cpu, ConfigError> {
        let host = || {
            let text = kernel::online_cpus();
            text.and_then(|text| {
                CpuList::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
            })
        };
        let unknown = |option, error: io::Error| {
            let reason = format!("the processors of this host can't be read: {error}");
            ConfigError::on_host(option, reason, &error)
        };
        if let Some((text, list)) = &self.cores {
            check_cores(text, list, &host().map_err(|error| unknown(CORES, error))?)?;
        }
        let quota = self.hard_limit.map(|limit| {
            let count = host().map_err(|error| unknown(HARD_LIMIT, error))?.count();
            Ok(limit.quota(count))
        });
        Ok(Cpu {
            shares: self.shares,
            quota: quota.transpose()?,
            cores: self.cores.map(|(text, _)| text),
        })
    }
}

impl HardLimit {
    /// The processor time per period on a host with this number of processors.
    fn quota(self, processors: u64) -> CpuQuota {
        let all = self.period.saturating_mul(processors);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a fraction of `all`, which is far below 2^53"
        )]
        let share = (self.fraction * all as f64) as u64;
        CpuQuota {
            quota: share.max(MIN_QUOTA),
            period: self.period,
        }
    }
}

fn shares(mhz: i64) -> Result<Option<u64>, ConfigError> {
    let Ok(mhz) = u64::try_from(mhz) else {
        let reason = format!("{mhz} MHz is negative: use at least 1");
        return Err(ConfigError::new(CPU, reason));
    };
    let (least, most) = (*SHARES.start(), *SHARES.end());
    Ok(Some(mhz)
        .filter(|mhz| *mhz > 0)
        .map(|mhz| mhz.clamp(least, most)))
}

fn hard_limit(options: &TaskOptions, fraction: f64) -> Result<Option<HardLimit>, ConfigError> {
    let period = whole(PERIOD, &options.cpu_cfs_period, 1000..=1_000_000)?;
    // Not used otherwise, and infinite where an agent does not know its node's processors.
    if !options.cpu_hard_limit {
        return Ok(None);
    }
    if !fraction.is_finite() || fraction < 0.0 {
        let reason = format!(
            "{fraction} is not a fraction of the node's processors, which config.cpu_hard_limit needs"
        );
        return Err(ConfigError::new(CPU, reason));
    }
    if fraction == 0.0 {
        let reason = "true needs a share of the node's processors, and Nomad gave the task none: set cpu or cores in its resources block";
        return Err(ConfigError::new(HARD_LIMIT, reason));
    }
    Ok(Some(HardLimit {
        // More is possible if the node has lost processors since the task was placed.
        fraction: fraction.min(1.0),
        period: period.unsigned_abs(),
    }))
}

fn cores(text: &str) -> Result<Option<(String, CpuList)>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let list = CpuList::parse(text).ok_or_else(|| {
        let reason = format!("{} is not a list of processors such as 0-3,7", quoted(text));
        ConfigError::new(CORES, reason)
    })?;
    Ok(Some((text.to_owned(), list)))
}

fn check_cores(text: &str, list: &CpuList, host: &CpuList) -> Result<(), ConfigError> {
    if host.contains_all(list) {
        return Ok(());
    }
    let reason = format!(
        "{} is not a part of this host's processors, {host}",
        quoted(text)
    );
    Err(ConfigError::new(CORES, reason))
}

/// A set of processors: ranges in ascending order that neither overlap nor touch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CpuList(Vec<RangeInclusive<u32>>);

impl CpuList {
    /// Parses the kernel's list format, without its strides (`0-10:2/4`), which Nomad does not use.
    fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|_| digits)
        };
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            ranges.push(first..=last);
        }
        ranges.sort_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u32>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(before) if *range.start() <= before.end().saturating_add(1) => {
                    *before = *before.start()..=*before.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Some(Self(merged))
    }

    fn count(&self) -> u64 {
        let sizes = self.0.iter();
        sizes
            .map(|range| u64::from(range.end() - range.start()) + 1)
            .sum()
    }

    fn contains_all(&self, others: &Self) -> bool {
        let within = |range: &RangeInclusive<u32>| {
            let mut own = self.0.iter();
            own.any(|own| own.contains(range.start()) && own.contains(range.end()))
        };
        others.0.iter().all(within)
    }
}

impl std::fmt::Display for CpuList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            let (first, last) = (range.start(), range.end());
            match first == last {
                true => write!(f, "{separator}{first}")?,
                false => write!(f, "{separator}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("0", Some(("0", 1)))]
    #[case("0-3,7", Some(("0-3,7", 5)))]
    #[case("7,2-3,0-2,4", Some(("0-4,7", 6)))]
    #[case("0-4294967295", Some(("0-4294967295", 1 << 32)))]
    #[case("", None)]
    #[case("0,", None)]
    #[case("3-1", None)]
    #[case("0-", None)]
    #[case("-1", None)]
    #[case("+1", None)]
    #[case("0 1", None)]
    #[case("0-1-2", None)]
    #[case("0-10:2/4", None)]
    #[case("4294967296", None)]
    fn lists_of_processors(#[case] text: &str, #[case] wanted: Option<(&str, u64)>) {
        let read = CpuList::parse(text).map(|list| (list.to_string(), list.count()));
        assert_eq!(read, wanted.map(|(text, count)| (text.to_owned(), count)));
    }

    #[rstest]
    #[case("0-1", "0-1", true)]
    #[case("1", "0-3", true)]
    #[case("0,2", "0-2", true)]
    #[case("0,2", "0-1,3", false)]
    #[case("0-4294967295", "0-3", false)]
    fn reserved_cores_are_compared_with_the_host(
        #[case] cores: &str,
        #[case] host: &str,
        #[case] allowed: bool,
    ) {
        let (_, list) = super::cores(cores).unwrap().unwrap();
        let checked = check_cores(cores, &list, &CpuList::parse(host).unwrap());
        let message = checked.map_err(|error| error.to_string());
        let refused = format!(
            "task.resources.cores: {cores:?} is not a part of this host's processors, {host}"
        );
        assert_eq!(message, if allowed { Ok(()) } else { Err(refused) });
    }

    #[rstest]
    #[case(0.25, 100_000, 2, 50_000)]
    #[case(1.0, 100_000, 128, 12_800_000)]
    #[case(0.000_001, 100_000, 2, 1000)]
    #[case(f64::MIN_POSITIVE, 1000, 1, 1000)]
    #[case(0.5, 1_000_000, 8, 4_000_000)]
    fn a_hard_limit_is_a_share_of_all_processors(
        #[case] fraction: f64,
        #[case] period: u64,
        #[case] processors: u64,
        #[case] quota: u64,
    ) {
        let limit = HardLimit { fraction, period };
        assert_eq!(limit.quota(processors), CpuQuota { quota, period });
    }
}
