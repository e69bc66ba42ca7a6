//! Builds a skeleton root directory with the mount points that an image lacks. systemd-nspawn creates missing mount
//! points in the image, and fails if the root is read-only. In that case a skeleton replaces the image: empty
//! directories and links as in the image, with the image's own directories bind-mounted over them, read-only, and the
//! missing mount points between them. Nothing is ever written into the image or through a link: images are untrusted,
//! and a link in one may point to the host.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _, PermissionsExt, fchown, symlink};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};

use crate::container::{Mount, Root, Rootfs, Tmpfs, Volatile};
use crate::rootfs_path::RootDir;

/// An os-release file is a few hundred bytes long.
const OS_RELEASE_MAX: u64 = 64 * 1024;

/// A mount point that the image lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// The path below the root, with the image's links resolved.
    below: PathBuf,
    /// Whether the mount point is a file rather than a directory.
    file: bool,
}

/// The mount points that the image lacks, if the root will not be writable: those of mounts, and the directories that
/// systemd-nspawn itself mounts over. If the result is empty, the image can be used as it is. Fails if the image can't be
/// examined.
pub fn missing_mount_points(
    rootfs: &Rootfs,
    mounts: &[Mount],
    tmpfs: &[Tmpfs],
) -> io::Result<Vec<MountPoint>> {
    let Root::Directory(image) = &rootfs.source else {
        return Ok(Vec::new());
    };
    if !rootfs.read_only && rootfs.volatile != Volatile::State {
        return Ok(Vec::new());
    }
    let tree = RootDir::open(image)?;
    let is_mounted_over = |below: &Path| mounted_over(rootfs.volatile, below).is_some();
    let mut found = Vec::new();
    let of_mounts = mounts
        .iter()
        .map(|mount| (&mount.target, mount.source.is_file()));
    let of_tmpfs = tmpfs.iter().map(|tmpfs| (&tmpfs.target, false));
    for (target, file) in of_mounts.chain(of_tmpfs) {
        let below = missing(&tree, target)?;
        let below =
            below.filter(|below| !is_mounted_over(below_root(target)) && !is_mounted_over(below));
        found.extend(below.map(|below| MountPoint { below, file }));
    }
    for name in always_mounted(rootfs.volatile) {
        let below = missing(&tree, Path::new(name))?;
        found.extend(below.map(|below| MountPoint { below, file: false }));
    }
    Ok(found)
}

/// Where a path of the tree leads, if nothing is there. Not for a loop of links, which systemd-nspawn reports.
fn missing(tree: &RootDir, target: &Path) -> io::Result<Option<PathBuf>> {
    match tree.resolve(target) {
        Ok(resolved) => Ok(resolved.entry.is_none().then_some(resolved.below)),
        Err(error) if error.raw_os_error() == Some(nix::Error::ELOOP as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Directories over which systemd-nspawn mounts its own in every container, so that the image's are not visible.
fn always_mounted(volatile: Volatile) -> impl Iterator<Item = &'static str> {
    let var = (volatile == Volatile::State).then_some("var");
    ["dev", "proc", "run", "sys", "tmp"].into_iter().chain(var)
}

/// The one of these directories that a path lies in.
fn mounted_over(volatile: Volatile, below: &Path) -> Option<&'static str> {
    always_mounted(volatile).find(|name| below.starts_with(name))
}

/// Builds the skeleton of `image` in the empty directory `skeleton`, with the mount points that the image lacks.
/// Returns the binds that have to be mounted before any others.
pub fn build(
    image: &Path,
    skeleton: &Path,
    missing: &[MountPoint],
    volatile: Volatile,
) -> io::Result<Vec<Mount>> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut builder = Skeleton {
        tree: RootDir::open(image)?,
        made: open(skeleton, directory, Mode::empty())?,
        image,
        skeleton,
        missing,
        volatile,
        binds: Vec::new(),
    };
    // Its owner decides about the range of ids.
    if let Some(top) = builder.tree.lookup(Path::new(""))? {
        make_like(skeleton, top.metadata())?;
    }
    builder.directory(Path::new(""))?;
    for point in missing {
        match (point.file, point.below.file_name(), point.below.parent()) {
            (true, Some(name), Some(parent)) => {
                builder.file(parent, name)?;
            }
            _ => {
                builder.inner_directory(&point.below)?;
            }
        }
    }
    builder.os_release()?;
    Ok(builder.binds)
}

struct Skeleton<'a> {
    tree: RootDir,
    made: OwnedFd,
    image: &'a Path,
    skeleton: &'a Path,
    missing: &'a [MountPoint],
    volatile: Volatile,
    binds: Vec<Mount>,
}

impl Skeleton<'_> {
    /// Recreates one directory of the image: each entry is bind-mounted whole, unless a mount point is missing below
    /// it.
    fn directory(&mut self, below: &Path) -> io::Result<()> {
        let Some(directory) = self.tree.lookup(below)? else {
            return Err(io::ErrorKind::NotFound.into());
        };
        for name in directory.names()? {
            let inner = below.join(name?);
            // An entry that has been removed meanwhile is left out.
            let Some(entry) = self.tree.lookup(&inner)? else {
                continue;
            };
            let about = entry.metadata();
            let made = self.skeleton.join(&inner);
            if about.is_symlink() {
                symlink(entry.link_target()?, &made)?;
            } else if below.as_os_str().is_empty() && mounted_over(self.volatile, &inner).is_some()
            {
                make_like(&made, about)?;
            } else if about.is_dir() {
                make_like(&made, about)?;
                if self
                    .missing
                    .iter()
                    .any(|point| point.below.starts_with(&inner))
                {
                    self.directory(&inner)?;
                } else {
                    self.bind(&inner);
                }
            } else if about.is_file() {
                self.file(below, inner.file_name().unwrap_or_default())?;
                self.bind(&inner);
            }
        }
        Ok(())
    }

    fn bind(&mut self, inner: &Path) {
        self.binds.push(
            Mount::new(self.image.join(inner), Path::new("/").join(inner)).with_read_only(true),
        );
    }

    /// systemd-nspawn does not boot a tree without an os-release file, and checks before it mounts anything.
    fn os_release(&self) -> io::Result<()> {
        let known = ["etc/os-release", "usr/lib/os-release"];
        let texts = known.iter().map(|name| self.text(name));
        let Some(text) = texts.filter_map(Result::transpose).next().transpose()? else {
            return Ok(());
        };
        let skeleton = RootDir::open(self.skeleton)?;
        let Ok(place) = skeleton.resolve(Path::new("usr/lib/os-release")) else {
            return Ok(());
        };
        let (Some(parent), Some(name)) = (place.below.parent(), place.below.file_name()) else {
            return Ok(());
        };
        match self.file(parent, name)? {
            Some(mut file) => file.write_all(&text),
            None => Ok(()),
        }
    }

    /// The content of a file of the image, cut off after 64 KiB; `None` if it is missing or not a regular file.
    fn text(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let failed = |error: io::Error| {
            let text = format!("the image's {name} can't be read: {error}");
            io::Error::new(error.kind(), text)
        };
        let entry = self.tree.entry(Path::new(name)).map_err(failed)?;
        let Some(entry) = entry.filter(|entry| entry.metadata().is_file()) else {
            return Ok(None);
        };
        let mut text = Vec::new();
        let file = entry.open_file().map_err(failed)?;
        file.take(OS_RELEASE_MAX)
            .read_to_end(&mut text)
            .map_err(failed)?;
        Ok(Some(text))
    }

    /// Opens a directory of the skeleton, creating it and its parents where they are missing.
    fn inner_directory(&self, below: &Path) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at = self.made.try_clone()?;
        for part in below.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at = openat(&at, name, flags, Mode::empty())?;
        }
        Ok(at)
    }

    /// Creates an empty file in the skeleton; `None` if something exists there already.
    fn file(&self, parent: &Path, name: &OsStr) -> io::Result<Option<File>> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let directory = self.inner_directory(parent)?;
        let mode = Mode::from_bits_truncate(0o644);
        match openat(directory.as_fd(), name, flags, mode) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(nix::Error::EEXIST) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Creates a directory with the mode and owner of another one.
fn make_like(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // The image can change while it is read, and a directory of it can have had the name of a link before.
    let created = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
        .open(path)?;
    fchown(&created, Some(like.uid()), Some(like.gid()))?;
    created.set_permissions(fs::Permissions::from_mode(like.mode() & 0o7777))
}

/// The path relative to the root. `config` accepts only plain absolute paths; anything else could leave the root.
fn below_root(path: &Path) -> &Path {
    let mut components = path.components();
    if components.clone().next() == Some(Component::RootDir) {
        components.next();
    }
    components.as_path()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{ContainerSpec, Restrictions};

    fn mount(target: &str, source: &Path) -> Mount {
        Mount::new(source, target)
    }

    fn point(below: &str, file: bool) -> MountPoint {
        MountPoint {
            below: below.into(),
            file,
        }
    }

    /// The root file system of a read-only container with this image.
    fn read_only(image: &Path) -> Rootfs {
        ContainerSpec::for_test("web", image)
            .with(|spec| spec.rootfs.read_only = true)
            .rootfs
    }

    struct Resolved {
        _temp: tempfile::TempDir,
        image: PathBuf,
        skeleton: PathBuf,
        /// A directory of the host that no image may reach.
        host: PathBuf,
    }

    impl Resolved {
        /// Builds the skeleton with this one missing mount point.
        fn with(&self, below: &str) -> io::Result<Vec<Mount>> {
            let missing = [point(below, false)];
            build(&self.image, &self.skeleton, &missing, Volatile::No)
        }

        fn os_release(&self) -> String {
            fs::read_to_string(self.skeleton.join("usr/lib/os-release")).unwrap()
        }
    }

    fn place(directories: &[&str]) -> Resolved {
        let temp = tempfile::tempdir().unwrap();
        let [image, skeleton, host] =
            ["image", "skeleton", "host"].map(|name| temp.path().join(name));
        for directory in directories {
            fs::create_dir_all(image.join(directory)).unwrap();
        }
        fs::create_dir(&skeleton).unwrap();
        fs::create_dir(&host).unwrap();
        Resolved {
            _temp: temp,
            image,
            skeleton,
            host,
        }
    }

    #[test]
    fn missing_mount_points_are_added_to_the_images_directories() {
        let place = place(&["usr/bin", "etc", "srv/data", "proc", "tmp"]);
        let (image, target) = (&place.image, &place.skeleton);
        fs::write(image.join("usr/bin/sh"), "").unwrap();
        fs::write(image.join("note"), "").unwrap();
        symlink("usr/bin", image.join("bin")).unwrap();
        let mounts = [
            mount("/alloc", image),
            mount("/srv/more/deep", image),
            mount("/etc-file", &image.join("note")),
            mount("/tmp/new", image),
            mount("/srv/data", image),
        ];
        let tmpfs = [Tmpfs {
            target: "/srv/tmp".into(),
            size: None,
            mode: 0o1777,
            read_only: false,
            restrictions: Restrictions::default(),
            option: "config.tmpfs[0]".to_owned(),
        }];
        let missing = missing_mount_points(&read_only(image), &mounts, &tmpfs).unwrap();
        let wanted = [
            ("alloc", false),
            ("srv/more/deep", false),
            ("etc-file", true),
            ("srv/tmp", false),
            ("dev", false),
            ("run", false),
            ("sys", false),
        ];
        assert_eq!(missing, wanted.map(|(below, file)| point(below, file)));
        let binds = build(image, target, &missing, Volatile::No).unwrap();
        let mut targets: Vec<_> = binds
            .iter()
            .map(|bind| bind.target.to_str().unwrap())
            .collect();
        targets.sort_unstable();
        assert_eq!(targets, ["/etc", "/note", "/srv/data", "/usr"]);
        assert!(
            binds
                .iter()
                .all(|bind| bind.read_only && bind.source.starts_with(image))
        );
        for directory in ["alloc", "srv/more/deep", "srv/data", "usr", "proc"] {
            assert!(target.join(directory).is_dir(), "{directory}");
        }
        assert!(target.join("etc-file").is_file());
        assert!(!target.join("usr/lib/os-release").exists());
        assert_eq!(
            fs::read_link(target.join("bin")).unwrap(),
            Path::new("usr/bin")
        );
        assert!(!image.join("alloc").exists(), "the image was written");
    }

    #[test]
    fn an_os_release_is_seen_before_anything_is_mounted() {
        let place = place(&["usr/lib"]);
        fs::write(place.image.join("usr/lib/os-release"), "ID=x\n").unwrap();
        place.with("alloc").unwrap();
        assert_eq!(place.os_release(), "ID=x\n");
    }

    #[test]
    fn a_mount_point_behind_a_link_is_created_at_the_links_target_in_the_image() {
        let place = place(&["usr/lib", "tmp", "proc", "dev", "sys", "run"]);
        symlink("usr/lib", place.image.join("lib")).unwrap();
        symlink("/elsewhere/../other", place.image.join("data")).unwrap();
        symlink("/run", place.image.join("var-run")).unwrap();
        let mounts =
            ["/lib/new", "/data/x", "/var-run/new"].map(|target| mount(target, &place.image));
        let missing = missing_mount_points(&read_only(&place.image), &mounts, &[]).unwrap();
        let wanted = ["usr/lib/new", "other/x"];
        assert_eq!(missing, wanted.map(|below| point(below, false)));
        build(&place.image, &place.skeleton, &missing, Volatile::No).unwrap();
        for directory in wanted {
            assert!(place.skeleton.join(directory).is_dir(), "{directory}");
        }
    }

    #[test]
    fn no_link_of_an_image_leads_to_the_host() {
        let place = place(&["etc"]);
        let secret = place.host.join("secret");
        fs::write(&secret, "PASSWORD=x\n").unwrap();
        fs::create_dir(place.host.join("lib")).unwrap();
        symlink(&secret, place.image.join("etc/os-release")).unwrap();
        symlink(&place.host, place.image.join("usr")).unwrap();
        // A file that following the link would write.
        symlink(place.host.join("victim"), place.host.join("lib/os-release")).unwrap();
        place.with("alloc").unwrap();
        assert!(!place.host.join("victim").exists());
        let skeleton = RootDir::open(&place.skeleton).unwrap();
        let found = skeleton.entry(Path::new("usr/lib/os-release"));
        assert!(
            found.unwrap().is_none(),
            "nothing of the host is an os-release"
        );
    }

    #[test]
    fn a_link_in_place_of_a_directory_is_not_changed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = temp.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o700)).unwrap();
        symlink(&outside, temp.path().join("link")).unwrap();
        let like = fs::metadata("/").unwrap();
        make_like(&temp.path().join("link"), &like).unwrap_err();
        assert_eq!(fs::metadata(&outside).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_fifo_as_os_release_does_not_block() {
        let place = place(&["etc", "usr/lib"]);
        let fifo = place.image.join("etc/os-release");
        nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o644)).unwrap();
        fs::write(place.image.join("usr/lib/os-release"), "ID=x\n").unwrap();
        place.with("alloc").unwrap();
        assert_eq!(place.os_release(), "ID=x\n");
    }

    #[test]
    fn an_os_release_that_cannot_be_read_is_not_taken_for_missing() {
        let place = place(&["etc", "usr/lib"]);
        // The kernel refuses to look up a name of this length.
        symlink("x".repeat(256), place.image.join("etc/os-release")).unwrap();
        fs::write(place.image.join("usr/lib/os-release"), "ID=x\n").unwrap();
        let error = place.with("alloc").unwrap_err().to_string();
        assert!(error.starts_with("the image's etc/os-release"), "{error}");
    }

    #[test]
    fn a_link_that_replaces_a_directory_is_not_followed() {
        let place = place(&["srv"]);
        symlink(&place.host, place.image.join("data")).unwrap();
        // As if it had been a directory when the mount points were determined.
        let error = place.with("data/x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTDIR), "{error}");
        assert!(fs::read_dir(&place.host).unwrap().next().is_none());
    }
}
