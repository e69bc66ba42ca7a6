//! The one way to look into a root file system. Images are untrusted: a link in one may lead to the host, a FIFO or a device may
//! have the name of a file, and a task can change its image while the driver reads it. So:
//!
//! - A path resolves as it does in the container: a link that begins with `/` starts at the root of the tree, and `..` does not go
//!   above it.
//! - Links are followed here, as text. The kernel gets paths without links, relative to a descriptor of the root, with flags by which
//!   it refuses any link ([`ResolveFlag::RESOLVE_NO_SYMLINKS`], which includes the magic links of `/proc`) and anything outside
//!   ([`ResolveFlag::RESOLVE_IN_ROOT`]): a directory that is exchanged for a link meanwhile is an error, not a way out.
//! - Everything is looked up with `O_PATH`, which opens no FIFO and no device. Only a regular file or a directory is then opened, and
//!   it is the one that was looked up.
//!
//! Writes nothing. Calls may block on the file system of the image.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::Mode;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

/// The directory in which systemd-nspawn makes the temporary copy of an ephemeral root: the parent of the root, or the
/// root itself where it is a mount point.
pub fn copy_place(root: &Path) -> PathBuf {
    let parent = root.parent().unwrap_or(root);
    match root.is_dir() && is_mount_point(root, parent) {
        true => root.to_owned(),
        false => parent.to_owned(),
    }
}

/// Whether something is mounted at a directory. Its device is no answer: a subvolume of btrfs has one of its own, and what is bound from the
/// same file system has not.
fn is_mount_point(directory: &Path, parent: &Path) -> bool {
    let about = statx(
        CWD,
        directory,
        AtFlags::STATX_DONT_SYNC,
        StatxFlags::BASIC_STATS,
    );
    let known = about.ok().and_then(|about| {
        let knows = about
            .stx_attributes_mask
            .contains(StatxAttributes::MOUNT_ROOT);
        knows.then(|| about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    });
    // Before Linux 5.8.
    let device = |path: &Path| path.metadata().map(|about| about.dev()).ok();
    known.unwrap_or_else(|| device(directory) != device(parent))
}

/// The number of links that the kernel follows.
const MAX_LINKS: usize = 40;

/// The root directory of a tree that is not trusted.
#[derive(Debug)]
pub struct RootDir(OwnedFd);

/// A file of any kind in a tree, looked up but not opened.
#[derive(Debug)]
pub struct Entry {
    found: File,
    metadata: Metadata,
}

/// The result of resolving a path in a tree.
#[derive(Debug)]
pub struct Resolved {
    /// The path below the root, without links and `..`.
    pub below: PathBuf,
    /// What is there, if anything.
    pub entry: Option<Entry>,
}

impl RootDir {
    /// The tree at this host path, which is trusted: links in it are followed. Fails if it is not a directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Not openat: a kernel without openat2 fails here, with its error, and not in every lookup.
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        Ok(Self(openat2(AT_FDCWD, path, how)?))
    }

    /// Resolves a path in the tree, whether it exists or not: what does not exist has no links, and `..` leaves it again. Fails
    /// where links form a loop, and where the file system fails.
    pub fn resolve(&self, path: &Path) -> io::Result<Resolved> {
        let mut below = PathBuf::new();
        // How many components at the end of `below` do not exist.
        let mut missing = 0_usize;
        let mut links = 0;
        let mut pending: VecDeque<OsString> = parts(path);
        while let Some(part) = pending.pop_front() {
            if part == ".." {
                below.pop();
                missing = missing.saturating_sub(1);
                continue;
            }
            let next = below.join(&part);
            let entry = match missing {
                0 => self.lookup(&next)?,
                _ => None,
            };
            let Some(link) = entry.as_ref().filter(|entry| entry.metadata.is_symlink()) else {
                missing += usize::from(entry.is_none());
                below = next;
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Err(nix::Error::ELOOP.into());
            }
            let target = link.link_target()?;
            if target.is_absolute() {
                below = PathBuf::new();
            }
            let mut before = parts(&target);
            before.append(&mut pending);
            pending = before;
        }
        let entry = match missing {
            0 => self.lookup(&below)?,
            _ => None,
        };
        Ok(Resolved { below, entry })
    }

    /// What is at a path of the tree, with links followed. `None` if nothing is there, or only links that form a loop. Fails if
    /// that can't be found out, for example because no descriptors are left.
    pub fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        match self.resolve(path) {
            Ok(found) => Ok(found.entry),
            Err(error) if error.raw_os_error() == Some(nix::Error::ELOOP as i32) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is at this path below the root, itself not followed if it is a link. `None` if nothing is there. The path has no `..`,
    /// and what it leads through is no link.
    pub fn lookup(&self, below: &Path) -> io::Result<Option<Entry>> {
        // The kernel does not accept an empty path.
        let path = match below.as_os_str().is_empty() {
            true => Path::new("."),
            false => below,
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let found = match openat2(&self.0, path, how) {
            Ok(found) => File::from(found),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = found.metadata()?;
        Ok(Some(Entry { found, metadata }))
    }
}

impl Entry {
    /// Its metadata, those of the link itself if it is one.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tree below this directory; `None` if it is not one.
    pub fn into_root(self) -> Option<RootDir> {
        self.metadata.is_dir().then(|| RootDir(self.found.into()))
    }

    /// Where a link leads, as written.
    pub fn link_target(&self) -> io::Result<PathBuf> {
        Ok(readlinkat(&self.found, "")?.into())
    }

    /// Opens a regular file for reading. Anything else is refused without being opened.
    pub fn open_file(&self) -> io::Result<File> {
        if !self.metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        // Opens the file that was looked up, whatever has its name now. Without O_NONBLOCK a task that holds a lease on it could
        // delay this.
        OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(self.by_descriptor())
    }

    /// The names in a directory, in no order, without `.` and `..`. Ends after the first error.
    pub fn names(&self) -> io::Result<impl Iterator<Item = io::Result<OsString>> + use<>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = openat(&self.found, ".", flags, Mode::empty())?;
        let mut entries = Dir::from_fd(opened)?.into_iter();
        let mut has_failed = false;
        // The directory stream repeats an error for ever.
        let until_error = std::iter::from_fn(move || {
            let entry = entries.next().filter(|_| !has_failed)?;
            has_failed = entry.is_err();
            Some(entry)
        });
        Ok(until_error.filter_map(|entry| match entry {
            Ok(entry) => match entry.file_name().to_bytes() {
                b"." | b".." => None,
                name => Some(Ok(OsStr::from_bytes(name).to_owned())),
            },
            Err(error) => Some(Err(error.into())),
        }))
    }

    /// A path of this very file for calls that take no descriptor, as long as the entry exists. Not for a link.
    pub fn by_descriptor(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.found.as_raw_fd()).into()
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rstest::rstest;

    use super::*;

    /// An image with links of all kinds, beside a file of the host with the content `host`.
    fn image() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("image");
        for directory in ["srv/data", "usr/lib", "etc"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(temp.path().join("secret"), "host").unwrap();
        fs::write(root.join("file"), "image").unwrap();
        for (name, target) in [
            ("abs", "/srv"),
            ("lib", "usr/lib"),
            ("gone", "/elsewhere/y"),
            ("up", "../../../.."),
            ("back", "usr/../file"),
            ("outside", "../secret"),
            ("a", "b"),
            ("b", "/a"),
            ("itself", "itself/x"),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        symlink(temp.path().join("secret"), root.join("secret")).unwrap();
        (temp, root)
    }

    #[rstest]
    #[case::plain("/srv/data", "srv/data", true)]
    #[case::missing("/srv/more/deep", "srv/more/deep", false)]
    #[case::absolute_link("/abs/data", "srv/data", true)]
    #[case::relative_link("/lib", "usr/lib", true)]
    #[case::dangling("/gone/x", "elsewhere/y/x", false)]
    #[case::dangling_itself("/gone", "elsewhere/y", false)]
    #[case::above_the_root("/../../up/srv", "srv", true)]
    #[case::parent_of_a_missing_directory("/no/../srv", "srv", true)]
    #[case::back_from_a_link("/lib/../../file", "file", true)]
    #[case::a_link_with_dots("back", "file", true)]
    #[case::below_a_file("/file/x", "file/x", false)]
    #[case::the_root("/", "", true)]
    #[case::a_relative_link_to_the_outside("outside", "secret", false)]
    fn a_path_stays_in_its_tree(#[case] path: &str, #[case] below: &str, #[case] exists: bool) {
        let (_temp, root) = image();
        // The last case ends at a link to a file of the host, by its absolute path.
        let below = match path {
            "outside" => root.with_file_name("secret"),
            _ => below.into(),
        };
        let below = below.strip_prefix("/").unwrap_or(&below);
        let found = RootDir::open(&root).unwrap().resolve(Path::new(path));
        let found = found.unwrap();
        assert_eq!(
            (found.below.as_path(), found.entry.is_some()),
            (below, exists)
        );
    }

    #[rstest]
    #[case("/a/x")]
    #[case("b")]
    #[case("itself")]
    fn links_in_a_circle_are_an_error(#[case] path: &str) {
        let (_temp, root) = image();
        let root = RootDir::open(&root).unwrap();
        let error = root.resolve(Path::new(path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP));
        assert!(root.entry(Path::new(path)).unwrap().is_none());
    }

    #[rstest]
    #[case::itself("file", Some("image"))]
    #[case::through_links("up/abs/../back", Some("image"))]
    #[case::of_the_host("secret", None)]
    #[case::beside_the_image("outside", None)]
    #[case::directory("etc", None)]
    #[case::fifo("fifo", None)]
    #[case::socket("socket", None)]
    #[case::link_to_a_fifo("to_fifo", None)]
    fn only_regular_files_of_the_image_are_opened(
        #[case] path: &str,
        #[case] content: Option<&str>,
    ) {
        let (_temp, root) = image();
        nix::unistd::mkfifo(&root.join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("/fifo", root.join("to_fifo")).unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();
        let root = RootDir::open(&root).unwrap();
        let found = root.entry(Path::new(path)).unwrap().and_then(|entry| {
            let mut text = String::new();
            entry.open_file().ok()?.read_to_string(&mut text).unwrap();
            Some(text)
        });
        assert_eq!(found.as_deref(), content);
    }

    #[test]
    fn a_device_is_not_opened() {
        let devices = RootDir::open(Path::new("/dev")).unwrap();
        let null = devices.entry(Path::new("null")).unwrap().unwrap();
        null.open_file().unwrap_err();
    }

    /// The kernel would follow them to the file itself, in whatever tree that is.
    #[test]
    fn magic_links_are_followed_as_text() {
        let root = RootDir::open(Path::new("/proc/self")).unwrap();
        let found = root.resolve(Path::new("root/etc")).unwrap();
        assert_eq!(found.below, Path::new("etc"));
        assert!(found.entry.is_none());
        let file = tempfile::tempfile().unwrap();
        let path = format!("fd/{}", file.as_raw_fd());
        assert!(root.entry(Path::new(&path)).unwrap().is_none());
    }

    /// As if a directory had been exchanged for a link after the path had been resolved.
    #[rstest]
    #[case("abs/data")]
    #[case("lib/x")]
    #[case("up/etc")]
    fn a_lookup_goes_through_no_link(#[case] below: &str) {
        let (_temp, root) = image();
        let root = RootDir::open(&root).unwrap();
        let error = root.lookup(Path::new(below)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP));
    }

    #[test]
    fn what_was_looked_up_is_opened_whatever_has_its_name_now() {
        let (_temp, path) = image();
        let root = RootDir::open(&path).unwrap();
        let entry = root.entry(Path::new("file")).unwrap().unwrap();
        fs::remove_file(path.join("file")).unwrap();
        symlink("../secret", path.join("file")).unwrap();
        let mut text = String::new();
        entry
            .open_file()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "image");
    }

    #[test]
    fn a_directory_lists_its_names() {
        let (_temp, root) = image();
        let root = RootDir::open(&root).unwrap();
        let names = |path: &str| {
            let entry = root.entry(Path::new(path)).unwrap().unwrap();
            let mut names: Vec<_> = entry.names()?.collect::<io::Result<_>>()?;
            names.sort();
            io::Result::Ok(names)
        };
        assert_eq!(names("usr").unwrap(), ["lib"]);
        assert_eq!(names("abs").unwrap(), ["data"]);
        names("file").unwrap_err();
    }

    #[test]
    fn a_root_is_a_directory() {
        let (_temp, root) = image();
        RootDir::open(&root.join("file")).unwrap_err();
        let tree = RootDir::open(&root).unwrap();
        assert!(
            tree.entry(Path::new("file"))
                .unwrap()
                .unwrap()
                .into_root()
                .is_none()
        );
        let inner = tree
            .entry(Path::new("usr"))
            .unwrap()
            .unwrap()
            .into_root()
            .unwrap();
        assert_eq!(
            inner.resolve(Path::new("/../lib")).unwrap().below,
            Path::new("lib")
        );
    }
}
