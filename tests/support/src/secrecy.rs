//! Searches for leaked secrets: looks for a marker in everything that a host shows of its processes and in recently written files. Shared
//! by the hermetic and the end-to-end tests. Only searches; [`shown`] alone defines where a secret may appear.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nomad_driver_nspawn::sys::procfs;

/// What a task's first process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The command.
    Plain,
    /// systemd-nspawn's own init, or the driver's.
    ProcessTwo,
    /// The image's init.
    Boot,
}

/// Why systemd-nspawn's arguments contain values of variables in this mode and version, or `None` if they don't. `reserved`: the name is
/// one that systemd-nspawn itself would act on. No other secret may appear anywhere, and these nowhere else. The only definition in the
/// tests; `docs/security.md` describes it in prose.
pub fn shown(mode: Mode, version: u32, reserved: bool) -> Option<&'static str> {
    match (mode, version, reserved) {
        (Mode::Boot, ..250, _) => Some("systemd-nspawn takes values as arguments only"),
        (Mode::Boot, _, true) => {
            Some("a job must not steer systemd-nspawn through its environment")
        }
        // The driver's own init gets them through a descriptor.
        _ => None,
    }
}

/// A secret that no other test uses.
#[derive(Debug, Clone)]
pub struct Marker(String);

/// A secret that was created elsewhere.
impl From<String> for Marker {
    fn from(secret: String) -> Self {
        assert!(
            secret.len() > 8,
            "too short to be distinguished from other text"
        );
        Self(secret)
    }
}

impl Marker {
    /// A new random marker.
    #[expect(
        clippy::new_without_default,
        reason = "each call returns a different value"
    )]
    pub fn new() -> Self {
        let mut bytes = [0; 12];
        let mut random = fs::File::open("/dev/urandom").unwrap();
        random.read_exact(&mut bytes).unwrap();
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// A secret of this kind that contains the marker.
    pub fn secret(&self, kind: &str) -> String {
        format!("{kind}-{}", self.0)
    }

    /// Whether these bytes contain the marker.
    pub fn is_in(&self, bytes: &[u8]) -> bool {
        memchr::memmem::find(bytes, self.0.as_bytes()).is_some()
    }

    /// Fails if the text contains the marker.
    #[track_caller]
    pub fn not_in(&self, what: &str, text: &str) {
        assert!(!self.is_in(text.as_bytes()), "{what} has it: {text}");
    }

    /// The processes with the marker in their command line, which every user of the host can read.
    pub fn in_command_lines(&self) -> BTreeMap<i32, String> {
        self.in_processes("cmdline")
    }

    /// The processes with the marker in their initial environment. Only root, and the user that the process runs as, can read it.
    pub fn in_environments(&self) -> BTreeMap<i32, String> {
        self.in_processes("environ")
    }

    /// Whether the marker is in the initial environment of this process.
    pub fn in_environment(&self, pid: i32) -> bool {
        fs::read(format!("/proc/{pid}/environ")).is_ok_and(|bytes| self.is_in(&bytes))
    }

    fn in_processes(&self, file: &str) -> BTreeMap<i32, String> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            let Ok(bytes) = fs::read(entry.path().join(file)) else {
                continue;
            };
            if self.is_in(&bytes) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                found.insert(pid, name.trim().to_owned());
            }
        }
        found
    }

    /// The files below `places` that contain the marker and were written since `since` (seconds since the epoch). Descends as many
    /// directories as given with each place, never into `spared`.
    pub fn in_files(
        &self,
        places: &[(&Path, usize)],
        spared: &[PathBuf],
        since: i64,
    ) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for (place, depth) in places {
            walk(place, *depth, spared, &mut |path, about| {
                let lately = about.ctime() >= since || about.mtime() >= since;
                if about.is_file() && lately && fs::read(path).is_ok_and(|all| self.is_in(&all)) {
                    found.push(path.to_owned());
                }
            });
        }
        found
    }
}

/// A search of the whole host for a marker: every process, and the files that were written lately.
#[derive(Debug)]
pub struct Search<'a> {
    /// What to search for.
    pub marker: &'a Marker,
    /// Whether the arguments of systemd-nspawn contain it ([`shown`]), and with them the launch spec, which only root can read.
    pub in_arguments: bool,
    /// The directory of the test, which is searched completely.
    pub own: &'a Path,
    /// The plugin's state directory in it.
    pub state: &'a Path,
    /// The directories in it that may contain the marker.
    pub spared: &'a [PathBuf],
    /// Older files are not searched (seconds since the epoch).
    pub since: i64,
}

impl Search<'_> {
    /// Fails if the marker is anywhere but in the environment of this `nspawn` and its descendants, and in the files of these names in a
    /// task directory; or if others could read a task directory. Returns how many files have it.
    #[track_caller]
    pub fn run(&self, when: &str, nspawn: Option<i32>, on_disk: &[&str]) -> usize {
        let lines = self.marker.in_command_lines();
        let expected: Vec<i32> = nspawn.into_iter().filter(|_| self.in_arguments).collect();
        let seen: Vec<i32> = lines.keys().copied().collect();
        assert_eq!(seen, expected, "{when}: command lines: {lines:?}");
        for (pid, name) in self.marker.in_environments() {
            let inside = nspawn.is_some_and(|nspawn| ancestry(pid).contains(&nspawn));
            assert!(inside, "{when}: the environment of {name} ({pid}) has it");
            // Owned by root, or in a private user namespace by the container's user, who has the secret anyway.
            if nix::unistd::geteuid().is_root()
                && let Ok(about) = fs::metadata(format!("/proc/{pid}/environ"))
            {
                assert_eq!(about.mode() & 0o777, 0o400, "{when}: {name}");
                assert!(about.uid() == 0 || Some(pid) != nspawn, "{when}: {name}");
            }
        }
        let mut places = places();
        places.push((self.own, usize::MAX));
        let files = self.marker.in_files(&places, self.spared, self.since);
        let kept = |path: &&PathBuf| {
            let of_a_start = path.parent().and_then(Path::parent) == Some(self.state);
            let name = path.file_name().and_then(|name| name.to_str()).unwrap();
            of_a_start && (on_disk.contains(&name) || (self.in_arguments && name == "order"))
        };
        let others: Vec<&PathBuf> = files.iter().filter(|path| !kept(path)).collect();
        assert_eq!(others, Vec::<&PathBuf>::new(), "{when}: files have it");
        let open = open_to_others(self.state);
        assert_eq!(open, Vec::<String>::new(), "{when}: others can read it");
        files.len()
    }
}

/// Where systemd-nspawn, the driver and core dumps leave files, and how many levels to search.
fn places() -> Vec<(&'static Path, usize)> {
    [
        ("/", 1),
        ("/run", 6),
        ("/tmp", 2),
        ("/var/tmp", 2),
        ("/dev/shm", 2),
        ("/var/lib/systemd", 4),
        ("/var/lib/machines", 1),
    ]
    .map(|(path, depth)| (Path::new(path), depth))
    .into()
}

/// The current time in seconds, minus the possible lag of file system timestamps.
pub fn now() -> i64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    i64::try_from(now.as_secs()).unwrap() - 2
}

/// Calls `see` for everything below a directory except directories, without following links. Returns whether the directory is empty.
fn walk(
    dir: &Path,
    depth: usize,
    spared: &[PathBuf],
    see: &mut impl FnMut(&Path, &fs::Metadata),
) -> bool {
    let mut is_empty = true;
    // Files that disappear during the search are skipped.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        is_empty = false;
        let path = entry.path();
        // Of the link itself, if it is one.
        let Ok(about) = entry.metadata() else {
            continue;
        };
        if spared.contains(&path) {
            continue;
        }
        if about.is_dir() && depth > 1 {
            if !was_empty(&path, &about) && walk(&path, depth - 1, spared, see) {
                remember_empty(path, &about);
            }
        } else if !about.is_dir() {
            see(&path, &about);
        }
    }
    is_empty
}

/// Empty directories and when they were last changed. On a host that has run many containers, `/tmp` has thousands of them: every
/// systemd-nspawn that was killed leaves some.
static EMPTY: Mutex<BTreeMap<PathBuf, (i64, i64)>> = Mutex::new(BTreeMap::new());

fn changed(about: &fs::Metadata) -> (i64, i64) {
    (about.mtime(), about.mtime_nsec())
}

/// Whether a directory was empty when it was last searched, and has not changed since.
fn was_empty(dir: &Path, about: &fs::Metadata) -> bool {
    EMPTY.lock().unwrap().get(dir) == Some(&changed(about))
}

/// Only of a directory that has not changed lately: another change in the same moment would leave its time as it is.
fn remember_empty(dir: PathBuf, about: &fs::Metadata) {
    if about.mtime() < now() {
        EMPTY.lock().unwrap().insert(dir, changed(about));
    }
}

/// The entries of a state directory that others than the owner could access, one per line: task directories and the directory of the
/// mounts must be 0700, files 0600 except for those that the container sees, sockets closed to others. The skeleton root belongs to the container; only its parent directory is checked.
pub fn open_to_others(state: &Path) -> Vec<String> {
    let mut open = Vec::new();
    for start in fs::read_dir(state).unwrap().flatten() {
        let mut look = |path: &Path, wanted: u32| {
            let Ok(about) = fs::symlink_metadata(path) else {
                return;
            };
            let mode = about.mode() & 0o7777;
            let owner = nix::unistd::geteuid().as_raw();
            let good = if about.is_file() || about.is_dir() {
                mode == wanted
            } else {
                mode & 0o077 == 0 && !about.is_symlink()
            };
            if !good || about.uid() != owner {
                open.push(format!("{mode:04o} of {} {}", about.uid(), path.display()));
            }
        };
        look(&start.path(), 0o700);
        for entry in fs::read_dir(start.path()).into_iter().flatten().flatten() {
            match entry.file_name().to_str() {
                Some("root") => {}
                Some("mounts") => look(&entry.path(), 0o700),
                // Mounted in the container, for all of its users.
                Some("hosts" | "machine-id" | "machine-id-commit" | "network" | "resolver") => {
                    look(&entry.path(), 0o644);
                }
                _ => look(&entry.path(), 0o600),
            }
        }
    }
    open
}

/// The open descriptors of a process, by number. `None` if this user may not read them.
pub fn descriptors(pid: i32) -> Option<BTreeMap<i32, String>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut found = BTreeMap::new();
    for entry in entries.flatten() {
        let target = match fs::read_link(entry.path()) {
            // Closed in the meantime.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            target => target.ok()?,
        };
        let text = target.to_string_lossy();
        // The inode numbers of sockets and pipes are not useful.
        let kind = match text.split_once(":[") {
            Some((kind @ ("socket" | "pipe"), _)) => kind,
            Some(("anon_inode", name)) => name.trim_end_matches(']'),
            // Newer kernels have a separate file system for pidfds.
            _ if text.contains("pidfd") => "pidfd",
            _ => &text,
        };
        found.insert(
            entry.file_name().to_string_lossy().parse().unwrap(),
            kind.to_owned(),
        );
    }
    Some(found)
}

/// The environment with which a process was executed, by name. `None` if this user may not read it.
pub fn environment(pid: i32) -> Option<BTreeMap<String, String>> {
    let bytes = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Some(
        text.split_terminator('\0')
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                (name.to_owned(), value.to_owned())
            })
            .collect(),
    )
}

/// A process and its ancestors, nearest first.
pub fn ancestry(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    let mut next = pid;
    while next > 0 && !all.contains(&next) {
        all.push(next);
        let stat = fs::read_to_string(format!("/proc/{next}/stat")).unwrap_or_default();
        next = procfs::parse_stat(&stat).map_or(0, |stat| stat.parent);
    }
    all
}
