//! What the processes of a cgroup use. The files with the figures stay open between readings, because opening one takes longer than
//! reading it. Where no process has run since the last reading, only the CPU time is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};

use super::processes::Members;
use crate::container::{ProcessUsage, Reading, Usage};

/// How long the sum of the memory of all processes is kept, which is read where there is no memory controller: it takes longer than
/// everything else together. It is also read with the processes, which is more often.
const SUM_KEPT: Duration = Duration::from_secs(15);
/// How long figures are kept while no process of the container runs. Only the kernel changes them then, when it reclaims memory.
const IDLE_KEPT: Duration = Duration::from_secs(30);
/// More than any of the files has.
const BUFFER: usize = 8 * 1024;

/// The number of files that are kept open, of all containers.
static KEPT: AtomicU64 = AtomicU64::new(0);

/// The files with the figures of one container. Each is opened at the first reading and read again from its beginning at the next.
#[derive(Debug)]
pub struct UsageFiles {
    /// The cgroup that contains every process of the container.
    group: Option<Box<Path>>,
    /// The cgroups of its cgroup v1 controllers.
    memory: Option<Box<Path>>,
    cpu: Option<Box<Path>>,
    cpuacct: Option<Box<Path>>,
    files: [FigureFile; FILES.len()],
    /// How many files may be kept open, of all containers.
    limit: u64,
    /// The sum of the memory of all processes, and when it was read.
    anonymous: Option<(Instant, Option<u64>)>,
    usage: Option<Kept<Usage>>,
    processes: Option<Kept<Vec<ProcessUsage>>>,
}

/// CPU time in user mode and in the kernel, nanoseconds. Their sum is exact, so it grows whenever a process runs.
type CpuTime = (u64, u64);

/// Figures that hold as long as no process runs.
#[derive(Debug)]
struct Kept<T> {
    read: Instant,
    /// Read before the figures, so that it differs from the next one if a process ran meanwhile.
    cpu_time: CpuTime,
    figures: T,
}

impl<T> Kept<T> {
    fn new(read: Instant, cpu_time: Option<CpuTime>, figures: T) -> Option<Self> {
        cpu_time.map(|cpu_time| Self {
            read,
            cpu_time,
            figures,
        })
    }

    /// The figures, if they still hold.
    fn get(kept: Option<&Self>, now: Instant, cpu_time: Option<CpuTime>) -> Option<&T> {
        let kept = kept.filter(|kept| {
            let age = now.saturating_duration_since(kept.read);
            Some(kept.cpu_time) == cpu_time && age < IDLE_KEPT
        });
        kept.map(|kept| &kept.figures)
    }
}

/// The directory of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Group,
    Memory,
    Cpu,
    CpuAcct,
}

/// Every file that may have figures, those with the CPU time first. What a host lacks is tried once.
const FILES: [(Place, &str); 13] = [
    (Place::Group, "cpu.stat"),
    (Place::CpuAcct, "cpuacct.usage_user"),
    (Place::CpuAcct, "cpuacct.usage_sys"),
    (Place::Group, "memory.stat"),
    (Place::Group, "memory.current"),
    (Place::Group, "memory.peak"),
    (Place::Group, "memory.swap.current"),
    (Place::Memory, "memory.stat"),
    (Place::Memory, "memory.usage_in_bytes"),
    (Place::Memory, "memory.max_usage_in_bytes"),
    (Place::Memory, "memory.kmem.usage_in_bytes"),
    (Place::Memory, "memory.kmem.max_usage_in_bytes"),
    (Place::Cpu, "cpu.stat"),
];
/// How many of them have the CPU time.
const CPU_FILES: usize = 3;

impl UsageFiles {
    /// The files of the container with this cgroup and these cgroups of cgroup v1 controllers. Opens nothing yet.
    pub fn new(group: Option<&Path>, controllers: &BTreeMap<String, PathBuf>) -> Self {
        let boxed = |path: &Path| Box::<Path>::from(path);
        let controller = |name: &str| controllers.get(name).map(|path| boxed(path));
        Self {
            group: group.map(boxed),
            memory: controller("memory"),
            cpu: controller("cpu"),
            cpuacct: controller("cpuacct"),
            files: Default::default(),
            // The other half of the descriptors that this process may have is for starts.
            limit: getrlimit(Resource::RLIMIT_NOFILE).map_or(512, |(limit, _)| limit / 2),
            anonymous: None,
            usage: None,
            processes: None,
        }
    }

    /// Reads the figures, those of the processes too if asked for. `None` if the container's cgroups do not exist (any more).
    pub fn read(&mut self, with_processes: bool) -> Option<Reading> {
        let now = Instant::now();
        let mut usage = Usage::default();
        self.read_files(0..CPU_FILES, &mut usage);
        let cpu_time = usage.cpu_user_ns.zip(usage.cpu_system_ns);
        let processes = with_processes.then(|| self.processes(now, cpu_time));
        if let Some(usage) = Kept::get(self.usage.as_ref(), now, cpu_time) {
            let usage = *usage;
            return Some(Reading { usage, processes });
        }
        self.read_files(CPU_FILES..FILES.len(), &mut usage);
        let directory = self.group.as_ref().or(self.memory.as_ref());
        if usage == Usage::default() && directory.is_some_and(|path| !path.is_dir()) {
            return None;
        }
        if usage.memory_rss.is_none() {
            usage.memory_rss = self.anonymous(now, with_processes);
        }
        self.usage = Kept::new(now, cpu_time, usage);
        Some(Reading { usage, processes })
    }

    /// Adds the figures in these of the files. Their order is that of preference.
    fn read_files(&mut self, some: Range<usize>, usage: &mut Usage) {
        let mut buffer = [0; BUFFER];
        for index in some {
            let (place, name) = FILES[index];
            let is_needed = place != Place::CpuAcct
                || usage.cpu_user_ns.is_none()
                || usage.cpu_system_ns.is_none();
            let mut file = std::mem::take(&mut self.files[index]);
            if let Some(directory) = self.directory(place).filter(|_| is_needed)
                && let Some(text) = file.read(|| directory.join(name), self.limit, &mut buffer)
            {
                take_figures(usage, place, name, text);
            }
            self.files[index] = file;
        }
    }

    fn processes(&mut self, now: Instant, cpu_time: Option<CpuTime>) -> Vec<ProcessUsage> {
        if let Some(kept) = Kept::get(self.processes.as_ref(), now, cpu_time) {
            return kept.clone();
        }
        let read = self.members().usage();
        self.processes = Kept::new(now, cpu_time, read.clone());
        read
    }

    fn directory(&self, place: Place) -> Option<&Path> {
        match place {
            Place::Group => self.group.as_deref(),
            Place::Memory => self.memory.as_deref(),
            Place::Cpu => self.cpu.as_deref(),
            Place::CpuAcct => self.cpuacct.as_deref(),
        }
    }

    fn members(&self) -> Members {
        let group = self.group.as_ref().or(self.memory.as_ref());
        group.map_or_else(Members::default, |group| Members::of(group))
    }

    /// The sum of the anonymous memory of all processes, of at most [`SUM_KEPT`] ago unless it is to be `fresh`.
    fn anonymous(&mut self, now: Instant, fresh: bool) -> Option<u64> {
        if let Some((at, sum)) = self.anonymous
            && !fresh
            && now.saturating_duration_since(at) < SUM_KEPT
        {
            return sum;
        }
        let sum = self.members().anonymous();
        self.anonymous = Some((now, sum));
        sum
    }
}

/// Adds what this file says to the figures.
fn take_figures(usage: &mut Usage, place: Place, name: &str, text: &[u8]) {
    let micro = |value: u64| value.saturating_mul(1000);
    let figure = number(text.trim_ascii());
    match (place, name) {
        (Place::Group, "cpu.stat") => {
            let keys = ["user_usec", "system_usec", "nr_throttled", "throttled_usec"];
            let [user, system, periods, throttled] = fields(text, keys);
            usage.cpu_user_ns = user.map(micro);
            usage.cpu_system_ns = system.map(micro);
            usage.throttled_periods = periods;
            usage.throttled_ns = throttled.map(micro);
        }
        (Place::Group, "memory.stat") => {
            [usage.memory_rss, usage.memory_cache, usage.memory_kernel] =
                fields(text, ["anon", "file", "kernel"]);
        }
        (Place::Group, "memory.current") => usage.memory_usage = figure,
        (Place::Group, "memory.peak") => usage.memory_peak = figure,
        (Place::Group, "memory.swap.current") => usage.memory_swap = figure,
        (Place::Memory, "memory.stat") => {
            // The totals include the cgroups below. Without a hierarchy there are none.
            let keys = [
                "total_rss",
                "total_cache",
                "total_swap",
                "rss",
                "cache",
                "swap",
            ];
            let [all_rss, all_cache, all_swap, rss, cache, swap] = fields(text, keys);
            usage.memory_rss = all_rss.or(rss);
            usage.memory_cache = all_cache.or(cache);
            usage.memory_swap = all_swap.or(swap);
        }
        (Place::Memory, "memory.usage_in_bytes") => usage.memory_usage = figure,
        (Place::Memory, "memory.max_usage_in_bytes") => usage.memory_peak = figure,
        (Place::Memory, "memory.kmem.usage_in_bytes") => usage.memory_kernel = figure,
        (Place::Memory, "memory.kmem.max_usage_in_bytes") => usage.memory_kernel_peak = figure,
        (Place::Cpu, "cpu.stat") => {
            [usage.throttled_periods, usage.throttled_ns] =
                fields(text, ["nr_throttled", "throttled_time"]);
        }
        (Place::CpuAcct, "cpuacct.usage_user") => usage.cpu_user_ns = figure,
        (Place::CpuAcct, "cpuacct.usage_sys") => usage.cpu_system_ns = figure,
        _ => {}
    }
}

/// The values of these keys in a file with one `KEY NUMBER` per line.
fn fields<const N: usize>(text: &[u8], keys: [&str; N]) -> [Option<u64>; N] {
    let mut found = [None; N];
    for line in text.split(|byte| *byte == b'\n') {
        let Some(blank) = line.iter().position(|byte| *byte == b' ') else {
            continue;
        };
        if let Some(at) = keys.iter().position(|key| key.as_bytes() == &line[..blank]) {
            found[at] = number(&line[blank + 1..]);
        }
    }
    found
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A file that is opened when it is first read.
#[derive(Debug, Default)]
enum FigureFile {
    #[default]
    Unopened,
    /// It does not exist (any more), or can't be read.
    Missing,
    Open(KeptFile),
}

impl FigureFile {
    /// The content, as far as `buffer` takes it. `None` if there is none, or none now.
    fn read<'b>(
        &mut self,
        path: impl FnOnce() -> PathBuf,
        limit: u64,
        buffer: &'b mut [u8],
    ) -> Option<&'b [u8]> {
        let read = match self {
            Self::Missing => return None,
            Self::Open(kept) => kept.file.read_at(buffer, 0),
            Self::Unopened => File::open(path()).and_then(|file| {
                let read = file.read_at(buffer, 0);
                if let Some(kept) = KeptFile::keep(file, limit) {
                    *self = Self::Open(kept);
                }
                read
            }),
        };
        match read {
            Ok(length) => Some(&buffer[..length]),
            // One that could not be opened for want of descriptors may be opened next time.
            Err(error) if is_shortage(&error) => None,
            Err(_) => {
                *self = Self::Missing;
                None
            }
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    use nix::libc::{EINTR, EMFILE, ENFILE, ENOMEM};
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOMEM | EINTR))
}

/// A file that counts among those that are kept open.
#[derive(Debug)]
struct KeptFile {
    file: File,
}

impl KeptFile {
    /// Keeps a file open, unless `limit` files are. Then it is opened at every reading.
    fn keep(file: File, limit: u64) -> Option<Self> {
        if KEPT.fetch_add(1, Ordering::Relaxed) < limit {
            return Some(Self { file });
        }
        KEPT.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for KeptFile {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn write(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
    }

    fn version_2(group: &Path) -> UsageFiles {
        UsageFiles::new(Some(group), &BTreeMap::new())
    }

    fn read(files: &mut UsageFiles) -> Usage {
        files.read(false).unwrap().usage
    }

    const CPU: &str =
        "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_throttled 3\nthrottled_usec 7\n";

    #[test]
    fn version_2_is_read_from_the_files_that_exist() {
        let root = tempfile::tempdir().unwrap();
        let memory = "anon 4096\nfile 8192\nkernel 512\nkernel_stack 16\nanon_thp 1\n";
        let files = [
            ("cpu.stat", CPU),
            ("memory.stat", memory),
            ("memory.current", "12288\n"),
        ];
        write(root.path(), &files);
        let mut files = version_2(root.path());
        let wanted = Usage {
            cpu_user_ns: Some(10_000),
            cpu_system_ns: Some(20_000),
            throttled_periods: Some(3),
            throttled_ns: Some(7_000),
            memory_rss: Some(4096),
            memory_cache: Some(8192),
            memory_usage: Some(12288),
            memory_kernel: Some(512),
            ..Usage::default()
        };
        assert_eq!(read(&mut files), wanted);
        let files_later = [
            (
                "cpu.stat",
                &*CPU.replace("system_usec 20", "system_usec 21"),
            ),
            ("memory.current", "5\n"),
            ("memory.stat", "anon 1\n"),
        ];
        write(root.path(), &files_later);
        let wanted = Usage {
            cpu_system_ns: Some(21_000),
            memory_rss: Some(1),
            memory_cache: None,
            memory_usage: Some(5),
            memory_kernel: None,
            ..wanted
        };
        assert_eq!(read(&mut files), wanted, "read again from the beginning");
    }

    #[test]
    fn version_1_is_read_beside_version_2_and_without() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("group");
        let names = ["memory", "cpu", "cpuacct"];
        let controllers = names.map(|name| (name.to_owned(), root.path().join(name)));
        let controllers = BTreeMap::from(controllers);
        let memory = "cache 1\nrss 2\nswap 3\ntotal_cache 10\ntotal_rss 20\ntotal_swap 30\n";
        let memory = [
            ("memory.stat", memory),
            ("memory.usage_in_bytes", "40\n"),
            ("memory.max_usage_in_bytes", "50\n"),
            ("memory.kmem.usage_in_bytes", "60\n"),
            ("memory.kmem.max_usage_in_bytes", "70\n"),
        ];
        write(&controllers["memory"], &memory);
        let throttled = "nr_periods 9\nnr_throttled 8\nthrottled_time 7\n";
        write(&controllers["cpu"], &[("cpu.stat", throttled)]);
        let times = [("cpuacct.usage_user", "5\n"), ("cpuacct.usage_sys", "6\n")];
        write(&controllers["cpuacct"], &times);
        write(&group, &[("cpu.stat", "user_usec 1\nsystem_usec 2\n")]);
        let version_1 = Usage {
            cpu_user_ns: Some(5),
            cpu_system_ns: Some(6),
            throttled_periods: Some(8),
            throttled_ns: Some(7),
            memory_rss: Some(20),
            memory_cache: Some(10),
            memory_usage: Some(40),
            memory_peak: Some(50),
            memory_swap: Some(30),
            memory_kernel: Some(60),
            memory_kernel_peak: Some(70),
        };
        assert_eq!(read(&mut UsageFiles::new(None, &controllers)), version_1);
        let both = Usage {
            cpu_user_ns: Some(1000),
            cpu_system_ns: Some(2000),
            ..version_1
        };
        assert_eq!(read(&mut UsageFiles::new(Some(&group), &controllers)), both);
        fs::write(
            controllers["memory"].join("memory.stat"),
            "cache 1\nrss 2\n",
        )
        .unwrap();
        let own = Usage {
            memory_rss: Some(2),
            memory_cache: Some(1),
            memory_swap: None,
            ..both
        };
        assert_eq!(read(&mut UsageFiles::new(Some(&group), &controllers)), own);
    }

    #[test]
    fn memory_and_processes_are_read_again_once_a_process_has_run() {
        let root = tempfile::tempdir().unwrap();
        let own = std::process::id().to_string();
        let first = [
            ("cgroup.procs", &*own),
            ("cpu.stat", CPU),
            ("memory.current", "1\n"),
        ];
        write(root.path(), &first);
        let mut files = version_2(root.path());
        let mut read = || {
            let reading = files.read(true).unwrap();
            let processes = reading.processes.unwrap().len();
            (reading.usage.memory_usage, processes)
        };
        assert_eq!(read(), (Some(1), 1));
        write(
            root.path(),
            &[("cgroup.procs", ""), ("memory.current", "2\n")],
        );
        assert_eq!(read(), (Some(1), 1));
        for cpu in ["usage_usec 31\nuser_usec 11\nsystem_usec 20\n", ""] {
            write(root.path(), &[("cpu.stat", cpu)]);
            assert_eq!(read(), (Some(2), 0));
        }
    }

    #[test]
    fn figures_hold_for_a_while_if_the_cpu_time_is_known_and_the_same() {
        let (now, time) = (Instant::now(), Some((1, 2)));
        let kept = Kept::new(now, time, ()).unwrap();
        let get = |after: Duration, time| Kept::get(Some(&kept), now + after, time).is_some();
        assert!(get(IDLE_KEPT / 2, time));
        assert!(!get(IDLE_KEPT, time));
        for other in [Some((2, 2)), Some((1, 3)), None] {
            assert!(!get(Duration::ZERO, other));
        }
        assert!(Kept::new(now, None, ()).is_none());
    }

    /// A file under the same name is not the one that is open.
    fn replace(path: &Path, text: &str) {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    #[test]
    fn files_stay_open_as_long_as_there_are_descriptors() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("memory.current");
        fs::write(&file, "1\n").unwrap();
        let (mut kept, mut by_path) = (version_2(root.path()), version_2(root.path()));
        by_path.limit = 0;
        for files in [&mut kept, &mut by_path] {
            assert_eq!(read(files).memory_usage, Some(1));
        }
        replace(&file, "2\n");
        assert_eq!(read(&mut kept).memory_usage, Some(1));
        assert_eq!(read(&mut by_path).memory_usage, Some(2));
        fs::remove_file(&file).unwrap();
        assert_eq!(read(&mut by_path).memory_usage, None);
    }

    #[test]
    fn a_cgroup_that_does_not_exist_has_no_reading_and_no_cgroup_an_empty_one() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(version_2(&root.path().join("x")).read(true), None);
        let nothing = UsageFiles::new(None, &BTreeMap::new()).read(false);
        assert_eq!(nothing, Some(Reading::default()));
    }

    #[test]
    fn without_a_memory_controller_the_memory_of_the_processes_is_added_up() {
        let root = tempfile::tempdir().unwrap();
        let own = std::process::id().to_string();
        write(root.path(), &[("cgroup.procs", &own), ("cpu.stat", CPU)]);
        let reading = version_2(root.path()).read(true).unwrap();
        assert!(reading.usage.memory_rss > Some(0));
        assert_eq!(reading.usage.memory_usage, None);
        assert_eq!(reading.processes.unwrap().len(), 1);
    }

    #[test]
    fn values_that_are_no_numbers_are_not_measured() {
        let text = b"anon -1\nfile 99999999999999999999\nkernel\nswap 1 2\nslab 3\n";
        let keys = ["anon", "file", "kernel", "swap", "slab"];
        assert_eq!(fields(text, keys), [None, None, None, None, Some(3)]);
    }
}
