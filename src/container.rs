//! The types that `config`, `task`, `backend`, `supervisor` and `nspawn` share: what a container should be, that it runs, how it
//! exited, what it uses. Types only: no I/O, no decisions, nothing of Nomad's protobuf messages and nothing of systemd's command
//! line.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

mod credentials;
mod exec_defaults;
mod mounts;
mod notes;
mod resources;
mod system;
pub mod testing;
mod usage;

pub use credentials::Credential;
pub use exec_defaults::ExecDefaults;
pub use mounts::{Changes, Mount, MountIds, Overlay, Propagation, Restrictions, Tmpfs};
pub use notes::{Notes, StartNotes};
pub use resources::{
    Cpu, CpuQuota, Device, InsideSettings, Memory, Resources, Rlimit, Swap, TmpfsSizes,
};
pub use system::{Journal, JournalFormat, Readiness, SystemOutput};
pub use usage::{ProcessUsage, Reading, Usage};

/// A container as the job requests it, with every value checked and every host path resolved. Each capability of the driver has one
/// part; a function that needs one part takes that part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Which start of which task this is.
    pub identity: Identity,
    /// The same for people, without secrets.
    pub description: Description,
    /// The root file system.
    pub rootfs: Rootfs,
    /// What runs in the container.
    pub payload: Payload,
    /// The user namespace, or none.
    pub users: Users,
    /// Host directories and files mounted in the container: Nomad's own, host volumes, the job's binds. In mount order.
    pub mounts: Vec<Mount>,
    /// Further temporary file systems of the container. Mounts below them and above them are possible.
    pub tmpfs: Vec<Tmpfs>,
    /// The network.
    pub network: Network,
    /// What the container may use of the host.
    pub resources: Resources,
}

/// Which start of which task a container belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Nomad's id of this start: `<allocation id>/<task name>/<8 hex digits>`. New for every start.
    pub id: String,
    /// The directory of the allocation, absolute, as the agent names it.
    pub alloc_dir: PathBuf,
    /// The machine name: unique per allocation and task, valid as a host name, at most 64 characters.
    pub machine: String,
}

impl Identity {
    /// The id without the part that is new for every start: `<allocation id>/<task name>`.
    pub fn owner(&self) -> &str {
        self.id
            .rsplit_once('/')
            .map_or(&*self.id, |(owner, _)| owner)
    }
}

/// What a person recognizes a container by. Contains no secrets: it becomes part of the handle that Nomad stores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The directory or image that is the root.
    pub image: String,
    /// The command and its arguments; empty for the image's init without arguments. A long one is cut off.
    pub command: String,
    /// The kind of network.
    pub network: String,
}

/// The root file system of a container, and what becomes of changes to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// Where it comes from.
    pub source: Root,
    /// Run on a temporary copy of the root.
    pub ephemeral: bool,
    /// Mount the root read-only.
    pub read_only: bool,
    /// Which part of the root is discarded when the task ends.
    pub volatile: Volatile,
    /// `NEW[:OLD]`, both absolute inside the container.
    pub pivot_root: Option<String>,
}

/// What runs in a container: the command, its environment, its privileges and its standard streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// What the container's first process is.
    pub mode: Mode,
    /// The command and its arguments, or the arguments of the image's init in [`Mode::Boot`]. May be empty.
    pub command: Vec<String>,
    /// The complete environment. Values are secrets.
    pub environment: BTreeMap<String, String>,
    /// Files that the container gets as systemd credentials.
    pub credentials: Vec<Credential>,
    /// Absolute directory inside the container in which the command starts.
    pub working_directory: Option<String>,
    /// The user that the command runs as, from the container's own user database.
    pub user: Option<String>,
    /// Capabilities added to the bounding set, as `CAP_…`.
    pub capabilities: Vec<String>,
    /// How the container's console is connected.
    pub console: Console,
    /// What of the journal becomes part of the logs; `None` if it is not followed. Only for [`Mode::Boot`].
    pub journal: Option<Journal>,
    /// When the task counts as started.
    pub readiness: Readiness,
    /// The file or FIFO for stdout; `None` discards it.
    pub stdout: Option<PathBuf>,
    /// The file or FIFO for stderr; `None` discards it.
    pub stderr: Option<PathBuf>,
}

/// The network of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The network namespace.
    pub namespace: NetworkNamespace,
    /// How the container's `/etc/resolv.conf` is set up: a value of systemd-nspawn's `--resolv-conf`. `None` leaves it to
    /// the backend.
    pub resolv_conf: Option<String>,
    /// What the job or its network says about name resolution.
    pub dns: Dns,
    /// The host name, where it is not the machine name.
    pub host_name: Option<HostName>,
    /// Further names for `/etc/hosts`.
    pub extra_hosts: Vec<(String, IpAddr)>,
}

/// What replaces the host's configuration of name resolution. An empty list replaces nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// The name servers.
    pub servers: Vec<IpAddr>,
    /// The domains in which short names are looked up.
    pub searches: Vec<String>,
    /// Options of resolv.conf.
    pub options: Vec<String>,
}

impl Dns {
    /// Whether it replaces nothing.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }
}

/// The host name of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostName {
    /// The name.
    pub name: String,
    /// Its address; `None` is those of the network.
    pub address: Option<IpAddr>,
}

/// Where a root file system comes from. The paths are absolute host paths that existed when they were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// Which part of the root is discarded when the task ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volatile {
    /// Nothing.
    No,
    /// Only `/usr` comes from the image, everything else is new and empty.
    Yes,
    /// `/var` is new and empty, the rest is the image, read-only.
    State,
    /// Everything is writable and no change is kept.
    Overlay,
}

/// How the container's console is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the values of the option, documented there")]
pub enum Console {
    Interactive,
    ReadOnly,
    Passive,
    Pipe,
    Autopipe,
    /// Like `ReadOnly`, but the supervisor writes it to the log. Only for [`Mode::Boot`].
    Relayed,
}

/// The user namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Users {
    /// None: root in the container is root on the host.
    Host,
    /// A private user namespace.
    Private {
        /// `pick`, `yes`, `identity`, `managed` or `UID[:COUNT]`.
        range: String,
        /// `off`, `chown`, `map` or `auto`; `None` leaves it to systemd-nspawn.
        ownership: Option<String>,
    },
}

/// The network namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// The host's network.
    Host,
    /// An existing network namespace: the path of its file.
    Join(PathBuf),
    /// That of another task of the allocation.
    OfTask {
        /// The task's name.
        task: String,
        /// The first process of its container; `None` until the task runs.
        leader: Option<Process>,
    },
    /// A network namespace of its own.
    Private {
        /// What connects it.
        link: Link,
        /// Host ports forwarded to the container.
        ports: Vec<PortForward>,
        /// Interfaces of the host that the container uses besides.
        interfaces: Vec<HostInterface>,
    },
}

/// An interface of the host in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInterface {
    /// How the container uses it.
    pub mode: InterfaceMode,
    /// Its name on the host.
    pub name: String,
}

/// How a container uses an interface of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterfaceMode {
    /// Through an interface with a hardware address of its own on top of it.
    Macvlan,
    /// Through an interface with the same hardware address on top of it.
    Ipvlan,
    /// Alone: the host has it back when the container has ended.
    Moved,
}

impl InterfaceMode {
    /// The option of a job that asks for it.
    pub fn option(self) -> &'static str {
        match self {
            Self::Macvlan => "config.network_macvlan",
            Self::Ipvlan => "config.network_ipvlan",
            Self::Moved => "config.network_interface",
        }
    }
}

/// What connects a network namespace of a container's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    None,
    /// A link to the host, made and configured by the driver, which routes between it and everything else.
    Routed,
    /// A zone (a bridge that systemd-nspawn creates and removes).
    Zone(String),
    /// An existing bridge of the host.
    Bridge(String),
}

/// A host port forwarded to a port of the container, TCP and UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForward {
    /// The label of the port in the job.
    pub label: String,
    /// The host address on which Nomad allocated the port; `None` is every address.
    pub address: Option<IpAddr>,
    /// The port on the host.
    pub host: u16,
    /// The port in the container.
    pub container: u16,
}

/// A process of this host, identified safely against pid reuse; a pid alone does not identify a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the host's pid namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start: u64,
}

/// A container that has been started: everything needed to find it again. Contains no secrets; it becomes part of the handle that
/// Nomad stores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Nomad's id of this start.
    pub id: String,
    /// The machine name.
    pub machine: String,
    /// The task directory of this start, below the driver's state directory.
    pub state: PathBuf,
    /// The boot id (`/proc/sys/kernel/random/boot_id`) for which these values are valid.
    pub boot: String,
    /// The supervisor process of the container.
    pub supervisor: Process,
    /// The container's first process.
    pub leader: Process,
    /// What the container's first process is.
    pub mode: Mode,
    /// The cgroup that contains every process of the container, if one could be created.
    pub cgroup: Option<PathBuf>,
    /// On a host with controllers on cgroup v1: the container's cgroup of each controller.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub controllers: BTreeMap<String, PathBuf>,
    /// How many seccomp filters systemd-nspawn gave to the container's first process. `None` if that is not known: an image's own init
    /// may have been running already, or the kernel does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filters: Option<u32>,
    /// The network that the driver made for the container, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Box<StartedNetwork>>,
    /// When the container was up.
    pub started_at: SystemTime,
    /// What the user should know about this start, one sentence each.
    pub notes: Vec<String>,
}

/// The network that the driver made for a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedNetwork {
    /// The address of the container.
    pub address: IpAddr,
    /// The ports in the container, by the labels of the job.
    pub ports: BTreeMap<String, u16>,
}

/// Prefix of [`Exit::error`] when code and signal are not those of the task, because its exit was not observed.
pub const UNKNOWN_END: &str = "how the task ended is not known";

/// How a container exited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code as a shell reports it: the status, or 128 + signal.
    pub code: i32,
    /// The signal that killed it, or 0.
    pub signal: i32,
    /// Whether an OOM kill ended it: the kernel counted an OOM kill in the task's cgroup, and the task was killed by SIGKILL.
    pub oom_killed: bool,
    /// Details of an unsuccessful exit; begins with [`UNKNOWN_END`] when code and signal were not observed. If set, the exit is
    /// unsuccessful whatever the code.
    pub error: Option<String>,
    /// When it exited.
    pub ended_at: SystemTime,
}

/// The capabilities of this host that the driver depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The systemd version of systemd-nspawn, or why it can't be used, in text for an operator who can fix it.
    pub nspawn: Result<u32, String>,
    /// Whether this process is root.
    pub root: bool,
    /// The cgroup layout.
    pub cgroup: CgroupLayout,
    /// The cgroup controllers that the driver can use, of whichever version.
    pub controllers: BTreeSet<String>,
    /// Whether the kernel supports user namespaces.
    pub user_namespaces: bool,
    /// Whether systemd-machined can be reached.
    pub machined: bool,
    /// Whether mounts can be idmapped (supported by both kernel and systemd-nspawn).
    pub idmapped_mounts: bool,
    /// Whether root trees can be looked into, or why not, in text for an operator who can fix it.
    pub openat2: Result<(), String>,
    /// Whether captured seccomp filters are used, or why not, in text for an operator.
    pub seccomp_cache: Result<(), String>,
    /// Whether the state directory can be used, or why not, in text for an operator who can fix it.
    pub state_dir: Result<(), String>,
}

/// The cgroup layout of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupLayout {
    /// cgroup v2 only (unified).
    V2,
    /// Controllers on cgroup v1, processes tracked on cgroup v2.
    Hybrid,
    /// cgroup v1 only.
    V1,
    /// No cgroup file system is mounted.
    None,
}

/// Why a container did not start, as far as that decides whether Nomad may retry. `docs/configuration.md` has the same list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Something else holds what the start needs: the root tree, a range of user ids, an earlier start that has not ended.
    Busy,
    /// The host is short of something or does not respond in time: memory, processes, descriptors, space.
    Resources,
    /// The job, the image or the installed systemd-nspawn has to be changed first.
    Config,
    /// The cause is not known; also any name that a later driver uses and this one does not know.
    #[serde(other)]
    Unknown,
}

impl Cause {
    /// All causes.
    pub const ALL: [Self; 4] = [Self::Busy, Self::Resources, Self::Config, Self::Unknown];

    /// The name, as in the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Resources => "resources",
            Self::Config => "config",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the same start may succeed later. An unknown cause counts as recoverable: a job that Nomad has given up for good
    /// has to be started again by hand, while the job's `restart` block limits how often a hopeless start is retried.
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
