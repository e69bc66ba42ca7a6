//! The resources in use on the machine and by a process.

use super::*;

/// The anonymous memory of a process, in KiB.
pub(super) fn own_memory(pid: i32) -> u64 {
    kib(&format!("/proc/{pid}/status"), "RssAnon:")
}

/// A value in KiB from a file in /proc.
pub(super) fn kib(file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap()
}

/// How many descriptors (`fd`) or threads (`task`) a process has.
pub(super) fn holds(pid: i32, what: &str) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/{what}")).unwrap();
    entries.count()
}

/// Waits until a process has no more than this many threads. The stacks of idle threads count as its memory, and how many there are depends
/// on how many lives met; they end after some seconds.
pub(super) async fn idle_threads_end(pid: i32, most: usize) {
    within("the threads that it had", async {
        while holds(pid, "task") > most {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// The kernel resources in use on the whole machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    /// cgroups of all hierarchies, and v2 cgroups that are removed but still dying.
    groups: u64,
    mounts: u64,
    /// systemd-nspawn's files in /run.
    files: u64,
    /// Unreclaimable kernel memory, in KiB.
    kernel: u64,
}

impl Machine {
    pub(super) fn now() -> Self {
        fn below(dir: &Path) -> u64 {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| 1 + below(&entry.path()))
                .sum()
        }
        let places = [
            "nspawn/propagate",
            "nspawn/locks",
            "nspawn/unix-export",
            "nspawn-uid",
        ];
        let files = places.map(|name| count(&Path::new("/run/systemd").join(name)));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        Self {
            groups: below(Path::new("/sys/fs/cgroup")) + dying(),
            mounts: u64::try_from(mounts.lines().count()).unwrap(),
            files: files.iter().sum(),
            kernel: kib("/proc/meminfo", "SUnreclaim:"),
        }
    }

    /// Other programs use the machine too, so the numbers are not compared exactly; a leak by every task is still detected.
    pub(super) fn is_flat(&self, early: &Self, lives: u64) -> bool {
        let grown = [
            self.groups.saturating_sub(early.groups),
            self.mounts.saturating_sub(early.mounts),
            self.files.saturating_sub(early.files),
            self.kernel.saturating_sub(early.kernel) / KERNEL_KIB,
        ];
        grown.iter().all(|more| *more < (lives / 4).max(50))
    }
}

pub(super) fn count(dir: &Path) -> u64 {
    u64::try_from(fs::read_dir(dir).into_iter().flatten().count()).unwrap()
}

/// v2 cgroups that are removed but still dying. With the memory controller they stay as long as page cache is charged to them, so their
/// number says nothing.
pub(super) fn dying() -> u64 {
    let top = Layout::of_this_host().tracking.unwrap_or_default();
    let read = |name: &str| fs::read_to_string(top.join(name)).unwrap_or_default();
    if read("cgroup.controllers").contains("memory") {
        return 0;
    }
    let text = read("cgroup.stat");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_dying_descendants "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}
