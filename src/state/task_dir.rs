//! The task directory: the files of one start on disk, above all launch spec, running record and exit record, which are here; the
//! directory itself is in `directory`. Every file but `log`
//! and `words`, to which their writers append, is written under a temporary name beside its final one and renamed into place. All are
//! readable by root only, and none is opened through a symlink. A file that can't be parsed is refused, and so is a record of a later format version. The module reads no
//! files but its own. Used by the plugin, the supervisor process and the exec shim.
//!
//! Records outlive the program that wrote them: the plugin may be upgraded or downgraded while its tasks run. A new field is
//! therefore optional and has a default; only a change that an older driver must not act on makes a new [`FORMAT_VERSION`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::launch_spec_record::LaunchSpecRecord;
use crate::cgroup::CgroupPlan;
use crate::container::{
    Cause, Credential, ExecDefaults, Exit, InsideSettings, Mode, Process, Started, SystemOutput,
};
use crate::lease::{Resource, TreeLock, UidRange};
use crate::mounts::MountPlan;
use crate::network::NetworkPlan;
use crate::seccomp;

mod directory;

/// The format version of the records that this driver writes.
pub const FORMAT_VERSION: u32 = 1;

/// The task directory of one start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TaskDir(PathBuf);

/// Everything a supervisor needs to start and supervise one container, except the environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "LaunchSpecRecord", into = "LaunchSpecRecord")]
pub struct LaunchSpec {
    /// Nomad's id of this start.
    pub id: String,
    /// The allocation directory, as the agent names it. `None` in launch specs of older drivers; the `owner` module then derives
    /// it from the log FIFOs.
    pub alloc_dir: Option<PathBuf>,
    /// The machine name.
    pub machine: String,
    /// What the container's first process is. Decides which process gets signals.
    pub mode: Mode,
    /// The boot id of the boot this launch spec belongs to.
    pub boot: String,
    /// Path of systemd-nspawn, absolute.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The container's PID 1.
    pub first: Pid1,
    /// Where stdout goes; `None` discards.
    pub stdout: Option<PathBuf>,
    /// Where stderr goes; `None` discards.
    pub stderr: Option<PathBuf>,
    /// The network namespace to start systemd-nspawn in.
    pub network_namespace: Option<PathBuf>,
    /// The same if it is that of another container: its first process.
    pub network_of: Option<Process>,
    /// What is done to the cgroups of the start; `None` without cgroups, and in launch specs of older drivers.
    pub cgroups: Option<CgroupPlan>,
    /// The badness adjustment of the container's processes, which inherit it: that of the agent may be another.
    pub oom_score_adj: i32,
    /// The host resources that the start acquires, in the order of acquisition. All of them are released in the reverse order.
    pub resources: Vec<Resource>,
    /// What the supervisor applies to the container before its command runs.
    pub inside: InsideSettings,
    /// Where its seccomp filters come from.
    pub seccomp: seccomp::Source,
    /// What the exec shim mounts for systemd-nspawn.
    pub mounts: MountPlan,
    /// The files that the exec shim reads for systemd-nspawn.
    pub credentials: Vec<Credential>,
    /// What the supervisor writes to the logs of the task itself.
    pub output: SystemOutput,
    /// How long the task may take to say that it is ready; `None` if it does not have to.
    pub ready_within: Option<Duration>,
    /// What the user should know about this start.
    pub notes: Vec<String>,
}

impl LaunchSpec {
    /// The cgroup to create, if the host has cgroups that the driver can use.
    pub fn cgroup(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Cgroup(cgroup) => Some(&*cgroup.group),
            _ => None,
        })
    }

    /// The cgroups to create in the hierarchies of cgroup v1 controllers.
    pub fn controller_cgroups(&self) -> &[PathBuf] {
        let groups = self.resources.iter().find_map(|resource| match resource {
            Resource::ControllerCgroups(cgroups) => Some(&*cgroups.groups),
            _ => None,
        });
        groups.unwrap_or_default()
    }

    /// The network to make, if the driver makes it.
    pub fn network(&self) -> Option<&NetworkPlan> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Network(network) => Some(&network.plan),
            _ => None,
        })
    }

    /// The range of ids of the container, if it has one that was picked for it.
    pub fn uid_range(&self) -> Option<&UidRange> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::UidRange(range) => Some(range),
            _ => None,
        })
    }

    /// The lock of the tree or image, unless the root is a copy.
    pub fn tree_lock(&self) -> Option<&TreeLock> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::TreeLock(lock) => Some(lock),
            _ => None,
        })
    }

    /// The directory in which systemd-nspawn creates the copy of an ephemeral root.
    pub fn copies(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::EphemeralCopy(copy) => Some(&*copy.directory),
            _ => None,
        })
    }
}

/// What runs as a container's PID 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pid1 {
    /// The image's own program.
    #[default]
    Image,
    /// The driver's container init.
    #[serde(rename = "ours")]
    Driver {
        /// Whether the init connects stdout and stderr itself, so that the streams of systemd-nspawn can be kept apart from them.
        streams: bool,
    },
}

/// A container that has started, with additional facts that only the supervisor and cleanup need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The container.
    pub started: Started,
    /// The systemd-nspawn process.
    pub nspawn: Process,
    /// The copy of an ephemeral root, if there is one. systemd-nspawn leaves it behind when it is killed.
    pub copy: Option<PathBuf>,
    /// The first host uid of the container's uid range, if it has a range of its own.
    #[serde(default)]
    pub uids: Option<u32>,
    /// The allocation directory, if known. Recorded here too, for the case that the launch spec can't be read.
    #[serde(default)]
    pub alloc_dir: Option<PathBuf>,
}

/// Why systemd-nspawn could not be executed. Read only by the supervisor process of the same binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind of cause, which decides whether another attempt may succeed.
    pub cause: Cause,
    /// The reason as text.
    pub reason: String,
}

impl TaskDir {
    /// Writes the launch spec and, in separate files, what holds secrets: the environment of systemd-nspawn and the init spec.
    /// The secret files are removed as soon as they have been read.
    pub fn write_launch_spec(
        &self,
        launch_spec: &LaunchSpec,
        environment: &BTreeMap<String, String>,
        init: Option<&nspawn_init::InitSpec>,
    ) -> io::Result<()> {
        self.write("environment", &serde_json::to_vec(environment)?)?;
        if let Some(init) = init {
            self.write("init", &serde_json::to_vec(init)?)?;
        }
        self.write("order", &encode(launch_spec)?)
    }

    /// When the launch spec was written.
    pub fn ordered_at(&self) -> io::Result<SystemTime> {
        fs::symlink_metadata(self.0.join("order"))?.modified()
    }

    /// The launch spec.
    pub fn launch_spec(&self) -> io::Result<LaunchSpec> {
        decode(&self.read("order")?)
    }

    /// Fails if a later driver has written the launch spec. This driver can't release what such a start has acquired, so it must not
    /// end anything of it: checked before every removal. A start that has been released is exempt, because only its directory is
    /// left. A launch spec that is missing or broken prevents no removal.
    pub fn refuse_later_form(&self) -> io::Result<()> {
        match self.launch_spec() {
            Err(error) if is_of_later_form(&error) && !self.is_freed() => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads systemd-nspawn's environment and removes its file from the disk.
    pub fn take_environment(&self) -> io::Result<BTreeMap<String, String>> {
        let environment = read(&self.read("environment")?)?;
        fs::remove_file(self.0.join("environment"))?;
        Ok(environment)
    }

    /// Opens the init spec and removes its file from the disk; the returned file has no name any more.
    pub fn take_init_spec(&self) -> io::Result<File> {
        let file = self.open("init")?;
        fs::remove_file(self.0.join("init"))?;
        Ok(file)
    }

    /// Writes what the supervisor keeps for further commands in the container, which holds secrets.
    pub fn write_exec_defaults(&self, defaults: &ExecDefaults) -> io::Result<()> {
        self.write("exec", &encode(defaults)?)
    }

    /// Opens it and removes its file from the disk; [`read_exec_defaults`] reads the returned file.
    pub fn take_exec_defaults(&self) -> io::Result<File> {
        let file = self.open("exec")?;
        fs::remove_file(self.0.join("exec"))?;
        Ok(file)
    }

    /// Removes secrets that no process has taken.
    pub fn discard_secrets(&self) {
        for name in ["environment", "exec", "init"] {
            let _ = fs::remove_file(self.0.join(name));
        }
    }

    /// Writes the running record.
    pub fn write_running(&self, running: &Running) -> io::Result<()> {
        self.write("running", &encode(running)?)
    }

    /// The running record.
    pub fn running(&self) -> io::Result<Running> {
        decode(&self.read("running")?)
    }

    /// Writes the exit record. It must outlive every process, but not a crash of the host, so it is not synced: after a crash the
    /// boot id differs and RecoverTask refuses every handle.
    pub fn write_exit(&self, exit: &Exit) -> io::Result<()> {
        self.write("exit", &encode(exit)?)
    }

    /// The exit record, if there is one.
    pub fn exit(&self) -> io::Result<Option<Exit>> {
        match self.read("exit") {
            Ok(text) => Ok(Some(decode(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Records that systemd-nspawn has exited by itself: it no longer holds its locks, and another container may have taken them
    /// since.
    pub fn write_released(&self) -> io::Result<()> {
        self.write("released", b"")
    }

    /// Whether systemd-nspawn has exited by itself. `false` too if no process was there to observe it.
    pub fn has_released(&self) -> bool {
        self.0.join("released").symlink_metadata().is_ok()
    }

    /// Records that every resource of the start has been released.
    pub fn write_freed(&self) -> io::Result<()> {
        self.write("freed", b"")
    }

    /// Whether every resource of the start has been released.
    pub fn is_freed(&self) -> bool {
        self.0.join("freed").symlink_metadata().is_ok()
    }

    /// Records the process that is about to become systemd-nspawn. Needed only on hosts where no cgroup shows which processes
    /// belong to the start.
    pub fn write_nspawn_pid(&self, nspawn: &Process) -> io::Result<()> {
        self.write("entered", &encode(nspawn)?)
    }

    /// The process that became systemd-nspawn.
    pub fn nspawn_pid(&self) -> io::Result<Process> {
        decode(&self.read("entered")?)
    }

    /// Records why systemd-nspawn could not be executed. Written by the exec shim, which tried.
    pub fn write_failure(&self, refusal: &Refusal) -> io::Result<()> {
        self.write("failure", &serde_json::to_vec(refusal)?)
    }

    /// Why systemd-nspawn could not be executed, if that happened.
    pub fn failure(&self) -> Option<Refusal> {
        serde_json::from_slice(&self.read("failure").ok()?).ok()
    }
}

/// Reads a file of [`TaskDir::take_exec_defaults`].
pub fn read_exec_defaults(file: File) -> io::Result<ExecDefaults> {
    decode(&directory::read_all(file, "exec")?)
}

#[derive(Serialize)]
struct Written<'a, T> {
    form: u32,
    #[serde(flatten)]
    record: &'a T,
}

#[derive(Deserialize)]
struct Form {
    /// Records from before the version was written are of version 1.
    #[serde(default = "first")]
    form: u32,
}

fn first() -> u32 {
    1
}

/// A record as the content of its file.
pub fn encode<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let written = Written {
        form: FORMAT_VERSION,
        record,
    };
    Ok(serde_json::to_vec(&written)?)
}

/// The record in the content of a file. The error has the kind `InvalidData` if it is no record, `Unsupported` if it is of a
/// later format version.
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> io::Result<T> {
    let Form { form } = read(text)?;
    if form > FORMAT_VERSION {
        let text = format!(
            "the record has format {form}, which is newer than format {FORMAT_VERSION} of this driver"
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    read(text)
}

/// Whether [`decode`] returned this error because of a later format version.
pub fn is_of_later_form(error: &io::Error) -> bool {
    // Errors of this kind that come from the kernel have an errno.
    error.kind() == io::ErrorKind::Unsupported && error.raw_os_error().is_none()
}

/// The error names the position and not the content: it may be a secret, or anything else.
fn read<T: DeserializeOwned>(text: &[u8]) -> io::Result<T> {
    serde_json::from_slice(text).map_err(|error| {
        invalid(format!(
            "not a record of this driver (line {} column {})",
            error.line(),
            error.column()
        ))
    })
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
#[path = "task_dir_tests.rs"]
pub(crate) mod tests;
