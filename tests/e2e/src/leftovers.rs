//! Finds what a run leaves on the machine: processes, mounts, cgroups, network namespaces and links, loop devices, and files in the
//! directories that systemd-nspawn and the driver use. Reports only what carries the run's own marks (its directory and its names), because
//! other runs may be active on the same machine. Removes nothing, except the processes of a failed test.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{FcntlArg, fcntl};
use nomad_driver_nspawn::cgroup::{Group, Layout};
use nomad_driver_nspawn::network::{LINK_PREFIX, ZONE_PREFIX};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};

/// How long things that are about to disappear may take before they count as leftovers.
const OUTGOING: Duration = Duration::from_secs(5);
/// The minimum length of a name that serves as a mark; a shorter one could occur anywhere.
const SHORTEST: usize = 6;
/// Where systemd-nspawn and the driver keep files by name, and how many levels below to search.
const PLACES: [(&str, usize); 8] = [
    ("/sys/fs/cgroup", usize::MAX),
    ("/run/nomad-driver-nspawn", 1),
    ("/run/systemd/nspawn", 3),
    ("/run/systemd/machines", 1),
    ("/run/netns", 1),
    ("/var/lib/machines", 1),
    ("/var/tmp", 1),
    ("/tmp", 1),
];

/// Where systemd-nspawn keeps the locks of uid ranges.
const IDS: &str = "/run/systemd/nspawn-uid";

/// The marks by which one run's things can be recognized.
#[derive(Debug, Clone)]
pub struct Marks {
    dir: PathBuf,
    names: BTreeSet<String>,
    since: SystemTime,
}

impl Marks {
    /// Everything of this run refers to `dir`, an absolute path.
    pub fn new(dir: &Path) -> Self {
        let dir = fs::canonicalize(dir).expect("the run's directory");
        assert!(
            dir.components().count() > 2,
            "{} is everybody's",
            dir.display()
        );
        Self {
            dir,
            names: BTreeSet::new(),
            since: kernel_time(),
        }
    }

    /// Adds a name of the run; it may be part of longer names.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        assert!(name.len() >= SHORTEST, "{name:?} is too short for a mark");
        self.names.insert(name.to_owned());
        self
    }

    /// Whether a lock, which is an empty file, was created since the start of this run.
    fn is_new(&self, lock: &fs::Metadata) -> bool {
        lock.modified().is_ok_and(|made| made >= self.since)
    }

    fn carried_by(&self, text: &str) -> bool {
        text.contains(&*self.dir.to_string_lossy())
            || self.names.iter().any(|name| text.contains(name))
    }

    /// All leftovers at this moment, one per line.
    pub fn left(&self) -> Vec<String> {
        let mut left: Vec<_> = self
            .processes()
            .into_iter()
            .map(|found| format!("process {} {}", found.pid, found.command))
            .collect();
        left.extend(
            self.mounts()
                .into_iter()
                .map(|line| format!("mount {line}")),
        );
        for (place, depth) in PLACES {
            self.walk(Path::new(place), depth, &mut left);
        }
        left.extend(self.locks());
        left.extend(self.ids());
        left.extend(self.links());
        left.extend(self.loops());
        left
    }

    /// Fails if something is still left after a few seconds.
    #[track_caller]
    pub fn assert_none_left(&self) {
        let end = Instant::now() + OUTGOING;
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left behind:\n{}", left.join("\n"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The run's processes, except this one and its ancestors.
    pub fn processes(&self) -> Vec<Found> {
        let kin = ancestors();
        let own_mounts = fs::read_link("/proc/self/ns/mnt").ok();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            if !kin.contains(&pid) {
                found.extend(self.process(pid, own_mounts.as_deref()));
            }
        }
        found
    }

    fn process(&self, pid: i32, own_mounts: Option<&Path>) -> Option<Found> {
        // Opened before reading /proc: what is read afterwards belongs to this process, or it has exited.
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let read = |name: &str| {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let command = read("cmdline");
        if command.is_empty() {
            // A kernel thread or a zombie.
            return None;
        }
        // A payload has no host path in its arguments, but its mounts come from the run's trees.
        let mounted = || {
            own_mounts.is_some_and(|own| link("ns/mnt") != own)
                && self.carried_by(&read("mountinfo"))
        };
        let ours = self.carried_by(&command)
            || self.carried_by(&read("environ"))
            || self.carried_by(&read("cgroup"))
            || link("cwd").starts_with(&self.dir)
            || mounted();
        ours.then_some(Found {
            pid,
            command,
            pidfd,
        })
    }

    /// Kills the run's processes and removes their cgroups, after a failed test. A cgroup that reserves a core would keep every later agent
    /// from starting a task.
    pub fn kill(&self) {
        for found in self.processes() {
            // An error means that it has exited.
            let _ = pidfd_send_signal(&found.pidfd, Signal::KILL);
        }
        for group in Layout::of_this_host().leaves(|name| self.carried_by(name)) {
            let group = Group::new(group);
            group.wait_empty(Duration::from_secs(1));
            let _ = group.remove();
        }
    }

    fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        let mut lines: Vec<_> = table.lines().map(str::to_owned).collect();
        lines.retain(|line| self.carried_by(line));
        lines
    }

    fn walk(&self, dir: &Path, depth: usize, left: &mut Vec<String>) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.starts_with(&self.dir) || self.dir.starts_with(&path) {
                continue;
            }
            // The parent directory has been checked already: only the last part of the path counts.
            if self.carried_by(&entry.file_name().to_string_lossy()) {
                left.push(format!("file {}", path.display()));
            } else if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.walk(&path, depth - 1, left);
            }
        }
    }

    /// systemd-nspawn's locks of trees, which are named by device and inode number. One that is older than this run was left for a tree that
    /// had the inode before.
    fn locks(&self) -> Vec<String> {
        let mut trees = vec![self.dir.clone()];
        let below = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        trees.extend(below.map(|entry| entry.path()));
        trees
            .iter()
            .filter_map(|tree| fs::metadata(tree).ok())
            .map(|tree| {
                format!(
                    "/run/systemd/nspawn/locks/inode-{}:{}",
                    tree.dev(),
                    tree.ino()
                )
            })
            .filter(|lock| fs::metadata(lock).is_ok_and(|lock| self.is_new(&lock)))
            .map(|lock| format!("file {lock}"))
            .collect()
    }

    /// Locks of uid ranges, which carry no mark. A lock that was created since the start of this run and that no process holds counts as a
    /// leftover of this run; locks of other runs disappear quickly.
    fn ids(&self) -> Vec<String> {
        let locks = fs::read_dir(IDS).into_iter().flatten().flatten();
        locks
            .filter(|lock| lock.metadata().is_ok_and(|lock| self.is_new(&lock)))
            .map(|lock| lock.path())
            .filter(|lock| !is_held(lock))
            .map(|lock| format!("file {}", lock.display()))
            .collect()
    }

    /// Network interfaces. Those of the driver carry no mark: every test that makes some runs in a network namespace of its own, so none may
    /// be in that of the machine.
    fn links(&self) -> Vec<String> {
        let ours = |link: &str| {
            let of_driver = [LINK_PREFIX, ZONE_PREFIX];
            of_driver.iter().any(|prefix| link.starts_with(prefix)) || self.carried_by(link)
        };
        let links = fs::read_dir("/sys/class/net").into_iter().flatten();
        links
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|link| ours(link))
            .map(|link| format!("link {link}"))
            .collect()
    }

    fn loops(&self) -> Vec<String> {
        let devices = fs::read_dir("/sys/block").into_iter().flatten();
        devices
            .flatten()
            .filter_map(|device| {
                let file = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
                let name = device.file_name();
                self.carried_by(&file)
                    .then(|| format!("loop device {} of {}", name.display(), file.trim()))
            })
            .collect()
    }
}

/// The time that a file created now would get. The kernel takes it from a clock that runs some milliseconds behind `SystemTime::now`.
fn kernel_time() -> SystemTime {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    let since_epoch = Duration::try_from(now).expect("a time after 1970");
    SystemTime::UNIX_EPOCH + since_epoch
}

/// Whether a process holds this lock of systemd-nspawn. Only queries it, so that a process that is about to take the lock is not disturbed.
fn is_held(lock: &Path) -> bool {
    let Ok(file) = fs::File::open(lock) else {
        // It was removed meanwhile.
        return true;
    };
    let mut whole = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).expect("a small number"),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut whole)).expect("the lock's state");
    i32::from(whole.l_type) != nix::libc::F_UNLCK
}

/// A process that carries a mark, held by a pidfd so that its pid can't be reused.
#[derive(Debug)]
pub struct Found {
    /// Its pid.
    pub pid: i32,
    /// Its arguments.
    pub command: String,
    pidfd: OwnedFd,
}

/// This process and its ancestors.
fn ancestors() -> BTreeSet<i32> {
    let mut all = BTreeSet::new();
    let mut pid = std::process::id().cast_signed();
    while pid > 0 && all.insert(pid) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit(')').next().unwrap_or_default();
        pid = after
            .split_whitespace()
            .nth(1)
            .and_then(|parent| parent.parse().ok())
            .unwrap_or(0);
    }
    all
}
