//! Computes the figures that Nomad shows from two readings of a container's usage. Pure. Does not report what was not measured: what
//! the host does not provide, and percentages as long as there is only one reading.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::container::{Process, ProcessUsage, Reading, Usage};
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

/// How long the figures of the processes are kept and sent again: to read those of a process takes about as long as to read those of a
/// whole container, several times over. Nomad's own executor keeps them for 5 seconds.
const PROCESSES_KEPT: Duration = Duration::from_secs(10);

/// CPU time in percent of one core.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Percent {
    user: f64,
    system: f64,
}

/// CPU time that has been used until one moment, nanoseconds.
#[derive(Debug, Clone, Copy)]
struct CpuTime {
    at: Instant,
    user: u64,
    system: u64,
}

impl CpuTime {
    /// The share of a core since `before`; `None` if no time has passed. A counter that went back counts as one that stood still.
    fn since(self, before: Self) -> Option<Percent> {
        let passed = self.at.checked_duration_since(before.at)?;
        let passed = passed.as_secs_f64() * 1e9;
        let share = |after: u64, before: u64| float(after.saturating_sub(before)) / passed * 100.0;
        (passed > 0.0).then(|| Percent {
            user: share(self.user, before.user),
            system: share(self.system, before.system),
        })
    }
}

/// A process as of the last reading, and what it used until then.
#[derive(Debug, Clone, Copy)]
struct ProcessFigures {
    usage: ProcessUsage,
    percent: Option<Percent>,
}

/// Turns the readings of one stream of statistics into what Nomad shows. Keeps what the next reading is compared with.
#[derive(Debug, Default)]
pub(super) struct Figures {
    before: Option<CpuTime>,
    processes: Vec<ProcessFigures>,
    processes_read: Option<Instant>,
}

impl Figures {
    /// Whether the next reading should include the processes.
    pub(super) fn wants_processes(&self, now: Instant) -> bool {
        self.processes_read
            .is_none_or(|read| now.saturating_duration_since(read) >= PROCESSES_KEPT)
    }

    /// Takes a reading. Returns the figures of the container and of its processes by pid. Percentages are those of the time since
    /// the previous reading.
    pub(super) fn take(
        &mut self,
        now: Instant,
        reading: Reading,
        compute: Option<Compute>,
    ) -> (TaskResourceUsage, HashMap<String, TaskResourceUsage>) {
        let usage = reading.usage;
        let time = usage.cpu_user_ns.zip(usage.cpu_system_ns);
        let time = time.map(|(user, system)| CpuTime {
            at: now,
            user,
            system,
        });
        let before = std::mem::replace(&mut self.before, time);
        let percent = time
            .zip(before)
            .and_then(|(time, before)| time.since(before));
        if let Some(processes) = reading.processes {
            self.take_processes(now, processes);
        }
        let whole = TaskResourceUsage {
            cpu: Some(cpu(percent, &usage, compute)),
            memory: Some(memory(&usage)),
        };
        let processes = self.processes.iter().map(|figures| {
            let pid = figures.usage.process.pid.to_string();
            (pid, process_usage(figures, compute))
        });
        (whole, processes.collect())
    }

    fn take_processes(&mut self, now: Instant, processes: Vec<ProcessUsage>) {
        let before = self.processes_read.replace(now);
        let known: HashMap<Process, ProcessUsage> = self
            .processes
            .drain(..)
            .map(|figures| (figures.usage.process, figures.usage))
            .collect();
        let time = |at: Instant, usage: &ProcessUsage| CpuTime {
            at,
            user: usage.cpu_user_ns,
            system: usage.cpu_system_ns,
        };
        self.processes.extend(processes.into_iter().map(|usage| {
            let earlier = known.get(&usage.process).zip(before);
            let percent =
                earlier.and_then(|(earlier, at)| time(now, &usage).since(time(at, earlier)));
            ProcessFigures { usage, percent }
        }));
        self.processes.shrink_to_fit();
    }
}

fn cpu(percent: Option<Percent>, usage: &Usage, compute: Option<Compute>) -> CpuUsage {
    use cpu_usage::Fields;
    let sum = percent.map(|percent| percent.user + percent.system);
    let ticks = sum
        .zip(compute)
        .map(|(percent, compute)| percent / 100.0 * compute.mhz_per_core);
    CpuUsage {
        system_mode: percent.map_or(0.0, |percent| percent.system),
        user_mode: percent.map_or(0.0, |percent| percent.user),
        total_ticks: ticks.unwrap_or_default(),
        throttled_periods: usage.throttled_periods.unwrap_or_default(),
        throttled_time: usage.throttled_ns.unwrap_or_default(),
        percent: sum.unwrap_or_default(),
        measured_fields: measured(&[
            (Fields::SystemMode as i32, percent.is_some()),
            (Fields::UserMode as i32, percent.is_some()),
            (Fields::TotalTicks as i32, ticks.is_some()),
            (
                Fields::ThrottledPeriods as i32,
                usage.throttled_periods.is_some(),
            ),
            (Fields::ThrottledTime as i32, usage.throttled_ns.is_some()),
            (Fields::Percent as i32, sum.is_some()),
        ]),
    }
}

fn memory(usage: &Usage) -> MemoryUsage {
    use memory_usage::Fields;
    MemoryUsage {
        rss: usage.memory_rss.unwrap_or_default(),
        cache: usage.memory_cache.unwrap_or_default(),
        max_usage: usage.memory_peak.unwrap_or_default(),
        kernel_usage: usage.memory_kernel.unwrap_or_default(),
        kernel_max_usage: usage.memory_kernel_peak.unwrap_or_default(),
        measured_fields: measured(&[
            (Fields::Rss as i32, usage.memory_rss.is_some()),
            (Fields::Cache as i32, usage.memory_cache.is_some()),
            (Fields::MaxUsage as i32, usage.memory_peak.is_some()),
            (Fields::KernelUsage as i32, usage.memory_kernel.is_some()),
            (
                Fields::KernelMaxUsage as i32,
                usage.memory_kernel_peak.is_some(),
            ),
            (Fields::Usage as i32, usage.memory_usage.is_some()),
            (Fields::Swap as i32, usage.memory_swap.is_some()),
        ]),
        usage: usage.memory_usage.unwrap_or_default(),
        swap: usage.memory_swap.unwrap_or_default(),
    }
}

/// What the executor reports of a process, except for swap, which it does not measure either and reports as zero.
fn process_usage(figures: &ProcessFigures, compute: Option<Compute>) -> TaskResourceUsage {
    let usage = Usage {
        memory_rss: Some(figures.usage.memory_rss),
        ..Usage::default()
    };
    TaskResourceUsage {
        cpu: Some(cpu(figures.percent, &usage, compute)),
        memory: Some(memory(&usage)),
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
    use cpu_usage::Fields::{Percent as PercentField, SystemMode, TotalTicks, UserMode};
    use proptest::prelude::*;
    use std::time::Duration;

    fn used(user_ms: u64, system_ms: u64) -> Reading {
        Reading {
            usage: Usage {
                cpu_user_ns: Some(user_ms * 1_000_000),
                cpu_system_ns: Some(system_ms * 1_000_000),
                memory_rss: Some(4096),
                ..Usage::default()
            },
            processes: None,
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

    fn cpu_of(figures: &mut Figures, now: Instant, reading: Reading) -> CpuUsage {
        figures.take(now, reading, compute()).0.cpu.unwrap()
    }

    #[test]
    fn percent_is_of_one_core_over_the_last_interval() {
        let (mut figures, start) = (Figures::default(), Instant::now());
        let first = cpu_of(&mut figures, start, used(5000, 100));
        assert_eq!((first.percent, first.total_ticks), (0.0, 0.0));
        assert_eq!(first.measured_fields, Vec::<i32>::new());
        let second = cpu_of(
            &mut figures,
            start + Duration::from_secs(2),
            used(8000, 1100),
        );
        assert_eq!(
            (second.user_mode, second.system_mode, second.percent),
            (150.0, 50.0, 200.0)
        );
        assert_eq!(
            second.total_ticks, 5000.0,
            "two cores of 2500 MHz on average"
        );
        let fields = [SystemMode, UserMode, TotalTicks, PercentField];
        assert_eq!(second.measured_fields, fields.map(|field| field as i32));
    }

    #[test]
    fn only_measured_values_are_reported() {
        let (mut figures, now) = (Figures::default(), Instant::now());
        let (read, processes) = figures.take(now, Reading::default(), None);
        assert!(read.cpu.unwrap().measured_fields.is_empty());
        assert!(read.memory.unwrap().measured_fields.is_empty());
        assert!(processes.is_empty());
        // No CPU time before, so there is no percentage yet.
        let (read, _) = figures.take(now + Duration::from_secs(1), used(1, 1), None);
        assert!(read.cpu.unwrap().measured_fields.is_empty());
        let rss = memory_usage::Fields::Rss as i32;
        assert_eq!(read.memory.unwrap().measured_fields, [rss]);
        // A zero that was measured is listed; ticks need a topology.
        let (read, _) = figures.take(now + Duration::from_secs(2), used(1, 1), None);
        let cpu = read.cpu.unwrap();
        let fields = [SystemMode, UserMode, PercentField];
        assert_eq!(cpu.measured_fields, fields.map(|field| field as i32));
        assert_eq!(cpu.percent, 0.0);
    }

    #[test]
    fn clocks_that_stop_or_run_backwards_are_harmless() {
        let (mut figures, now) = (Figures::default(), Instant::now());
        cpu_of(&mut figures, now, used(100, 100));
        let same = cpu_of(&mut figures, now, used(200, 200));
        assert_eq!((same.percent, same.measured_fields.len()), (0.0, 0));
        let back = cpu_of(&mut figures, now + Duration::from_secs(1), used(1, 1));
        assert_eq!((back.percent, back.measured_fields.len()), (0.0, 4));
    }

    fn process(pid: i32, start: u64, user_ms: u64) -> ProcessUsage {
        ProcessUsage {
            process: Process { pid, start },
            cpu_user_ns: user_ms * 1_000_000,
            cpu_system_ns: 0,
            memory_rss: 8192,
        }
    }

    #[test]
    fn processes_are_compared_with_themselves_and_kept_in_between() {
        let (mut figures, start) = (Figures::default(), Instant::now());
        let reading = |processes: &[ProcessUsage]| Reading {
            processes: Some(processes.to_vec()),
            ..used(0, 0)
        };
        assert!(figures.wants_processes(start));
        let first = reading(&[process(7, 1, 1000), process(8, 1, 1000)]);
        let (_, first) = figures.take(start, first, None);
        let seven = &first["7"];
        assert_eq!(seven.memory.as_ref().unwrap().rss, 8192);
        assert!(seven.cpu.as_ref().unwrap().measured_fields.is_empty());
        let soon = start + Duration::from_secs(1);
        assert!(!figures.wants_processes(soon));
        let (_, kept) = figures.take(soon, used(0, 0), None);
        assert_eq!(kept, first);
        let later = start + Duration::from_secs(10);
        assert!(figures.wants_processes(later));
        // Another process has got the pid 8.
        let second = reading(&[process(7, 1, 6000), process(8, 2, 9000)]);
        let (_, second) = figures.take(later, second, None);
        assert_eq!(second["7"].cpu.as_ref().unwrap().percent, 50.0);
        assert!(second["8"].cpu.as_ref().unwrap().measured_fields.is_empty());
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

    /// A topology with any number of cores and speed.
    fn any_compute() -> impl Strategy<Value = Option<Compute>> {
        (0..4usize, any::<u64>()).prop_map(|(cores, total)| {
            Compute::of(&ClientTopology {
                cores: vec![ClientTopologyCore::default(); cores],
                override_total_compute: total,
                ..Default::default()
            })
        })
    }

    /// A reading, and the time since the one before, also negative.
    fn any_reading() -> impl Strategy<Value = (i64, Reading)> {
        let process =
            (0..3i32, 0..2u64, any::<[u64; 3]>()).prop_map(|(pid, start, [user, system, rss])| {
                ProcessUsage {
                    process: Process { pid, start },
                    cpu_user_ns: user,
                    cpu_system_ns: system,
                    memory_rss: rss,
                }
            });
        let processes = proptest::option::of(proptest::collection::vec(process, 0..4));
        let times = prop_oneof![Just(0), -3i64..3, -1_000_000_000_000i64..1_000_000_000_000];
        (times, any::<[Option<u64>; 3]>(), processes).prop_map(
            |(passed, [cpu_user_ns, cpu_system_ns, memory_rss], processes)| {
                let usage = Usage {
                    cpu_user_ns,
                    cpu_system_ns,
                    memory_rss,
                    ..Usage::default()
                };
                (passed, Reading { usage, processes })
            },
        )
    }

    fn is_plain(usage: &TaskResourceUsage) -> bool {
        let cpu = usage.cpu.as_ref().unwrap();
        let values = [
            (cpu.user_mode, UserMode),
            (cpu.system_mode, SystemMode),
            (cpu.percent, PercentField),
            (cpu.total_ticks, TotalTicks),
        ];
        values.iter().all(|(value, field)| {
            let listed = cpu.measured_fields.contains(&(*field as i32));
            value.is_finite() && *value >= 0.0 && (listed || *value == 0.0)
        })
    }

    proptest! {
        #[test]
        fn no_figure_is_negative_or_infinite(
            readings in proptest::collection::vec(any_reading(), 1..6),
            compute in any_compute(),
        ) {
            let mut figures = Figures::default();
            let mut now = Instant::now() + Duration::from_secs(100_000);
            for (passed, reading) in readings {
                let step = Duration::from_nanos(passed.unsigned_abs());
                now = if passed < 0 { now - step } else { now + step };
                let time = reading.usage.cpu_user_ns.zip(reading.usage.cpu_system_ns);
                let (whole, processes) = figures.take(now, reading, compute);
                for usage in std::iter::once(&whole).chain(processes.values()) {
                    prop_assert!(is_plain(usage), "{:?}", usage);
                }
                let listed = whole.cpu.unwrap().measured_fields.contains(&(PercentField as i32));
                prop_assert!(!listed || time.is_some());
            }
        }
    }
}
