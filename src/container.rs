//! The nouns that `config`, `task`, `backend`, `supervisor` and `nspawn` share: what a container shall be, that it runs, how
//! it ended, what it uses. Types only: no I/O, no decisions, nothing of Nomad's wire and nothing of systemd's command line.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// A container as the job asked for it, with every value checked and every host path resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Nomad's id of this start: `<allocation id>/<task name>/<8 hex digits>`. New for every start.
    pub id: String,
    /// The directory of the allocation, absolute, as the agent names it.
    pub alloc_dir: PathBuf,
    /// The machine name: unique for allocation and task, valid as a host name, at most 64 characters.
    pub machine: String,
    /// Where the root file system comes from.
    pub root: Root,
    /// What the container's first process is.
    pub mode: Mode,
    /// The words of the command, or the arguments of the image's init in [`Mode::Boot`]. May be empty.
    pub command: Vec<String>,
    /// The complete environment of the payload. Values are secrets.
    pub environment: BTreeMap<String, String>,
    /// Absolute directory inside the container in which the command starts.
    pub working_directory: Option<String>,
    /// User of the container's own database that the command runs as.
    pub user: Option<String>,
    /// Work on a throw-away copy of the root.
    pub ephemeral: bool,
    /// The root can't be written.
    pub read_only: bool,
    /// Which part of the root is thrown away at the end.
    pub volatile: Volatile,
    /// `NEW[:OLD]`, both absolute inside the container.
    pub pivot_root: Option<String>,
    /// How the container's `/etc/resolv.conf` is made; a word systemd-nspawn knows. `None` leaves it to systemd-nspawn.
    pub resolv_conf: Option<String>,
    /// How the container's console is connected.
    pub console: Console,
    /// The user namespace, or none.
    pub users: Users,
    /// Host directories and files that appear inside: Nomad's own, host volumes, the job's binds. In the order of mounting.
    pub mounts: Vec<Mount>,
    /// Capabilities added to the bounding set, as `CAP_…`.
    pub capabilities: Vec<String>,
    /// The network the container is in.
    pub network: Network,
    /// The file or FIFO that takes stdout; `None` discards.
    pub stdout: Option<PathBuf>,
    /// The file or FIFO that takes stderr; `None` discards.
    pub stderr: Option<PathBuf>,
    /// The control group that Nomad made for this task, absolute. It may not exist.
    pub cgroup: Option<PathBuf>,
}

/// Where a root file system comes from; absolute host paths that existed when they were checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// A directory tree.
    Directory(PathBuf),
    /// A disk image or a block device.
    Image(PathBuf),
}

/// What the container's first process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// The image's own init.
    Boot,
    /// A small init; the command is process 2.
    ProcessTwo,
    /// The command itself.
    Plain,
}

/// Which part of the root is thrown away at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Volatile {
    /// Nothing.
    No,
    /// Only `/usr` comes from the image, everything else is new and empty.
    Yes,
    /// `/var` is new and empty, the rest is the image, read-only.
    State,
    /// Everything can be written and nothing stays.
    Overlay,
}

/// How the container's console is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the words of the option, explained with it")]
pub enum Console {
    Interactive,
    ReadOnly,
    Passive,
    Pipe,
    Autopipe,
}

/// The user namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Users {
    /// None: root inside is root outside.
    Host,
    /// A private one.
    Private {
        /// `pick`, `yes`, `identity`, `managed` or `UID[:COUNT]`.
        range: String,
        /// `off`, `chown`, `map` or `auto`; `None` leaves it to systemd-nspawn.
        ownership: Option<String>,
    },
}

/// A host directory or file that appears inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute host path; it existed when it was checked.
    pub source: PathBuf,
    /// Absolute path inside.
    pub target: PathBuf,
    /// Whether it can't be written.
    pub read_only: bool,
}

/// The network a container is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// The host's.
    Host,
    /// An existing network namespace: the path of its file.
    Join(PathBuf),
    /// One of its own, made by systemd-nspawn.
    Private {
        /// A pair of virtual interfaces to the host. Implied by a zone and a bridge.
        veth: bool,
        /// A zone (a bridge that systemd-nspawn makes and removes) to join.
        zone: Option<String>,
        /// An existing bridge to join.
        bridge: Option<String>,
        /// Host ports that lead into the container.
        ports: Vec<PortForward>,
    },
}

/// A host port that leads to a port of the container, TCP and UDP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortForward {
    /// The job's name for it.
    pub label: String,
    /// The one address of the host on which Nomad allotted it; `None` is every address.
    pub address: Option<IpAddr>,
    /// On the host.
    pub host: u16,
    /// Inside.
    pub container: u16,
}

/// One process of this machine, safe against reuse of its pid: the pid alone names nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the host's pid namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start: u64,
}

/// A container that has been started: everything needed to find it again. Holds no secret; it becomes part of the handle
/// that Nomad stores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Nomad's id of this start.
    pub id: String,
    /// The machine name.
    pub machine: String,
    /// The directory of this start below the driver's state directory.
    pub state: PathBuf,
    /// The boot in which all of this is true (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The process that watches over the container.
    pub supervisor: Process,
    /// The container's first process.
    pub leader: Process,
    /// What the container's first process is.
    pub mode: Mode,
    /// The control group that holds every process of the container, if one could be made.
    pub cgroup: Option<PathBuf>,
    /// When the container was up.
    pub started_at: SystemTime,
    /// What the user should know about this start, a sentence each.
    pub notes: Vec<String>,
}

/// How [`Exit::error`] begins when code and signal are not those of the task, because its end was not seen.
pub const UNKNOWN_END: &str = "how the task ended is not known";

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code as a shell gives it: the status, or 128 + signal.
    pub code: i32,
    /// The signal that ended it, or 0.
    pub signal: i32,
    /// Whether an OOM kill ended it: the kernel counted one in the task's group, and the end was by SIGKILL.
    pub oom_killed: bool,
    /// What else there is to say of an unsuccessful end; begins with [`UNKNOWN_END`] when code and signal were not seen. Makes the
    /// exit unsuccessful whatever the code.
    pub error: Option<String>,
    /// When it ended.
    pub ended_at: SystemTime,
}

/// What a container uses at one moment. `None` where this host can't tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in user mode since the start, nanoseconds.
    pub cpu_user_ns: Option<u64>,
    /// Processor time in the kernel since the start, nanoseconds.
    pub cpu_system_ns: Option<u64>,
    /// Periods in which the processor limit was hit.
    pub throttled_periods: Option<u64>,
    /// Time lost to the processor limit, nanoseconds.
    pub throttled_ns: Option<u64>,
    /// Anonymous memory in bytes.
    pub memory_rss: Option<u64>,
    /// Page cache in bytes.
    pub memory_cache: Option<u64>,
    /// All memory charged, bytes.
    pub memory_usage: Option<u64>,
    /// The most that was ever charged, bytes.
    pub memory_peak: Option<u64>,
    /// Swap in bytes.
    pub memory_swap: Option<u64>,
}

/// What this host can do, as far as the driver cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The systemd version of systemd-nspawn, or why it can't be used, in words for a person who can mend it.
    pub nspawn: Result<u32, String>,
    /// Whether this process is root.
    pub root: bool,
    /// The layout of the control groups.
    pub cgroup: CgroupLayout,
    /// Whether the kernel gives user namespaces.
    pub user_namespaces: bool,
    /// Whether systemd-machined can be reached.
    pub machined: bool,
    /// Whether mounts can carry an id mapping (kernel and systemd-nspawn both).
    pub idmapped_mounts: bool,
    /// Whether state may be kept where it is to be kept, or why not, in words for a person who can mend it.
    pub state_dir: Result<(), String>,
}

/// The layout of a host's control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupLayout {
    /// Version 2 alone.
    V2,
    /// Controllers on version 1, processes tracked on version 2.
    Hybrid,
    /// Version 1 alone.
    V1,
    /// None mounted.
    None,
}

/// Why a container did not come up, as far as that decides whether Nomad may try again. `docs/configuration.md` has the same list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Something else holds what the start needs: the tree, a range of user ids, an earlier start that does not end.
    Busy,
    /// The host is short of something or does not answer in time: memory, processes, descriptors, space.
    Resources,
    /// The job, the image or the installed systemd-nspawn has to be changed first.
    Config,
    /// Nothing that is known; also what a later driver calls by a name that this one does not know.
    #[serde(other)]
    Unknown,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Busy, Self::Resources, Self::Config, Self::Unknown];

    /// Its name, as in the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Resources => "resources",
            Self::Config => "config",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the same start may succeed later. What is not known may: a job that is given up for good has to be started again
    /// by a person, and the job's `restart` block limits how often a hopeless one is tried.
    pub fn is_recoverable(self) -> bool {
        match self {
            Self::Busy | Self::Resources | Self::Unknown => true,
            Self::Config => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cause;

    #[test]
    fn every_cause_is_listed_under_its_name() {
        assert_eq!(Cause::ALL.len(), Cause::Unknown as usize + 1);
        for cause in Cause::ALL {
            let text = serde_json::to_string(&cause).unwrap();
            assert_eq!(text, format!("{:?}", cause.as_str()));
        }
    }
}
