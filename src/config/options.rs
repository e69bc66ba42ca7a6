//! The option table: every key of both configuration blocks once, with type, default and description. The schema, the
//! decoder and the test of `docs/configuration.md` are derived from it. It checks no values: `plugin` and `task` do
//! that.

use std::collections::BTreeMap;

use super::ConfigError;
use super::decode::{Decode, Fields, Number};

/// One option, as operators and job authors see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct OptionSpec {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// As an HCL expression. Nothing converts it on the wire, so it has the option's own type.
    pub(super) default: Option<&'static str>,
    pub(super) required: bool,
    /// One or two sentences.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "read by the test that checks the documentation")
    )]
    pub(super) doc: &'static str,
}

/// The type of an option.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Bool,
    Number,
    String,
    Strings,
    /// A list of maps in the schema: Nomad's parser wraps every `{ … }` of a job file in a list.
    StringMap,
    /// A list of maps in the schema, too.
    NumberMap,
    Block(&'static [OptionSpec]),
    /// Any number of blocks, also written as a list of objects.
    Blocks(&'static [OptionSpec]),
}

impl Kind {
    /// The type expression of the schema; for blocks, which have none there, that of the documentation.
    pub(super) fn expression(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Number => "number",
            Self::String => "string",
            Self::Strings => "list(string)",
            Self::StringMap => "list(map(string))",
            Self::NumberMap => "list(map(number))",
            Self::Block(_) => "block",
            Self::Blocks(_) => "list(block)",
        }
    }
}

/// A block of options that can be decoded.
pub(super) trait Options: Sized {
    /// Its rows of the option table.
    const OPTIONS: &'static [OptionSpec];

    /// Decodes the values from `fields`.
    fn read(fields: &Fields<'_>) -> Result<Self, ConfigError>;
}

/// The content of the brackets of a row: nothing (the option may be absent), `required`, or the default.
macro_rules! row {
    (type $ty:ty;) => { Option<$ty> };
    (type $ty:ty; required) => { $ty };
    (type $ty:ty; $default:literal) => { $ty };
    (read $fields:ident $key:literal;) => { $fields.optional($key)? };
    (read $fields:ident $key:literal; required) => { $fields.required($key)? };
    (read $fields:ident $key:literal; $default:literal) => { $fields.or_default($key, $default)? };
    (default) => { None };
    (default required) => { None };
    (default $default:literal) => { Some(stringify!($default)) };
    (required required) => { true };
    (required $($other:literal)?) => { false };
}

macro_rules! options {
    ($(#[doc = $about:literal])+ struct $name:ident {
        $($(#[doc = $doc:literal])+ $key:literal => $field:ident: $ty:ty [$($how:tt)?],)+
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone)]
        pub(super) struct $name {
            $($(#[doc = $doc])+ pub(super) $field: row!(type $ty; $($how)?),)+
        }

        impl Options for $name {
            const OPTIONS: &'static [OptionSpec] = &[$(OptionSpec {
                name: $key,
                kind: <$ty as Decode>::KIND,
                default: row!(default $($how)?),
                required: row!(required $($how)?),
                doc: concat!($($doc),+),
            }),+];

            fn read(fields: &Fields<'_>) -> Result<Self, ConfigError> {
                Ok(Self { $($field: row!(read fields $key; $($how)?)),+ })
            }
        }

        impl Decode for $name {
            const KIND: Kind = Kind::Block(<Self as Options>::OPTIONS);

            fn decode(value: &rmpv::Value, at: &str) -> Result<Self, ConfigError> {
                Self::read(&Fields::of(value, at)?)
            }
        }
    };
}

options! {
    /// The agent's `plugin` block as the operator wrote it.
    struct PluginOptions {
        /// Whether tasks may be placed on this node.
        "enabled" => enabled: bool [true],
        /// Whether jobs may mount host paths from outside their allocation.
        "volumes" => volumes: bool [true],
        /// Patterns of the host paths that jobs may mount; by default all.
        "volumes_allow" => volumes_allow: Vec<String> [],
        /// Whether jobs may use devices of the host.
        "devices" => devices: bool [true],
        /// Whether a task is refused if this node can't enforce one of its limits.
        "require_limits" => require_limits: bool [false],
        /// Whether a command is run in a task whose seccomp filters can't be read.
        "exec_unfiltered" => exec_unfiltered: bool [false],
        /// Whether seccomp filters that systemd-nspawn has built are installed in later containers of the same kind.
        "seccomp_cache" => seccomp_cache: bool [true],
        /// Whether a task that asks for no network has one of its own instead of the host's.
        "private_network" => private_network: bool [false],
        /// The addresses for containers with a network of their own.
        "network_pool" => network_pool: NetworkPool [],
        /// The directory that holds the state of running tasks.
        "state_dir" => state_dir: String ["/run/nomad-driver-nspawn"],
        /// The systemd-nspawn program to use instead of the one found in `PATH`.
        "nspawn_path" => nspawn_path: String [],
        /// How long to wait for the agent to recover its tasks before those it did not ask for are killed and removed.
        "reconcile_after" => reconcile_after: String ["10m"],
    }
}

options! {
    /// The `network_pool` block of the agent's `plugin` block.
    struct NetworkPool {
        /// The range of IPv4 addresses.
        "ipv4" => ipv4: String ["10.213.0.0/16"],
        /// The range of IPv6 addresses; by default unique local ones that follow from the host's machine id.
        "ipv6" => ipv6: String [],
    }
}

options! {
    /// A task's `config` block as the job has it.
    struct TaskOptions {
        /// Run the image's own init as the first process.
        "boot" => boot: bool [true],
        /// Run on a copy of the image, which is deleted when the task ends.
        "ephemeral" => ephemeral: bool [false],
        /// Run the command as process 2, below a small init.
        "process_two" => process_two: bool [false],
        /// Mount the root file system read-only.
        "read_only" => read_only: bool [false],
        /// Run the container in its own user namespace.
        "user_namespacing" => user_namespacing: bool [true],
        /// The range of user ids of the user namespace.
        "private_users" => private_users: String [],
        /// How the files of the image get owners in that range.
        "private_users_ownership" => private_users_ownership: String [],
        /// The command and its arguments, or arguments for the image's init.
        "command" => command: Vec<String> [],
        /// How standard input, output and error are connected.
        "console" => console: String [],
        /// Whether the journal of a booted image becomes part of the task's logs.
        "journal" => journal: bool [],
        /// The format of those lines: `short`, `cat` or `json`.
        "journal_format" => journal_format: String ["short"],
        /// The units whose entries are written to the logs; by default all.
        "journal_units" => journal_units: Vec<String> [],
        /// When the task counts as started: `started`, when the container is up, or `notify`, when the system or the command says so.
        "ready" => ready: String ["started"],
        /// How long `ready = "notify"` waits.
        "ready_timeout" => ready_timeout: String [],
        /// The root file system: a directory, a disk image, a block device or the name of a machine image.
        "image" => image: String [required],
        /// Where to download the image from.
        "image_download" => image_download: ImageDownload [],
        /// A directory of the image that becomes the root, and where the old root is put.
        "pivot_root" => pivot_root: String [],
        /// How the container gets its `/etc/resolv.conf`.
        "resolv_conf" => resolv_conf: String [],
        /// The user that runs the command, from the container's own user database.
        "user" => user: String [],
        /// Which part of the root file system is discarded when the task ends.
        "volatile" => volatile: String [],
        /// The directory inside the container in which the command starts.
        "working_directory" => working_directory: String [],
        /// Host files and directories to mount in the container, as source = target.
        "bind" => bind: BTreeMap<String, String> [],
        /// The same, read-only.
        "bind_read_only" => bind_read_only: BTreeMap<String, String> [],
        /// Host directories and temporary file systems to mount in the container, in the words of the docker driver.
        "mount" => mount: Vec<MountOptions> [],
        /// Several host directories that are mounted as one, with changes in a further one or discarded with the task.
        "overlay" => overlay: Vec<OverlayOptions> [],
        /// Temporary file systems of the container, each as `PATH` or `PATH:OPTIONS`.
        "tmpfs" => tmpfs: Vec<String> [],
        /// Whether files of volumes and binds have the same owners in a user namespace as on the host.
        "idmap" => idmap: bool [true],
        /// Environment variables; they override those of Nomad and of the job.
        "environment" => environment: BTreeMap<String, String> [],
        /// Files that the container gets as systemd credentials, as name = file.
        "credentials" => credentials: BTreeMap<String, String> [],
        /// Container ports by port label, for ports of the task's own `network` block.
        "port_map" => port_map: BTreeMap<String, Number> [],
        /// Labels of the group's ports that are forwarded into the container.
        "ports" => ports: Vec<String> [],
        /// Capabilities to add to the default set of a container.
        "capability" => capability: Vec<String> [],
        /// Give the container its own network, with a veth pair to the host.
        "network_veth" => network_veth: bool [],
        /// The network of the task: `host`, `none`, `bridge`, `zone:NAME` or `task:NAME`.
        "network_mode" => network_mode: String [],
        /// Join a zone: a bridge shared by the containers of the same zone.
        "network_zone" => network_zone: String [],
        /// Join an existing bridge of the host.
        "network_bridge" => network_bridge: String [],
        /// Interfaces of the host on which the container has one of its own (macvlan).
        "network_macvlan" => network_macvlan: Vec<String> [],
        /// The same with the hardware address of the host's interface (ipvlan).
        "network_ipvlan" => network_ipvlan: Vec<String> [],
        /// Interfaces of the host that the container has to itself.
        "network_interface" => network_interface: Vec<String> [],
        /// The host name of the container, instead of the machine name.
        "hostname" => hostname: String [],
        /// Names for the container's `/etc/hosts`, each as `NAME:ADDRESS`.
        "extra_hosts" => extra_hosts: Vec<String> [],
        /// Limit the task to its share of processor time, also when processors are idle.
        "cpu_hard_limit" => cpu_hard_limit: bool [false],
        /// The length of a period of `cpu_hard_limit`, in microseconds.
        "cpu_cfs_period" => cpu_cfs_period: Number [100000],
        /// The limit of memory and swap together.
        "memory_swap" => memory_swap: String [],
        /// The maximum number of processes and threads.
        "pids_limit" => pids_limit: Number [],
        /// Which processes the kernel kills first when the host runs out of memory: those with higher numbers.
        "oom_score_adj" => oom_score_adj: Number [0],
        /// Resource limits of the container's processes.
        "ulimit" => ulimit: BTreeMap<String, String> [],
        /// Kernel settings of the container.
        "sysctl" => sysctl: BTreeMap<String, String> [],
        /// Devices of the host that the container may use.
        "devices" => devices: Vec<DeviceOptions> [],
        /// The size of the container's `/dev/shm`.
        "shm_size" => shm_size: String [],
        /// The size of the container's `/tmp`.
        "tmp_size" => tmp_size: String [],
    }
}

options! {
    /// The `image_download` block as the job has it.
    struct ImageDownload {
        /// The URL, or an image reference for the type `docker`.
        "url" => url: String [required],
        /// The type of the download.
        "type" => kind: String ["tar"],
        /// Download again even if the image exists.
        "force" => force: bool [false],
        /// How the download is checked.
        "verify" => verify: String ["no"],
    }
}

options! {
    /// A `devices` block as the job has it.
    struct DeviceOptions {
        /// The device node on the host.
        "host_path" => host_path: String [required],
        /// The device node in the container; by default the same path.
        "container_path" => container_path: String [],
        /// What the container may do with the device: `r` (read), `w` (write) and `m` (make the node).
        "cgroup_permissions" => cgroup_permissions: String ["rwm"],
    }
}

options! {
    /// A `mount` block as the job has it.
    struct MountOptions {
        /// What is mounted: `bind` for a directory or file of the host, `tmpfs` for a temporary file system.
        "type" => kind: String ["bind"],
        /// The path in the container.
        "target" => target: String [required],
        /// The path on the host.
        "source" => source: String [],
        /// Mount it read-only.
        "readonly" => read_only: bool [false],
        /// Ignore the set-user-ID bits and capabilities of programs.
        "nosuid" => nosuid: bool [false],
        /// Ignore device nodes.
        "nodev" => nodev: bool [false],
        /// Ignore the permission to execute programs.
        "noexec" => noexec: bool [false],
        /// The same as the task's `idmap`, for this mount.
        "idmap" => idmap: bool [],
        /// Create the directory on the host if it is missing.
        "create" => create: bool [false],
        /// How a bind is mounted.
        "bind_options" => bind_options: BindOptions [],
        /// How a temporary file system is mounted.
        "tmpfs_options" => tmpfs_options: TmpfsOptions [],
    }
}

options! {
    /// An `overlay` block as the job has it.
    struct OverlayOptions {
        /// The directories on the host, the topmost first: a file hides files of the same path in later directories.
        "lower" => lower: Vec<String> [required],
        /// The path in the container.
        "target" => target: String [required],
        /// The directory on the host in which changes are kept; by default they are in memory, and discarded with the task.
        "upper" => upper: String [],
        /// Mount it read-only.
        "readonly" => read_only: bool [false],
        /// The most that discarded changes take.
        "size" => size: String [],
        /// Ignore the set-user-ID bits and capabilities of programs.
        "nosuid" => nosuid: bool [false],
        /// Ignore device nodes.
        "nodev" => nodev: bool [false],
        /// Ignore the permission to execute programs.
        "noexec" => noexec: bool [false],
        /// The same as the task's `idmap`, for this overlay.
        "idmap" => idmap: bool [],
        /// Create the directory `upper` if it is missing.
        "create" => create: bool [false],
    }
}

options! {
    /// The `bind_options` block of a `mount` block.
    struct BindOptions {
        /// Whether mounts that the host makes below the source later appear in the container.
        "propagation" => propagation: String ["rprivate"],
    }
}

options! {
    /// The `tmpfs_options` block of a `mount` block.
    struct TmpfsOptions {
        /// The most it holds, in bytes.
        "size" => size: Number [],
        /// The permissions of its root as a decimal number.
        "mode" => mode: Number [1023],
    }
}
