//! The directory of one start on disk: launch spec, running record, exit record. Every file is written whole beside its place
//! and renamed into it, readable by root alone, never through a link. Refuses what it can't read, and a later form by its
//! number; reads nothing but its own files.
//!
//! Records outlive the program that wrote them: the plugin is upgraded, or put back, while its tasks run. A new field is
//! therefore optional and gets a default; only what an older driver must not act on makes a new [`FORMAT_VERSION`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::OFlag;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::launch_spec_record::LaunchSpecRecord;
use super::resource::Resource;
use crate::container::{Cause, Exit, Mode, Process, Started};

/// No file of ours is larger; a larger one was not written by us.
const MAX_RECORD_BYTES: u64 = 64 * 1024 * 1024;

/// Everything that may lie in the directory of one start; a file that is being written has a number and `.new` behind its name.
const KNOWN_ENTRIES: [&str; 14] = [
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

/// The form of the records that this driver writes.
pub const FORMAT_VERSION: u32 = 1;

/// The directory of one start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TaskDir(PathBuf);

/// Everything a supervisor needs to start and to watch one container, except the environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "LaunchSpecRecord", into = "LaunchSpecRecord")]
pub struct LaunchSpec {
    /// Nomad's id of this start.
    pub id: String,
    /// The directory of the allocation, as its agent names it; see [`LaunchSpec::alloc_dir`] for orders of drivers before it was kept.
    pub alloc_dir: Option<PathBuf>,
    /// The machine name.
    pub machine: String,
    /// What the container's first process is: decides who gets signals.
    pub mode: Mode,
    /// The boot this order belongs to.
    pub boot: String,
    /// systemd-nspawn, absolute.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The container's first program.
    pub first: Pid1,
    /// Where stdout goes; `None` discards.
    pub stdout: Option<PathBuf>,
    /// Where stderr goes; `None` discards.
    pub stderr: Option<PathBuf>,
    /// The network namespace to start systemd-nspawn in.
    pub network_namespace: Option<PathBuf>,
    /// What the start acquires on the host, in the order of acquisition. All of it is released in the reverse order.
    pub resources: Vec<Resource>,
    /// What the user should know about this start.
    pub notes: Vec<String>,
}

impl LaunchSpec {
    /// The control group to make, if the host has any.
    pub fn cgroup(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Cgroup(cgroup) => Some(&*cgroup.group),
            _ => None,
        })
    }

    /// The tree whose lock is shared with others that do not write it.
    pub fn shared_tree(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::TreeLock(lock) if lock.shared => Some(&*lock.tree),
            _ => None,
        })
    }

    /// The directory that takes the throw-away copy of an ephemeral root.
    pub fn copies(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::EphemeralCopy(copy) => Some(&*copy.directory),
            _ => None,
        })
    }
}

/// A container's first program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pid1 {
    /// The image's own.
    #[default]
    Image,
    /// Ours.
    #[serde(rename = "ours")]
    Driver {
        /// Whether it connects stdout and stderr itself, so that those of systemd-nspawn are free to be kept apart.
        streams: bool,
    },
}

/// A container that came up, with what only the watch needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The container.
    pub started: Started,
    /// The systemd-nspawn process.
    pub nspawn: Process,
    /// The throw-away copy of the root, if there is one: systemd-nspawn leaves it when it is killed.
    pub copy: Option<PathBuf>,
    /// The first user id outside of the container's range, if it has one of its own.
    #[serde(default)]
    pub uids: Option<u32>,
    /// The directory of the allocation, where it is known: an order that can't be read does not tell.
    #[serde(default)]
    pub alloc_dir: Option<PathBuf>,
}

/// Why systemd-nspawn could not even be called. Read only by the supervisor of the same binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Whether another attempt is of use.
    pub cause: Cause,
    /// In words.
    pub reason: String,
}

impl TaskDir {
    /// The directory of this start below `state_dir`. Its name tells a person which task it is and can't be steered by one; all
    /// starts of one task of one allocation have names that begin alike.
    pub fn for_task(state_dir: &Path, id: &str) -> Self {
        Self(state_dir.join(format!("{}{}", name_prefix(id), digest(id))))
    }

    /// What lies below `state_dir` of other starts of the same task of the same allocation. A host starts a task anew only when
    /// it has given up all that came before, so nobody will ask for these.
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
            // Half an order is one of ours that was interrupted; one that can be read says whose it is.
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

    /// The records in this directory.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// Whether a start's directory can have this name.
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

    /// What lies in the directory and was not put there by the driver, if anything.
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

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The socket on which the supervisor listens.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("lifeline")
    }

    /// The socket on which systemd-nspawn tells of the start.
    pub fn notify_socket(&self) -> PathBuf {
        self.0.join("notify")
    }

    /// What the supervisor itself has to complain about.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Opens the log for a supervisor to write at its end.
    pub fn open_log(&self) -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(self.log())
    }

    /// Whether a supervisor of this start is alive, be it one that has not made its lifeline yet: it holds a lock on its log from
    /// its first moment to its last. Who looks shares the lock for that moment, so that two who look don't see each other; and a
    /// process that is just being started here keeps it a little longer, until its own program runs.
    pub fn has_supervisor(&self) -> bool {
        self.open("log")
            .is_ok_and(|log| matches!(log.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// The stand-in for a root that lacks mount points.
    pub fn skeleton(&self) -> PathBuf {
        self.0.join("root")
    }

    /// Makes the directory, which must not exist yet, for root alone.
    pub fn create(&self) -> io::Result<()> {
        if let Some(parent) = self.0.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)?;
        }
        DirBuilder::new().mode(0o700).create(&self.0)
    }

    /// Removes the directory and everything in it. Not there is fine.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Keeps the order, and apart from it what holds secrets: systemd-nspawn's environment and what our own first program is
    /// told. Those are removed as soon as they have been taken.
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

    /// The order.
    pub fn launch_spec(&self) -> io::Result<LaunchSpec> {
        decode(&self.read("order")?)
    }

    /// Takes systemd-nspawn's environment: it is not on disk any more afterwards.
    pub fn take_environment(&self) -> io::Result<BTreeMap<String, String>> {
        let environment = read(&self.read("environment")?)?;
        fs::remove_file(self.0.join("environment"))?;
        Ok(environment)
    }

    /// Takes what our own first program is told, as a file that is open and has no name any more.
    pub fn take_init_spec(&self) -> io::Result<File> {
        let file = self.open("init")?;
        fs::remove_file(self.0.join("init"))?;
        Ok(file)
    }

    /// Removes the secrets that nobody took.
    pub fn discard_secrets(&self) {
        for name in ["environment", "init"] {
            let _ = fs::remove_file(self.0.join(name));
        }
    }

    /// Opens the file that takes what systemd-nspawn itself says, where its streams are not the task's.
    pub fn open_nspawn_stderr(&self) -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(self.0.join("words"))
    }

    /// The last that systemd-nspawn itself has said, as far as it was kept.
    pub fn nspawn_stderr_tail(&self) -> String {
        /// More than a screen of an error is no help.
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

    /// Keeps the fact of the start.
    pub fn write_running(&self, running: &Running) -> io::Result<()> {
        self.write("running", &encode(running)?)
    }

    /// The fact of the start.
    pub fn running(&self) -> io::Result<Running> {
        decode(&self.read("running")?)
    }

    /// Keeps the end. It outlives every process, but need not outlive a crash of the host, so it is not synced: after that the
    /// boot id differs, and RecoverTask refuses every handle.
    pub fn write_exit(&self, exit: &Exit) -> io::Result<()> {
        self.write("exit", &encode(exit)?)
    }

    /// The end, if there is one.
    pub fn exit(&self) -> io::Result<Option<Exit>> {
        match self.read("exit") {
            Ok(text) => Ok(Some(decode(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps that systemd-nspawn has ended by itself: what it had locked is not locked any more, and may be another's.
    pub fn write_released(&self) -> io::Result<()> {
        self.write("released", b"")
    }

    /// Whether systemd-nspawn has ended by itself. If it did while nobody was there to see it, this is not known.
    pub fn has_released(&self) -> bool {
        self.0.join("released").symlink_metadata().is_ok()
    }

    /// Keeps that every resource of the start has been released.
    pub fn write_freed(&self) -> io::Result<()> {
        self.write("freed", b"")
    }

    /// Whether every resource of the start has been released.
    pub fn is_freed(&self) -> bool {
        self.0.join("freed").symlink_metadata().is_ok()
    }

    /// Keeps who is about to become systemd-nspawn. Needed only where no control group tells who belongs to the start.
    pub fn write_nspawn_pid(&self, nspawn: &Process) -> io::Result<()> {
        self.write("entered", &encode(nspawn)?)
    }

    /// Who became systemd-nspawn.
    pub fn nspawn_pid(&self) -> io::Result<Process> {
        decode(&self.read("entered")?)
    }

    /// Why systemd-nspawn could not even be called, left by the process that tried.
    pub fn write_failure(&self, refusal: &Refusal) -> io::Result<()> {
        self.write("failure", &serde_json::to_vec(refusal)?)
    }

    /// Why systemd-nspawn could not even be called, if that was so.
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
                // Of a process that had the same pid.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => break (beside, made?),
            }
        };
        let written = file
            .write_all(text)
            .and_then(|()| fs::rename(&beside, self.0.join(name)));
        if written.is_err() {
            // Half of it may be half a secret.
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

/// Allocation and task of an id, without the part that is new for every start.
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
    /// There were none before they were counted.
    #[serde(default = "first")]
    form: u32,
}

fn first() -> u32 {
    1
}

/// A record as the text of its file.
pub fn encode<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let written = Written {
        form: FORMAT_VERSION,
        record,
    };
    Ok(serde_json::to_vec(&written)?)
}

/// The record in the text of a file. An error of kind `InvalidData` if there is none, `Unsupported` if it is of a later form.
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> io::Result<T> {
    let Form { form } = read(text)?;
    if form > FORMAT_VERSION {
        let text = format!(
            "the record has form {form}, which is newer than this driver; it writes form {FORMAT_VERSION}"
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    read(text)
}

/// Whether [`decode`] gave this error because of a later form.
pub fn is_of_later_form(error: &io::Error) -> bool {
    // The kernel's own refusals of this kind have a number.
    error.kind() == io::ErrorKind::Unsupported && error.raw_os_error().is_none()
}

/// The error names the place and not what is there: it may be a secret, and it may be anything.
fn read<T: DeserializeOwned>(text: &[u8]) -> io::Result<T> {
    serde_json::from_slice(text).map_err(|error| {
        invalid(format!(
            "no record of this driver, as line {} column {} shows",
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
pub(super) mod tests;
