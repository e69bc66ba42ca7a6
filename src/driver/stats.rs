//! Computes the figures that Nomad shows from two readings of a container's usage. Pure. Does not report what the host could not
//! measure.

use std::time::Instant;

use crate::container::Usage;
use crate::proto::base::ClientTopology;
use crate::proto::driver::{CpuUsage, MemoryUsage, TaskResourceUsage, cpu_usage, memory_usage};

/// The CPU capacity of the node, as Nomad counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Compute {
    /// MHz per core, averaged over all cores.
    mhz_per_core: f64,
}

impl Compute {
    /// `None` when the topology has no usable values.
    pub(super) fn of(topology: &ClientTopology) -> Option<Self> {
        let speed = |core: &crate::proto::base::ClientTopologyCore| {
            let known = [core.base_speed, core.max_speed, core.guess_speed];
            known.into_iter().find(|speed| *speed > 0).unwrap_or(0)
        };
        let total = match topology.override_total_compute {
            0 => topology
                .cores
                .iter()
                .map(speed)
                .fold(0, u64::saturating_add),
            fixed => fixed,
        };
        let cores = topology.cores.len();
        (cores > 0 && total > 0).then(|| Self {
            mhz_per_core: float(total) / float(cores as u64),
        })
    }
}

/// Keeps the previous reading.
#[derive(Debug, Default)]
pub(super) struct UsageSampler {
    before: Option<(Instant, Usage)>,
}

impl UsageSampler {
    /// Records a reading and returns the usage. CPU percentages refer to the time since the previous reading.
    pub(super) fn read(
        &mut self,
        now: Instant,
        usage: Usage,
        compute: Option<Compute>,
    ) -> TaskResourceUsage {
        let before = self.before.replace((now, usage));
        let percent = |counter: fn(&Usage) -> Option<u64>| {
            let after = counter(&usage)?;
            let Some((then, before)) = &before else {
                return Some(0.0);
            };
            let spent = counter(before).map_or(0, |before| after.saturating_sub(before));
            let passed = now.saturating_duration_since(*then).as_secs_f64() * 1e9;
            Some(if passed > 0.0 {
                float(spent) / passed * 100.0
            } else {
                0.0
            })
        };
        let user = percent(|usage| usage.cpu_user_ns);
        let system = percent(|usage| usage.cpu_system_ns);
        TaskResourceUsage {
            cpu: Some(cpu(user, system, &usage, compute)),
            memory: Some(memory(&usage)),
        }
    }
}

fn cpu(
    user: Option<f64>,
    system: Option<f64>,
    usage: &Usage,
    compute: Option<Compute>,
) -> CpuUsage {
    use cpu_usage::Fields;
    let percent = user.zip(system).map(|(user, system)| user + system);
    let ticks = percent
        .zip(compute)
        .map(|(percent, compute)| percent / 100.0 * compute.mhz_per_core);
    CpuUsage {
        system_mode: system.unwrap_or_default(),
        user_mode: user.unwrap_or_default(),
        total_ticks: ticks.unwrap_or_default(),
        throttled_periods: usage.throttled_periods.unwrap_or_default(),
        throttled_time: usage.throttled_ns.unwrap_or_default(),
        percent: percent.unwrap_or_default(),
        measured_fields: measured(&[
            (Fields::SystemMode as i32, system.is_some()),
            (Fields::UserMode as i32, user.is_some()),
            (Fields::TotalTicks as i32, ticks.is_some()),
            (
                Fields::ThrottledPeriods as i32,
                usage.throttled_periods.is_some(),
            ),
            (Fields::ThrottledTime as i32, usage.throttled_ns.is_some()),
            (Fields::Percent as i32, percent.is_some()),
        ]),
    }
}

fn memory(usage: &Usage) -> MemoryUsage {
    use memory_usage::Fields;
    MemoryUsage {
        rss: usage.memory_rss.unwrap_or_default(),
        cache: usage.memory_cache.unwrap_or_default(),
        max_usage: usage.memory_peak.unwrap_or_default(),
        kernel_usage: 0,
        kernel_max_usage: 0,
        measured_fields: measured(&[
            (Fields::Rss as i32, usage.memory_rss.is_some()),
            (Fields::Cache as i32, usage.memory_cache.is_some()),
            (Fields::MaxUsage as i32, usage.memory_peak.is_some()),
            (Fields::Usage as i32, usage.memory_usage.is_some()),
            (Fields::Swap as i32, usage.memory_swap.is_some()),
        ]),
        usage: usage.memory_usage.unwrap_or_default(),
        swap: usage.memory_swap.unwrap_or_default(),
    }
}

fn measured(fields: &[(i32, bool)]) -> Vec<i32> {
    fields
        .iter()
        .filter(|(_, known)| *known)
        .map(|(field, _)| *field)
        .collect()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "shown to people; exact below 104 days of nanoseconds"
)]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::base::ClientTopologyCore;
    use std::time::Duration;

    fn used(user_ms: u64, system_ms: u64) -> Usage {
        Usage {
            cpu_user_ns: Some(user_ms * 1_000_000),
            cpu_system_ns: Some(system_ms * 1_000_000),
            memory_rss: Some(4096),
            ..Usage::default()
        }
    }

    fn compute() -> Option<Compute> {
        let core = |base_speed, max_speed| ClientTopologyCore {
            base_speed,
            max_speed,
            ..Default::default()
        };
        Compute::of(&ClientTopology {
            cores: vec![core(2000, 9000), core(0, 3000)],
            ..Default::default()
        })
    }

    #[test]
    fn percent_is_of_one_core_over_the_last_interval() {
        let (mut sampler, start) = (UsageSampler::default(), Instant::now());
        let first = sampler.read(start, used(5000, 100), compute()).cpu.unwrap();
        assert_eq!((first.percent, first.total_ticks), (0.0, 0.0));
        let second = sampler
            .read(start + Duration::from_secs(2), used(8000, 1100), compute())
            .cpu
            .unwrap();
        assert_eq!(
            (second.user_mode, second.system_mode, second.percent),
            (150.0, 50.0, 200.0)
        );
        assert_eq!(
            second.total_ticks, 5000.0,
            "two cores of 2500 MHz on average"
        );
    }

    #[test]
    fn only_measured_values_are_reported() {
        let read = UsageSampler::default().read(Instant::now(), Usage::default(), None);
        assert!(read.cpu.unwrap().measured_fields.is_empty());
        assert!(read.memory.unwrap().measured_fields.is_empty());
        let read = UsageSampler::default().read(Instant::now(), used(1, 1), None);
        use cpu_usage::Fields::{Percent, SystemMode, UserMode};
        assert_eq!(
            read.cpu.unwrap().measured_fields,
            [SystemMode as i32, UserMode as i32, Percent as i32]
        );
        assert_eq!(
            read.memory.unwrap().measured_fields,
            [memory_usage::Fields::Rss as i32]
        );
    }

    #[test]
    fn clocks_that_stop_or_run_backwards_are_harmless() {
        let (mut sampler, now) = (UsageSampler::default(), Instant::now());
        sampler.read(now, used(100, 100), None);
        let same = sampler.read(now, used(200, 200), None).cpu.unwrap();
        assert_eq!(same.percent, 0.0);
        let back = sampler
            .read(now + Duration::from_secs(1), used(1, 1), None)
            .cpu
            .unwrap();
        assert_eq!(back.percent, 0.0);
    }

    #[test]
    fn the_total_may_be_set_by_the_operator() {
        let topology = ClientTopology {
            cores: vec![ClientTopologyCore::default(); 4],
            override_total_compute: 8000,
            ..Default::default()
        };
        assert_eq!(Compute::of(&topology).unwrap().mhz_per_core, 2000.0);
        assert_eq!(Compute::of(&ClientTopology::default()), None);
    }
}
