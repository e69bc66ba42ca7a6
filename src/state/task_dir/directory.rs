//! The directory itself: its name, its sockets, logs and locks, and how a file in it is written and opened.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use sha2::{Digest, Sha256};

use super::{TaskDir, invalid};
use crate::sys::replace_file;

/// The driver never writes a larger file, so a larger one is not the driver's.
pub(super) const MAX_RECORD_BYTES: u64 = 64 * 1024 * 1024;

/// Every name that may occur in a task directory. A file that is being written has `.<pid>-<number>.new` appended to its name.
const KNOWN_ENTRIES: [&str; 23] = [
    "control",
    "entered",
    "environment",
    "exec",
    "exit",
    "failure",
    "freed",
    "hosts",
    "init",
    "lifeline",
    "log",
    "machine-id",
    "machine-id-commit",
    "mounts",
    "network",
    "notify",
    "order",
    "ready",
    "released",
    "resolver",
    "root",
    "running",
    "words",
];

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

    /// The socket to which a command says that it is ready.
    pub fn ready_socket(&self) -> PathBuf {
        self.0.join("ready")
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

    pub(super) fn write(&self, name: &str, text: &[u8]) -> io::Result<()> {
        replace_file(&self.0, name, &[text])
    }

    /// Writes a file that everybody may read, because it is mounted in the container. Returns its path.
    pub fn write_visible(&self, name: &str, text: &[u8]) -> io::Result<PathBuf> {
        self.write(name, text)?;
        let path = self.0.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        Ok(path)
    }

    pub(super) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read_all(self.open(name)?, name)
    }

    pub(super) fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(self.0.join(name))
    }
}

/// The content of the record with this name.
pub(super) fn read_all(file: File, name: &str) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_RECORD_BYTES {
        return Err(invalid(format!(
            "the record {name:?} is larger than {MAX_RECORD_BYTES} bytes"
        )));
    }
    Ok(text)
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
