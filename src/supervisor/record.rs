//! What lies on disk for one start: the order, the fact of the start, the end. Every file is written whole beside its place
//! and renamed into it, readable by root alone, never through a link. Refuses what it can't read with the file's name; reads
//! nothing but its own files.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cgroup::Place;
use crate::container::{Exit, Mode, Process, Started};

/// No file of ours is larger; a larger one was not written by us.
const LARGEST: u64 = 64 * 1024 * 1024;

/// Everything that may lie in the directory of one start; a file that is being written has `.new` behind its name.
const NAMES: [&str; 11] = [
    "environment",
    "exit",
    "failure",
    "init",
    "lifeline",
    "log",
    "notify",
    "order",
    "root",
    "running",
    "words",
];

/// The directory of one start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Records(PathBuf);

/// Everything a supervisor needs to start and to watch one container, except the environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Nomad's id of this start.
    pub id: String,
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
    /// Where stdout goes; `None` discards.
    pub stdout: Option<PathBuf>,
    /// Where stderr goes; `None` discards.
    pub stderr: Option<PathBuf>,
    /// The control group to make, if the host has any.
    pub place: Option<Place>,
    /// The network namespace to start systemd-nspawn in.
    pub network_namespace: Option<PathBuf>,
    /// The tree or image that systemd-nspawn locks, unless it works on a copy.
    pub locks: Option<PathBuf>,
    /// The directory that takes the throw-away copy of an ephemeral root.
    pub copies: Option<PathBuf>,
    /// What the user should know about this start.
    pub notes: Vec<String>,
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
}

impl Records {
    /// The directory of this start below `state_dir`. Its name tells a person which task it is and can't be steered by one.
    pub fn of(state_dir: &Path, id: &str) -> Self {
        let task = id.split('/').nth(1).unwrap_or_default();
        let readable: String = task
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .take(16)
            .collect();
        let digest = Sha256::digest(id.as_bytes());
        let hash: String = digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self(state_dir.join(format!("{readable}.{hash}")))
    }

    /// The records in this directory.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
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
    pub fn stranger(&self) -> io::Result<Option<OsString>> {
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            let known = name
                .to_str()
                .is_some_and(|name| NAMES.contains(&name.strip_suffix(".new").unwrap_or(name)));
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
    pub fn lifeline(&self) -> PathBuf {
        self.0.join("lifeline")
    }

    /// The socket on which systemd-nspawn tells of the start.
    pub fn notify(&self) -> PathBuf {
        self.0.join("notify")
    }

    /// What the supervisor itself has to complain about.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
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

    /// Keeps the order, and the environment apart from it: that one is removed as soon as it has been taken.
    pub fn write_order(
        &self,
        order: &Order,
        environment: &BTreeMap<String, String>,
    ) -> io::Result<()> {
        self.write("environment", environment)?;
        self.write("order", order)
    }

    /// The order.
    pub fn order(&self) -> io::Result<Order> {
        self.read("order")
    }

    /// Takes the environment: it is not on disk any more afterwards.
    pub fn take_environment(&self) -> io::Result<BTreeMap<String, String>> {
        let environment = self.read("environment")?;
        fs::remove_file(self.0.join("environment"))?;
        Ok(environment)
    }

    /// Removes an environment that nobody took.
    pub fn discard_environment(&self) {
        let _ = fs::remove_file(self.0.join("environment"));
    }

    /// Keeps the fact of the start.
    pub fn write_running(&self, running: &Running) -> io::Result<()> {
        self.write("running", running)
    }

    /// The fact of the start.
    pub fn running(&self) -> io::Result<Running> {
        self.read("running")
    }

    /// Keeps the end. It is on the disk when this returns.
    pub fn write_exit(&self, exit: &Exit) -> io::Result<()> {
        self.write("exit", exit)?;
        // The other files mean nothing after a crash of the host; this one tells what happened before it.
        File::open(self.0.join("exit"))?.sync_data()
    }

    /// The end, if there is one.
    pub fn exit(&self) -> io::Result<Option<Exit>> {
        match self.read("exit") {
            Ok(exit) => Ok(Some(exit)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Why systemd-nspawn could not even be called, left by the process that tried.
    pub fn write_failure(&self, reason: &str) -> io::Result<()> {
        self.write("failure", &reason)
    }

    /// Why systemd-nspawn could not even be called, if that was so.
    pub fn failure(&self) -> Option<String> {
        self.read("failure").ok()
    }

    fn write<T: Serialize + ?Sized>(&self, name: &str, value: &T) -> io::Result<()> {
        let beside = self.0.join(format!("{name}.new"));
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        fs::rename(&beside, self.0.join(name))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> io::Result<T> {
        let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
        let file: File = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(self.0.join(name))?;
        let mut text = Vec::new();
        file.take(LARGEST).read_to_end(&mut text)?;
        serde_json::from_slice(&text)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    fn exit() -> Exit {
        Exit {
            code: 7,
            signal: 0,
            oom_killed: false,
            error: None,
            ended_at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn what_is_written_is_read_and_is_root_s_alone() {
        let temp = tempfile::tempdir().unwrap();
        let records = Records::of(&temp.path().join("state"), "alloc/web/0a1b2c3d");
        records.create().unwrap();
        assert_eq!(records.exit().unwrap(), None);
        records.write_exit(&exit()).unwrap();
        assert_eq!(records.exit().unwrap(), Some(exit()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(records.path()), 0o700);
        assert_eq!(mode(&records.path().join("exit")), 0o600);
        records.create().unwrap_err();
        records.remove().unwrap();
        records.remove().unwrap();
    }

    #[test]
    fn a_link_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let records = Records::at(temp.path().join("x"));
        records.create().unwrap();
        fs::write(
            temp.path().join("elsewhere"),
            serde_json::to_vec(&exit()).unwrap(),
        )
        .unwrap();
        std::os::unix::fs::symlink(temp.path().join("elsewhere"), records.path().join("exit"))
            .unwrap();
        records.exit().unwrap_err();
    }

    #[test]
    fn the_environment_can_be_taken_once() {
        let temp = tempfile::tempdir().unwrap();
        let records = Records::at(temp.path().join("x"));
        records.create().unwrap();
        records
            .write("environment", &BTreeMap::from([("A", "b")]))
            .unwrap();
        assert_eq!(
            records
                .take_environment()
                .unwrap()
                .get("A")
                .map(String::as_str),
            Some("b")
        );
        records.take_environment().unwrap_err();
    }

    proptest! {
        #[test]
        fn no_id_leads_out_of_the_state_directory(id in "\\PC{0,200}") {
            let records = Records::of(Path::new("/state"), &id);
            prop_assert_eq!(records.path().parent(), Some(Path::new("/state")));
            prop_assert!(Records::is_name(records.path().file_name().unwrap().to_str().unwrap()));
            // Sockets have short paths: the configuration keeps 43 bytes free below the state directory.
            prop_assert!(records.lifeline().as_os_str().len() <= "/state".len() + 43);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let temp = tempfile::tempdir().unwrap();
            fs::write(temp.path().join("order"), &bytes).unwrap();
            fs::write(temp.path().join("exit"), &bytes).unwrap();
            let records = Records::at(temp.path());
            prop_assert!(records.order().is_err());
            prop_assert!(records.exit().is_err());
        }
    }
}
