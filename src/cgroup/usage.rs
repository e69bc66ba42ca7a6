//! What the processes of a cgroup use, and how many of them the kernel has killed for want of memory.

use std::fs;

use super::Group;
use crate::container::Usage;
use crate::sys::procfs;

impl Group {
    /// The resource usage of its processes.
    pub fn usage(&self) -> Usage {
        let cpu = |key: &str| self.field("cpu.stat", key);
        let memory = |key: &str| self.field("memory.stat", key);
        let micro = |value: u64| value.saturating_mul(1000);
        Usage {
            cpu_user_ns: cpu("user_usec").map(micro),
            cpu_system_ns: cpu("system_usec").map(micro),
            throttled_periods: cpu("nr_throttled"),
            throttled_ns: cpu("throttled_usec").map(micro),
            // Without the memory controller, add up the resident memory of the processes.
            memory_rss: memory("anon").or_else(|| self.resident()),
            memory_cache: memory("file"),
            memory_usage: self.value("memory.current"),
            memory_peak: self.value("memory.peak"),
            memory_swap: self.value("memory.swap.current"),
        }
    }

    fn resident(&self) -> Option<u64> {
        let kib = |pid: i32| {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let value = procfs::status_field(&text, "RssAnon")?;
            value.strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        let all: Vec<u64> = self.processes().into_iter().filter_map(kib).collect();
        (!all.is_empty()).then(|| all.iter().sum::<u64>().saturating_mul(1024))
    }

    fn value(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path().join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    fn field(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path().join(file)).ok()?;
        text.lines().find_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_from_the_files_that_are_there() {
        let root = tempfile::tempdir().unwrap();
        fs::write(
            root.path().join("cpu.stat"),
            "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_throttled 3\nthrottled_usec 7\n",
        )
        .unwrap();
        fs::write(
            root.path().join("memory.stat"),
            "anon 4096\nfile 8192\nanon_thp 1\n",
        )
        .unwrap();
        fs::write(root.path().join("memory.current"), "12288\n").unwrap();
        let usage = Group::new(root.path()).usage();
        assert_eq!(usage.cpu_user_ns, Some(10_000));
        assert_eq!(usage.cpu_system_ns, Some(20_000));
        assert_eq!(usage.throttled_periods, Some(3));
        assert_eq!(usage.throttled_ns, Some(7_000));
        assert_eq!(usage.memory_rss, Some(4096));
        assert_eq!(usage.memory_cache, Some(8192));
        assert_eq!(usage.memory_usage, Some(12288));
        assert_eq!(usage.memory_peak, None);
    }
}
