//! Applies to a started container what systemd-nspawn has no option for: sizes of its temporary file systems, kernel settings of its
//! namespaces, device nodes, the owner of credentials. Runs in the supervisor process, after systemd-nspawn has named the leader and before the driver's init is
//! sent "go". The root of the container is not trusted: every path is looked up below the leader's root, and nothing is changed
//! that the host can see too. What is applied belongs to the container and ends with it, so there is nothing to release.

mod credentials;
mod devices;
mod sysctls;
mod tmpfs;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, Stat, fstat, fstatfs, major, minor, openat2};

use super::Supervisor;
use crate::container::{Cause, Credential, InsideSettings};
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::task_dir::Pid1;
use crate::supervisor::protocol::{StartFailure, StartStep};
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;

impl Supervisor {
    /// Applies the settings of the launch spec to the container. Returns false if that failed and the start is being undone. A
    /// container whose leader has exited already is left alone: its exit is all there is to report.
    pub(super) fn apply_inside(&mut self, leader: Option<&ProcessHandle>) -> bool {
        let (settings, credentials) = (&self.launch_spec.inside, self.credentials_of_command());
        let is_needed = !settings.is_empty() || !credentials.is_empty();
        let Some(leader) = leader.filter(|_| is_needed) else {
            return true;
        };
        match apply(settings, credentials, leader) {
            Ok(notes) => self.launch_spec.notes.extend(notes),
            // What has no process any more has no namespaces either.
            Err(_) if has_exited(leader) => {}
            Err(failure) => {
                self.fail_with(failure);
                return false;
            }
        }
        true
    }

    /// Those of a container in which the driver's init runs a command. An image's own init is root.
    fn credentials_of_command(&self) -> &[Credential] {
        match self.launch_spec.first {
            Pid1::Driver { .. } => &self.launch_spec.credentials,
            Pid1::Image => &[],
        }
    }
}

/// Applies all settings. Returns what the user should know about the start.
fn apply(
    settings: &InsideSettings,
    credentials: &[Credential],
    leader: &ProcessHandle,
) -> Result<Vec<String>, StartFailure> {
    sysctls::apply(&settings.sysctls, leader)?;
    let root = match ContainerRoot::open(leader) {
        Ok(Some(root)) => root,
        Ok(None) => return Ok(Vec::new()),
        Err(error) => {
            let reason = format!("the root of the container can't be opened: {error}");
            return Err(refused(cause_of_host_error(&error), reason));
        }
    };
    for device in &settings.devices {
        devices::make(device, &root, leader.process().pid)?;
    }
    credentials::give(credentials, &root, leader.process())?;
    Ok(tmpfs::resize(settings.tmpfs, &root))
}

/// A setting that can't be applied.
fn refused(cause: Cause, reason: String) -> StartFailure {
    StartFailure::new(StartStep::Inside, cause, reason)
}

/// Whether the process has exited, or is exiting: it then has no root and no namespaces any more, and the first process of a pid namespace
/// still waits for all others. While it has not exited, what `/proc` shows under its pid is its own.
pub(super) fn has_exited(leader: &ProcessHandle) -> bool {
    let root = format!("/proc/{}/root", leader.process().pid);
    leader.wait(Duration::ZERO)
        || std::fs::read_link(root).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The root directory of a container, as its leader sees it.
#[derive(Debug)]
struct ContainerRoot {
    root: OwnedFd,
    /// The devices of the file systems that the host has mounted, or why they are not known.
    of_host: io::Result<HashSet<(u32, u32)>>,
}

/// Opens the root directory of the leader. `None` if it has exited.
pub(super) fn root_of(leader: &ProcessHandle) -> io::Result<Option<OwnedFd>> {
    let root = format!("/proc/{}/root", leader.process().pid);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty());
    // Checked after opening: otherwise the pid could be that of another process by then.
    match has_exited(leader) {
        true => Ok(None),
        false => Ok(Some(root?)),
    }
}

impl ContainerRoot {
    /// `None` if the leader has exited.
    fn open(leader: &ProcessHandle) -> io::Result<Option<Self>> {
        Ok(root_of(leader)?.map(Self::of))
    }

    fn of(root: OwnedFd) -> Self {
        let of_host = procfs::own_mounted_devices();
        Self { root, of_host }
    }

    /// Looks up a directory as in the container: links in it can't lead out of it, and those of `/proc` are not followed.
    fn directory(&self, path: &str) -> io::Result<OwnedFd> {
        /// How often to repeat a lookup during which something was renamed.
        const ATTEMPTS: usize = 8;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let open = || openat2(&self.root, path, flags, Mode::empty(), resolve);
        let mut found = open();
        for _ in 1..ATTEMPTS {
            if found.as_ref().err() != Some(&rustix::io::Errno::AGAIN) {
                break;
            }
            found = open();
        }
        Ok(found?)
    }

    fn is_own_tmpfs(&self, place: BorrowedFd<'_>) -> io::Result<bool> {
        /// `TMPFS_MAGIC` of `linux/magic.h`.
        const TMPFS: u64 = 0x0102_1994;
        self.is_own(place, TMPFS)
    }

    /// Whether this is on a file system of this kind that the container has alone. One that is mounted on the host too was bound there, or
    /// the container has no mounts of its own.
    fn is_own(&self, place: BorrowedFd<'_>, kind: u64) -> io::Result<bool> {
        if u64::try_from(fstatfs(place)?.f_type) != Ok(kind) {
            return Ok(false);
        }
        match &self.of_host {
            Ok(of_host) => Ok(!of_host.contains(&device_of(&fstat(place)?))),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

/// Major and minor number of the file system.
fn device_of(stat: &Stat) -> (u32, u32) {
    (major(stat.st_dev), minor(stat.st_dev))
}

/// One of the leader's namespaces, if it is neither this process's nor that of the host's init.
pub(super) fn own_namespace(leader: &ProcessHandle, kind: &str) -> io::Result<Option<File>> {
    let namespace = File::open(format!("/proc/{}/ns/{kind}", leader.process().pid))?;
    if has_exited(leader) {
        return Err(io::Error::other("the container has exited"));
    }
    let number = |stat: Stat| (stat.st_dev, stat.st_ino);
    let its = number(fstat(namespace.as_fd())?);
    let flags = rustix::fs::AtFlags::empty();
    let mine = number(rustix::fs::statat(
        CWD,
        format!("/proc/self/ns/{kind}"),
        flags,
    )?);
    // Not readable without privileges, and a process that can't read it can't enter a namespace either.
    let init = rustix::fs::statat(CWD, format!("/proc/1/ns/{kind}"), flags).map(number);
    Ok((its != mine && init != Ok(its)).then_some(namespace))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::path::Path;

    use super::*;
    use crate::container::TmpfsSizes;

    pub(super) fn this_process() -> ProcessHandle {
        ProcessHandle::open(nix::unistd::getpid().as_raw()).unwrap()
    }

    pub(super) fn root_at(path: &Path) -> ContainerRoot {
        ContainerRoot::of(File::open(path).unwrap().into())
    }

    fn inode(place: &OwnedFd) -> u64 {
        fstat(place).unwrap().st_ino
    }

    #[test]
    fn a_link_in_the_root_does_not_lead_to_the_host() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        let tree = scratch.path().join("tree");
        for directory in [&outside, &tree.join("dev"), &tree.join("real/shm")] {
            fs::create_dir_all(directory).unwrap();
        }
        // Exists on the host, and not in the tree.
        symlink("/usr", tree.join("tmp")).unwrap();
        symlink("../outside", tree.join("run")).unwrap();
        symlink("../../../../real/shm", tree.join("dev/shm")).unwrap();
        symlink("/proc/self/root", tree.join("magic")).unwrap();
        let root = root_at(&tree);
        for path in ["tmp", "run", "magic"] {
            let error = root.directory(path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path}: {error}");
        }
        let shm = fs::metadata(tree.join("real/shm")).unwrap().ino();
        assert_eq!(inode(&root.directory("dev/shm").unwrap()), shm);
    }

    #[test]
    fn a_magic_link_is_not_followed() {
        let error = root_at(Path::new("/proc/self"))
            .directory("root")
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP), "{error}");
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs a process that exits"
    )]
    #[test]
    fn a_leader_that_has_exited_has_no_root() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let leader = ProcessHandle::open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(ContainerRoot::open(&leader).unwrap().is_some());
        drop(child.stdin.take());
        assert!(leader.wait(Duration::from_secs(60)));
        assert!(ContainerRoot::open(&leader).unwrap().is_none());
        child.wait().unwrap();
    }

    /// Also where the host's own are temporary file systems.
    #[test]
    fn file_systems_of_the_host_keep_their_sizes() {
        let root = root_at(Path::new("/"));
        let blocks = || {
            ["/tmp", "/run", "/dev/shm"].map(|path| {
                let size = rustix::fs::statfs(path).map(|stat| stat.f_blocks);
                size.unwrap_or_default()
            })
        };
        let before = blocks();
        let size = Some(1 << 20);
        let sizes = TmpfsSizes {
            tmp: size,
            run: size,
            shm: size,
        };
        assert_eq!(tmpfs::resize(sizes, &root), Vec::<String>::new());
        assert_eq!(blocks(), before);
        for path in ["tmp", "run", "dev/shm"] {
            if let Ok(place) = root.directory(path) {
                assert!(!root.is_own_tmpfs(place.as_fd()).unwrap(), "{path}");
            }
        }
    }

    #[test]
    fn namespaces_of_this_process_are_not_the_containers_own() {
        for kind in ["ipc", "net", "uts"] {
            assert!(own_namespace(&this_process(), kind).unwrap().is_none());
        }
    }
}
