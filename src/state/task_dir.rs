//! The task directory: the files of one start on disk, above all launch spec, running record and exit record. Every file but `log`
//! and `words`, to which their writers append, is written under a temporary name beside its final one and renamed into place. All are
//! readable by root only, and none is opened through a symlink. A file that can't be parsed is refused, and so is a record of a later format version. The module reads no
//! files but its own. Used by the plugin, the supervisor process and the exec shim.
//!
//! Records outlive the program that wrote them: the plugin may be upgraded or downgraded while its tasks run. A new field is
//! therefore optional and has a default; only a change that an older driver must not act on makes a new [`FORMAT_VERSION`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use nix::fcntl::OFlag;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::launch_spec_record::LaunchSpecRecord;
use crate::cgroup::CgroupPlan;
use crate::container::{Cause, Exit, InsideSettings, Mode, Process, Started};
use crate::lease::Resource;

/// The driver never writes a larger file, so a larger one is not the driver's.
const MAX_RECORD_BYTES: u64 = 64 * 1024 * 1024;

/// Every name that may occur in a task directory. A file that is being written has `.<pid>-<number>.new` appended to its name.
const KNOWN_ENTRIES: [&str; 15] = [
    "control",
    "entered",
    "environment",
    "exit",
    "failure",
    "freed",
    "init",
    "lifeline",
    "log",
    "notify",
    "order",
    "released",
    "root",
    "running",
    "words",
];

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
    /// What is done to the cgroups of the start; `None` without cgroups, and in launch specs of older drivers.
    pub cgroups: Option<CgroupPlan>,
    /// The badness adjustment of the container's processes, which inherit it: that of the agent may be another.
    pub oom_score_adj: i32,
    /// The host resources that the start acquires, in the order of acquisition. All of them are released in the reverse order.
    pub resources: Vec<Resource>,
    /// What the supervisor applies to the container before its command runs.
    pub inside: InsideSettings,
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

    /// The tree whose lock is shared with other containers that do not write it.
    pub fn shared_tree(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::TreeLock(lock) if lock.shared => Some(&*lock.tree),
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

impl AsRef<Path> for TaskDir {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl TaskDir {
    /// The task directory of this start below `state_dir`. Its name lets a person recognize the task, but a task name can't steer
    /// the path. All starts of one task of one allocation have names with the same prefix.
    pub fn for_task(state_dir: &Path, id: &str) -> Self {
        Self(state_dir.join(format!("{}{}", name_prefix(id), digest(id))))
    }

    /// The task directories below `state_dir` of other starts of the same task of the same allocation. Nomad starts a task again
    /// only after it has given up all earlier starts, so it will not ask for these any more.
    pub fn previous_starts(state_dir: &Path, id: &str) -> io::Result<Vec<Self>> {
        let name_prefix = name_prefix(id);
        let own = Self::for_task(state_dir, id);
        let entries = match fs::read_dir(state_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let task_dir = Self(entry.path());
            let alike = name
                .to_str()
                .is_some_and(|name| name.starts_with(&name_prefix));
            // An incomplete launch spec is an interrupted start of this task; a readable one names its task.
            if alike
                && task_dir != own
                && task_dir.launch_spec().map_or(true, |launch_spec| {
                    without_start_suffix(&launch_spec.id) == without_start_suffix(id)
                })
            {
                found.push(task_dir);
            }
        }
        Ok(found)
    }

    /// The task directory at this path. Opens nothing.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// Whether a task directory can have this name.
    pub fn is_name(name: &str) -> bool {
        name.split_once('.').is_some_and(|(readable, hash)| {
            readable.len() <= 16
                && readable
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && hash.len() == 16
                && hash
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
    }

    /// The name of an entry in the directory that the driver did not create, if there is one.
    pub fn unexpected_entry(&self) -> io::Result<Option<OsString>> {
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            let known = name.to_str().is_some_and(|name| {
                let place = name.strip_suffix(".new").map_or(name, |beside| {
                    let (place, number) = beside.split_once('.').unwrap_or((beside, ""));
                    let counted = number
                        .bytes()
                        .all(|byte| byte.is_ascii_digit() || byte == b'-');
                    if counted { place } else { name }
                });
                KNOWN_ENTRIES.contains(&place)
            });
            if !known {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The supervisor's control socket, for packets.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control")
    }

    /// The supervisor's control socket for drivers that know no other: a stream.
    pub fn control_stream(&self) -> PathBuf {
        self.0.join("lifeline")
    }

    /// The socket to which systemd-nspawn reports the start (`NOTIFY_SOCKET`).
    pub fn notify_socket(&self) -> PathBuf {
        self.0.join("notify")
    }

    /// The log file of the supervisor itself.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Opens the log for a supervisor, in append mode.
    pub fn open_log(&self) -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(self.log())
    }

    /// Whether a supervisor of this start is alive, including one that has not created its control socket yet: a supervisor holds
    /// an exclusive lock on its log from the beginning of its process to its end. Probing takes a shared lock, so that concurrent
    /// probes do not mistake each other for a supervisor. A process that is forked here during a probe inherits the shared lock
    /// and keeps it a little longer, until it executes its own program.
    pub fn has_supervisor(&self) -> bool {
        self.open("log")
            .is_ok_and(|log| matches!(log.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// The skeleton that replaces a root that lacks mount points.
    pub fn skeleton(&self) -> PathBuf {
        self.0.join("root")
    }

    /// Creates the directory, which must not exist yet, with access for root only.
    pub fn create(&self) -> io::Result<()> {
        if let Some(parent) = self.0.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)?;
        }
        DirBuilder::new().mode(0o700).create(&self.0)
    }

    /// Removes the directory and everything in it. A missing directory is success.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

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

    /// Removes secrets that no process has taken.
    pub fn discard_secrets(&self) {
        for name in ["environment", "init"] {
            let _ = fs::remove_file(self.0.join(name));
        }
    }

    /// Opens the file that takes stderr of systemd-nspawn itself, when its streams are not the task's.
    pub fn open_nspawn_stderr(&self) -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(self.0.join("words"))
    }

    /// The end of what systemd-nspawn itself wrote to stderr, as far as it was recorded.
    pub fn nspawn_stderr_tail(&self) -> String {
        /// In bytes. More than a screenful of an error is no help.
        const END: u64 = 2048;
        let end = |mut file: File| -> io::Result<String> {
            let length = file.metadata()?.len();
            file.seek(io::SeekFrom::Start(length.saturating_sub(END)))?;
            let mut bytes = Vec::new();
            file.take(END).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        self.open("words").and_then(end).unwrap_or_default()
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

    fn write(&self, name: &str, text: &[u8]) -> io::Result<()> {
        // Plugin and supervisor may write the same record at the same time.
        static WRITTEN: AtomicU32 = AtomicU32::new(0);
        let (beside, mut file) = loop {
            let (pid, number) = (std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
            let beside = self.0.join(format!("{name}.{pid}-{number}.new"));
            let made = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&beside);
            match made {
                // Left by an earlier process with the same pid.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => break (beside, made?),
            }
        };
        let written = file
            .write_all(text)
            .and_then(|()| fs::rename(&beside, self.0.join(name)));
        if written.is_err() {
            // An incomplete file may contain part of a secret.
            let _ = fs::remove_file(beside);
        }
        written
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let file = self.open(name)?;
        file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_RECORD_BYTES {
            return Err(invalid(format!(
                "the record {name:?} is larger than {MAX_RECORD_BYTES} bytes"
            )));
        }
        Ok(text)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(self.0.join(name))
    }
}

/// Allocation and task of an id, without the suffix that is new for every start.
fn without_start_suffix(id: &str) -> &str {
    id.rsplit_once('/').map_or(id, |(task, _)| task)
}

fn name_prefix(id: &str) -> String {
    let task = id.split('/').nth(1).unwrap_or_default();
    let readable: String = task
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(16)
        .collect();
    format!("{readable}.{}", digest(without_start_suffix(id)))
}

fn digest(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
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
