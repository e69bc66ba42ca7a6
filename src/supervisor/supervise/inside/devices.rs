//! Device nodes in the container's `/dev`, a temporary file system that systemd-nspawn has mounted for the container alone. Nodes of
//! the host that are bound there are never changed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags, chownat, fstat,
    fstatvfs, mkdirat, mknodat, openat, openat2,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::{ContainerRoot, refused};
use crate::container::{Cause, Device};
use crate::nspawn::refusal::cause_of_host_error;
use crate::supervisor::protocol::StartFailure;

/// What stays of a mode when a node is made: the permissions.
const PERMISSIONS: u32 = 0o777;

/// Makes the node of a device in the container whose leader has this pid. A node of the same device that exists is kept.
pub(super) fn make(device: &Device, root: &ContainerRoot, leader: i32) -> Result<(), StartFailure> {
    let named = match device.host == device.container {
        true => format!("device {}", device.host.display()),
        false => format!(
            "device {} as {}",
            device.host.display(),
            device.container.display()
        ),
    };
    let made = Node::of_host(&device.host)
        .and_then(|node| Ok((node, Owners::of(leader)?)))
        .and_then(|(node, owners)| {
            let (directory, name) = parent(&device.container, root, &owners)?;
            node.make_in(&directory, name, &owners)
        });
    made.map_err(|error| refused(error.cause, format!("{named}: {}", error.reason)))
}

/// Why a node could not be made.
#[derive(Debug)]
struct DeviceError {
    cause: Cause,
    reason: String,
}

impl DeviceError {
    /// Another attempt changes nothing.
    fn config(reason: impl Into<String>) -> Self {
        Self {
            cause: Cause::Config,
            reason: reason.into(),
        }
    }
}

impl From<io::Error> for DeviceError {
    fn from(error: io::Error) -> Self {
        Self {
            cause: cause_of_host_error(&error),
            reason: error.to_string(),
        }
    }
}

impl From<Errno> for DeviceError {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// Which ids of the host a container's ids are: the text of a `uid_map` or `gid_map`.
#[derive(Debug)]
pub(super) struct IdMap(Vec<[u32; 3]>);

impl IdMap {
    pub(super) fn parse(map: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split_ascii_whitespace().map(|word| word.parse().ok());
            Some([words.next()??, words.next()??, words.next()??])
        };
        Self(map.lines().filter_map(line).collect())
    }

    /// The host's id of the container's id 0.
    pub(super) fn root(&self) -> Option<u32> {
        let mut ranges = self.0.iter();
        ranges.find_map(|[inside, outside, _]| (*inside == 0).then_some(*outside))
    }

    /// Whether an id of the host is one in the container too.
    fn has(&self, id: u32) -> bool {
        let mut ranges = self.0.iter();
        ranges.any(|[_, outside, count]| {
            id.checked_sub(*outside)
                .is_some_and(|offset| offset < *count)
        })
    }
}

/// The ids of a container on the host.
struct Owners {
    root: Uid,
    root_group: Gid,
    groups: IdMap,
}

impl Owners {
    fn of(leader: i32) -> Result<Self, DeviceError> {
        let map = |name| fs::read_to_string(format!("/proc/{leader}/{name}"));
        let groups = IdMap::parse(&map("gid_map")?);
        let root = IdMap::parse(&map("uid_map")?).root();
        let (Some(root), Some(root_group)) = (root, groups.root()) else {
            return Err(DeviceError::config(
                "the container's root user has no id on the host",
            ));
        };
        Ok(Self {
            root: Uid::from_raw(root),
            root_group: Gid::from_raw(root_group),
            groups,
        })
    }

    /// The group of a node: that of the host's node if the container has it.
    fn group(&self, of_host: u32) -> Gid {
        match self.groups.has(of_host) {
            true => Gid::from_raw(of_host),
            false => self.root_group,
        }
    }
}

/// The directory of a node, and the node's name in it. Missing directories are made.
fn parent<'a>(
    path: &'a Path,
    root: &ContainerRoot,
    owners: &Owners,
) -> Result<(OwnedFd, &'a OsStr), DeviceError> {
    let below = path.strip_prefix("/dev").ok();
    let names: Option<Vec<_>> = below.and_then(|below| {
        let names = below.components().map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        names.collect()
    });
    let names = names.unwrap_or_default();
    let Some((name, parents)) = names.split_last() else {
        return Err(DeviceError::config(
            "its path in the container is not below /dev",
        ));
    };
    let mut directory = root.directory("dev")?;
    if !root.is_own_tmpfs(directory.as_fd())? {
        let reason = "/dev of the container is not the one that systemd-nspawn makes for it alone";
        return Err(DeviceError::config(reason));
    }
    if fstatvfs(&directory)?
        .f_flag
        .contains(StatVfsMountFlags::NODEV)
    {
        return Err(DeviceError::config(
            "/dev of the container is mounted nodev",
        ));
    }
    for parent in parents {
        directory = subdirectory(directory.as_fd(), parent, owners).map_err(|error| {
            match Errno::from_io_error(&error) {
                Some(Errno::XDEV) => of_part(parent, "is a mount of its own"),
                Some(Errno::LOOP) => of_part(parent, "is a symbolic link"),
                Some(Errno::NOTDIR) => of_part(parent, "is not a directory"),
                _ => error.into(),
            }
        })?;
    }
    Ok((directory, name))
}

fn of_part(name: &OsStr, what: &str) -> DeviceError {
    DeviceError::config(format!("{} in the container's /dev {what}", name.display()))
}

/// Opens a directory of the same file system, or makes it.
fn subdirectory(directory: BorrowedFd<'_>, name: &OsStr, owners: &Owners) -> io::Result<OwnedFd> {
    let open = || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(directory, name, flags, Mode::empty(), resolve)
    };
    match open() {
        Err(Errno::NOENT) => mkdirat(directory, name, Mode::from_raw_mode(0o755))?,
        other => return Ok(other?),
    }
    let made = open()?;
    own(made.as_fd(), owners.root, owners.root_group, 0o755)?;
    Ok(made)
}

/// A device node of the host.
struct Node {
    kind: FileType,
    device: u64,
    mode: u32,
    group: u32,
}

impl Node {
    fn of_host(path: &Path) -> Result<Self, DeviceError> {
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DeviceError::config("it does not exist on the host"));
            }
            other => other?,
        };
        let kind = match metadata.file_type() {
            kind if kind.is_char_device() => FileType::CharacterDevice,
            kind if kind.is_block_device() => FileType::BlockDevice,
            _ => return Err(DeviceError::config("it is not a device on the host")),
        };
        Ok(Self {
            kind,
            device: metadata.rdev(),
            mode: metadata.permissions().mode() & PERMISSIONS,
            group: metadata.gid(),
        })
    }

    fn is(&self, stat: &Stat) -> bool {
        (FileType::from_raw_mode(stat.st_mode), stat.st_rdev) == (self.kind, self.device)
    }

    /// Makes the node, or takes one that exists. Mode and owner are set only on the container's own file system: what is elsewhere
    /// is bound there, and may be the host's node.
    fn make_in(
        &self,
        directory: &OwnedFd,
        name: &OsStr,
        owners: &Owners,
    ) -> Result<(), DeviceError> {
        match mknodat(directory, name, self.kind, Mode::empty(), self.device) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = openat(directory, name, flags, Mode::empty())?;
        let stat = fstat(&node)?;
        if !self.is(&stat) {
            return Err(DeviceError::config(
                "its path in the container exists and is something else",
            ));
        }
        if stat.st_dev == fstat(directory)?.st_dev {
            own(
                node.as_fd(),
                owners.root,
                owners.group(self.group),
                self.mode,
            )?;
        }
        Ok(())
    }
}

/// Sets owner and mode of a file that is open as a path.
fn own(file: BorrowedFd<'_>, user: Uid, group: Gid, mode: u32) -> io::Result<()> {
    chownat(file, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::super::tests::root_at;
    use super::*;
    use rstest::rstest;

    fn refusal(host: &str, container: &str, root: &ContainerRoot) -> StartFailure {
        let device = Device {
            host: host.into(),
            container: container.into(),
            read: true,
            write: true,
            mknod: false,
        };
        make(&device, root, nix::unistd::getpid().as_raw()).unwrap_err()
    }

    #[rstest]
    #[case::missing("/dev/none", "/dev/x", "device /dev/none as /dev/x: it does not exist")]
    #[case::no_device("/proc/stat", "/dev/x", "it is not a device on the host")]
    #[case::elsewhere("/dev/null", "/etc/null", "is not below /dev")]
    #[case::itself("/dev/null", "/dev", "is not below /dev")]
    #[case::above("/dev/null", "/dev/../etc/null", "is not below /dev")]
    #[case::no_tmpfs(
        "/dev/null",
        "/dev/null",
        "device /dev/null: /dev of the container is not"
    )]
    fn a_device_that_can_t_be_made_is_refused(
        #[case] host: &str,
        #[case] container: &str,
        #[case] words: &str,
    ) {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("dev")).unwrap();
        let failure = refusal(host, container, &root_at(scratch.path()));
        assert!(failure.reason.contains(words), "{failure:?}");
        assert_eq!(failure.cause(), Cause::Config);
    }

    #[test]
    fn nothing_is_made_in_the_host_s_dev() {
        let failure = refusal("/dev/null", "/dev/nspawn-test", &root_at(Path::new("/")));
        assert!(
            failure.reason.contains("/dev of the container is not"),
            "{failure:?}"
        );
        assert!(!Path::new("/dev/nspawn-test").exists());
    }

    #[test]
    fn ids_are_mapped() {
        let private = IdMap::parse("         0 1400504320      65536\n");
        assert_eq!(private.root(), Some(1_400_504_320));
        for (id, is_mapped) in [(6, false), (1_400_504_320, true), (1_400_569_856, false)] {
            assert_eq!(private.has(id), is_mapped, "{id}");
        }
        let host = IdMap::parse("         0          0 4294967295\n");
        assert_eq!((host.root(), host.has(6)), (Some(0), true));
        assert_eq!(IdMap::parse("nonsense\n1 2\n").root(), None);
        assert_eq!(IdMap::parse("5 7 9\n").root(), None);
    }
}
