//! Finds what dead plugins left: task directories in a state directory, and supervisors and cgroups whose start is not recorded
//! any more. Kills and removes only what the driver of this state directory certainly made. Names and files are taken for hostile
//! until they have been checked, and symlinks are never followed. Whether a plugin still uses a start is decided by `lock`. Runs
//! in the plugin.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::kill::descendants;
use crate::cgroup::{Group, Layout};
use crate::network::pool;
use crate::seccomp;
use crate::signal::Signal;
use crate::state::state_dir;
use crate::state::task_dir::{LaunchSpec, TaskDir, is_of_later_form};
use crate::sys::process::{ProcessHandle, children};

/// An empty cgroup younger than this may belong to a container that is just being started, possibly by a plugin with another
/// state directory.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// How long a supervisor may take to see that its container was killed; how long a killed process may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a supervisor may take to release everything after that: a copy of gigabytes takes minutes, and without a task directory
/// no other process knows what there is to release.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(600);

/// How often to check for children of a supervisor. No event reports that.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The content of a state directory.
#[derive(Debug, Default)]
pub struct Scan {
    /// Task directories.
    pub starts: Vec<TaskDir>,
    /// What the driver did not make, each with the reason.
    pub not_ours: Vec<(PathBuf, String)>,
}

/// Scans a state directory. A missing one is empty; one that others can write is an error, because nothing in it can be trusted.
pub fn scan(state_dir: &Path) -> io::Result<Scan> {
    let mut scan = Scan::default();
    state_dir::check(state_dir).map_err(io::Error::other)?;
    let entries = match fs::read_dir(state_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(scan),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if [seccomp::DIRECTORY, pool::DIRECTORY]
            .iter()
            .any(|name| path.ends_with(name))
        {
            continue;
        }
        match verify(state_dir, &path) {
            Ok(None) => scan.starts.push(TaskDir::new(path)),
            Ok(Some(reason)) => scan.not_ours.push((path, reason)),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => scan
                .not_ours
                .push((path, format!("it can't be read: {error}"))),
        }
    }
    Ok(scan)
}

/// Why a path, in whatever state directory, is not a task directory of the driver; `None` if it is one.
pub fn reason_not_ours(task_dir: &TaskDir) -> io::Result<Option<String>> {
    let state_dir = task_dir.path().parent().unwrap_or_else(|| Path::new("/"));
    if let Err(refused) = state_dir::check(state_dir) {
        return Ok(Some(refused.to_string()));
    }
    verify(state_dir, task_dir.path())
}

/// Why a path is not a task directory of the driver; `None` if it is one.
fn verify(state_dir: &Path, path: &Path) -> io::Result<Option<String>> {
    let reason_not_ours = |reason: &str| Ok(Some(reason.to_owned()));
    let name = path.file_name().and_then(|name| name.to_str());
    if !name.is_some_and(TaskDir::is_name) {
        return reason_not_ours("its name is not that of a task directory");
    }
    let about = path.symlink_metadata()?;
    if !about.is_dir() {
        return reason_not_ours("it is not a directory");
    }
    if about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        return reason_not_ours("its owner is not the driver's user, or other users can access it");
    }
    let task_dir = TaskDir::new(path);
    match task_dir.launch_spec() {
        Ok(launch_spec) if TaskDir::for_task(state_dir, &launch_spec.id) != task_dir => {
            reason_not_ours("its launch spec belongs to another start")
        }
        // Of a later driver, and not to be interpreted: see `TaskDir::refuse_later_form`.
        Err(error) if is_of_later_form(&error) => Ok(None),
        Ok(launch_spec) if !is_valid(&launch_spec, &task_dir) => {
            reason_not_ours("its launch spec names a machine or cgroup of another start")
        }
        Ok(_) => Ok(None),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData
            ) =>
        {
            // Only the name suggests that it is the driver's, so it must not contain anything else.
            let unexpected_entry = task_dir.unexpected_entry()?;
            Ok(unexpected_entry.map(|name| {
                format!(
                    "it contains {}, which is not a file of the driver",
                    name.display()
                )
            }))
        }
        Err(error) => Err(error),
    }
}

/// Whether a launch spec names a machine and cgroups that can be its own: both become part of paths that are removed.
fn is_valid(launch_spec: &LaunchSpec, task_dir: &TaskDir) -> bool {
    let machine = !launch_spec.machine.is_empty()
        && launch_spec.machine.len() <= 64
        && !launch_spec.machine.starts_with('.')
        && launch_spec
            .machine
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    machine
        && launch_spec
            .resources
            .iter()
            .all(|resource| resource.is_own(task_dir.path()))
}

/// A supervisor of this state directory, found by its command line.
#[derive(Debug)]
pub struct SupervisorProcess {
    /// The process.
    pub handle: ProcessHandle,
    /// The task directory of its start, which may not exist any more.
    pub directory: PathBuf,
}

/// The supervisors whose task directories belong in this state directory.
pub fn supervisors(state_dir: &Path) -> Vec<SupervisorProcess> {
    let mut found = all_supervisors();
    found.retain(|supervisor| supervisor.directory.parent() == Some(state_dir));
    found
}

/// The state directories of all supervisors of this host, as this process sees them.
pub fn state_dirs_in_use() -> BTreeSet<PathBuf> {
    let seen = |supervisor: SupervisorProcess| {
        let state_dir = supervisor.directory.parent()?.strip_prefix("/").ok()?;
        let root = format!("/proc/{}/root", supervisor.handle.process().pid);
        Some(Path::new(&root).join(state_dir))
    };
    all_supervisors().into_iter().filter_map(seen).collect()
}

fn all_supervisors() -> Vec<SupervisorProcess> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(supervisor).collect()
}

/// The supervisors of this start.
pub fn supervisors_of(task_dir: &TaskDir) -> Vec<SupervisorProcess> {
    let state_dir = task_dir.path().parent().unwrap_or_else(|| task_dir.path());
    let mut found = supervisors(state_dir);
    found.retain(|supervisor| supervisor.directory == task_dir.path());
    found
}

fn supervisor(pid: i32) -> Option<SupervisorProcess> {
    // Opened before `/proc` is read: what is read afterwards belongs to this process or to none.
    let handle = ProcessHandle::open(pid).ok()?;
    let about = fs::metadata(format!("/proc/{pid}")).ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    let ours = about.uid() == nix::unistd::geteuid().as_raw()
        && words.next() == Some(b"nomad-driver-nspawn")
        && words.next() == Some(b"supervise");
    let directory = PathBuf::from(OsString::from_vec(words.next()?.to_owned()));
    let name = directory.file_name()?.to_str()?;
    (ours && TaskDir::is_name(name)).then_some(SupervisorProcess { handle, directory })
}

impl SupervisorProcess {
    /// Whether its task directory does not exist any more, so that no plugin can ever ask for the start.
    pub fn is_unrecorded(&self) -> bool {
        let there = self.directory.symlink_metadata();
        there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Sends SIGCONT in case the supervisor was SIGSTOPped; harmless otherwise.
    pub fn sigcont(&self) {
        let _ = self.handle.signal(Signal::CONT);
    }

    /// Kills its container, so that the supervisor releases everything and exits by itself. If it does not, kills the supervisor
    /// too.
    pub fn end(&self) {
        self.end_within(KILL_TIMEOUT, RELEASE_TIMEOUT);
    }

    fn end_within(&self, kill: Duration, release: Duration) {
        self.sigcont();
        let pid = self.handle.process().pid;
        let end = Instant::now() + release;
        let mut kill_end = Instant::now() + kill;
        loop {
            let now = Instant::now();
            let below = children(pid);
            // Without a child it is releasing, or has not started systemd-nspawn yet.
            if below.is_empty() {
                kill_end = now + kill;
            } else if now >= kill_end {
                break;
            }
            for child in below {
                if let Ok(child) = ProcessHandle::open(child) {
                    let _ = child.signal(Signal::KILL);
                }
            }
            if self.handle.wait(POLL_INTERVAL) {
                return;
            }
            if now >= end {
                break;
            }
        }
        let below = descendants(pid).into_iter().skip(1);
        let below: Vec<ProcessHandle> = below
            .filter_map(|pid| ProcessHandle::open(pid).ok())
            .collect();
        let _ = self.handle.signal(Signal::KILL);
        self.handle.wait(KILL_TIMEOUT);
        for process in below {
            let _ = process.signal(Signal::KILL);
        }
    }
}

/// The driver's cgroups that belong to no start recorded in this state directory: those in which a systemd-nspawn of this state
/// directory runs, wherever they are, and those in the driver's own subtree that have been empty for more than `STALE_AFTER`.
pub fn groups(state_dir: &Path) -> Vec<PathBuf> {
    let layout = Layout::of_this_host();
    let mut leaves = layout.leaves(TaskDir::is_name);
    leaves.retain(|leaf| is_orphaned(&layout, leaf, state_dir).unwrap_or(false));
    leaves
}

fn is_orphaned(layout: &Layout, leaf: &Path, state_dir: &Path) -> Option<bool> {
    let name = leaf.file_name()?.to_str()?;
    // Checked after the cgroup was seen: a start is recorded before its cgroup is created and as long as it exists.
    let recorded = state_dir.join(name).symlink_metadata().is_ok();
    if recorded || !TaskDir::is_name(name) {
        return Some(false);
    }
    let processes = Group::new(leaf).processes();
    if !processes.is_empty() {
        let socket = TaskDir::new(state_dir.join(name)).notify_socket();
        return Some(processes.iter().any(|pid| has_notify_socket(*pid, &socket)));
    }
    // Outside of the driver's own subtree a name is no proof.
    if !layout.is_own(leaf) {
        return Some(false);
    }
    let changed = fs::metadata(leaf).and_then(|about| about.modified()).ok()?;
    Some(SystemTime::now().duration_since(changed).ok()? > STALE_AFTER)
}

/// Whether a process was started with this socket as its `NOTIFY_SOCKET`.
fn has_notify_socket(pid: i32, socket: &Path) -> bool {
    let mut want = b"NOTIFY_SOCKET=".to_vec();
    want.extend_from_slice(socket.as_os_str().as_encoded_bytes());
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == want)
}

/// Kills the processes of such a cgroup and removes it, with the cgroups of the same name that systemd-nspawn has made in other
/// hierarchies. A cgroup that was empty and is not any more is an error.
pub fn remove_group(group: &Path, state_dir: &Path) -> io::Result<()> {
    let layout = Layout::of_this_host();
    match is_orphaned(&layout, group, state_dir) {
        Some(true) if Group::new(group).processes().is_empty() => Group::new(group).remove(),
        Some(true) => {
            super::kill_group(group, true)?;
            let name = group.file_name().and_then(|name| name.to_str());
            let alike = layout.find(name.unwrap_or_default());
            alike
                .iter()
                .try_for_each(|group| Group::new(group).remove())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Cgroup, CgroupMirror, Resource};
    use crate::state::task_dir::tests::an_order;
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn ordered(state_dir: &Path, id: &str, change: impl FnOnce(&mut LaunchSpec)) -> TaskDir {
        let task_dir = TaskDir::for_task(state_dir, id);
        task_dir.create().unwrap();
        let mut launch_spec = an_order(id);
        change(&mut launch_spec);
        task_dir
            .write_launch_spec(&launch_spec, &BTreeMap::new(), None)
            .unwrap();
        task_dir
    }

    fn in_group(group: PathBuf) -> Resource {
        Resource::Cgroup(Cgroup { group })
    }

    const LIMIT: Duration = Duration::from_secs(60);

    /// A shell that stands for a supervisor, once it has a child or none.
    #[expect(clippy::disallowed_methods, reason = "a process to end")]
    fn stand_in(script: &str, has_child: bool) -> (std::process::Child, SupervisorProcess) {
        let shell = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let handle = ProcessHandle::open(shell.id().cast_signed()).unwrap();
        let end = Instant::now() + LIMIT;
        while children(handle.process().pid).is_empty() == has_child && Instant::now() < end {
            std::thread::yield_now();
        }
        let directory = PathBuf::new();
        (shell, SupervisorProcess { handle, directory })
    }

    /// Without its task directory no other process knows what there is to release.
    #[test]
    fn a_supervisor_that_is_releasing_is_waited_for() {
        // The child is killed; what the shell then does stands for the release.
        let script = "sleep 600; echo releasing; read line; exit 7";
        let (mut shell, supervisor) = stand_in(script, true);
        let ending = std::thread::spawn(move || supervisor.end_within(LIMIT, LIMIT));
        let mut line = [0; 10];
        let mut said = shell.stdout.take().unwrap();
        io::Read::read_exact(&mut said, &mut line).unwrap();
        assert_eq!(&line, b"releasing\n");
        drop(shell.stdin.take());
        ending.join().unwrap();
        assert_eq!(shell.wait().unwrap().code(), Some(7));
    }

    #[rstest::rstest]
    #[case::not_killed_in_time(Duration::ZERO, LIMIT, "sleep 600; read line", true)]
    #[case::not_released_in_time(LIMIT, Duration::ZERO, "read line", false)]
    fn a_supervisor_that_takes_too_long_is_killed(
        #[case] kill: Duration,
        #[case] release: Duration,
        #[case] script: &str,
        #[case] has_child: bool,
    ) {
        let (mut shell, supervisor) = stand_in(script, has_child);
        supervisor.end_within(kill, release);
        let signal = std::os::unix::process::ExitStatusExt::signal(&shell.wait().unwrap());
        assert_eq!(signal, Some(9));
    }

    #[test]
    fn only_task_directories_of_the_driver_are_starts() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let group = |task_dir: &TaskDir, above: &str| {
            Path::new(above).join(task_dir.path().file_name().unwrap())
        };
        let whole = ordered(dir, "a/whole/1", |_| {});
        let placed = TaskDir::for_task(dir, "a/placed/1");
        ordered(dir, "a/placed/1", |launch_spec| {
            let mirror = group(&placed, "/m");
            launch_spec.resources = vec![
                in_group(group(&placed, "/g/x")),
                Resource::CgroupMirror(CgroupMirror { group: mirror }),
            ];
        });
        let bare = TaskDir::for_task(dir, "a/bare/1");
        bare.create().unwrap();
        let torn = ordered(dir, "a/torn/1", |_| {});
        fs::write(torn.path().join("order"), "{").unwrap();

        fs::write(dir.join("note"), "").unwrap();
        fs::create_dir(dir.join("else")).unwrap();
        let strange = TaskDir::for_task(dir, "a/strange/1");
        strange.create().unwrap();
        fs::write(strange.path().join("thesis"), "").unwrap();
        let open = ordered(dir, "a/open/1", |_| {});
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
        symlink(whole.path(), TaskDir::for_task(dir, "a/link/1").path()).unwrap();
        let moved = TaskDir::for_task(dir, "a/moved/1");
        fs::rename(ordered(dir, "a/other/1", |_| {}).path(), moved.path()).unwrap();
        let linked = TaskDir::for_task(dir, "a/linked/1");
        linked.create().unwrap();
        symlink(whole.path().join("order"), linked.path().join("order")).unwrap();
        for (name, machine) in [("up", "../../etc"), ("none", ""), ("dot", "..")] {
            ordered(dir, &format!("a/{name}/1"), |launch_spec| {
                launch_spec.machine = machine.to_owned()
            });
        }
        let newer = ordered(dir, "a/newer/1", |_| {});
        let text = fs::read_to_string(newer.path().join("order")).unwrap();
        let text = text.replace("\"form\":1", "\"form\":2");
        fs::write(newer.path().join("order"), text).unwrap();
        ordered(dir, "a/group/1", |launch_spec| {
            let group = PathBuf::from("/sys/fs/cgroup/system.slice");
            launch_spec.resources = vec![in_group(group)];
        });
        let climbing = TaskDir::for_task(dir, "a/climbing/1");
        ordered(dir, "a/climbing/1", |launch_spec| {
            let group = group(&climbing, "/g/../..");
            launch_spec.resources = vec![in_group(group)];
        });

        let scan = scan(dir).unwrap();
        let mut starts: Vec<_> = scan.starts.iter().map(TaskDir::path).collect();
        let mut want = [&whole, &placed, &bare, &torn, &newer].map(TaskDir::path);
        starts.sort();
        want.sort();
        assert_eq!(starts, want);
        assert_eq!(scan.not_ours.len(), 12, "{:?}", scan.not_ours);
    }

    #[test]
    fn a_state_directory_writable_by_others_is_not_scanned() {
        let temp = tempfile::tempdir().unwrap();
        assert!(scan(&temp.path().join("none")).unwrap().starts.is_empty());
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o777)).unwrap();
        scan(temp.path()).unwrap_err();
    }
}
