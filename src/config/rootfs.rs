//! Validates the options of the root file system, and that the image is one from which systemd-nspawn can start a container.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};

use crate::container::{Mode, Root, Rootfs, Users, Volatile};
use crate::nspawn::image_init::INITS;
use crate::rootfs_path::{Entry, RootDir, copy_place};

use super::decode::quoted;
use super::options::TaskOptions;
use super::paths::{Allocation, inside};
use super::values::{self, one_of};
use super::{ConfigError, ImageSearchPath};

const EPHEMERAL: &str = "config.ephemeral";
const IMAGE: &str = "config.image";
const PIVOT_ROOT: &str = "config.pivot_root";
pub(super) const VOLATILE: &str = "config.volatile";

const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];

/// The root file system as the options describe it, before the image is looked up.
pub(super) struct RootOptions {
    pub(super) volatile: Volatile,
    /// The directory of the image that becomes the root.
    pivot: Option<PathBuf>,
}

impl RootOptions {
    /// Checks the values of the options.
    pub(super) fn of(options: &TaskOptions) -> Result<Self, ConfigError> {
        let volatile = match &options.volatile {
            None => Volatile::No,
            Some(word) => one_of(VOLATILE, word, values::VOLATILE)?,
        };
        let pivot = options.pivot_root.as_deref().map(pivot_root).transpose()?;
        Ok(Self { volatile, pivot })
    }

    /// Looks up the image, and checks whether a container with this first process and these users can be started from it.
    pub(super) fn find(
        &self,
        options: &TaskOptions,
        (mode, users): (Mode, &Users),
        allocation: &Allocation,
        search_path: &ImageSearchPath,
    ) -> Result<Rootfs, ConfigError> {
        let source = source(&options.image, allocation, search_path)?;
        if options.ephemeral {
            copied_from(&source)?;
        }
        if let Root::Directory(path) = &source {
            if path == Path::new("/") && !options.ephemeral {
                check_host_root(self.volatile, users)?;
            }
            self.check_content(path, mode)?;
        }
        Ok(Rootfs {
            source,
            ephemeral: options.ephemeral,
            read_only: options.read_only,
            volatile: self.volatile,
            pivot_root: options.pivot_root.clone(),
        })
    }

    /// Rejects a directory that systemd-nspawn would reject as the root because of what it contains.
    fn check_content(&self, path: &Path, mode: Mode) -> Result<(), ConfigError> {
        let unreadable = |error: io::Error| {
            let path = quoted(&path.to_string_lossy());
            ConfigError::on_host(IMAGE, format!("{path} can't be examined: {error}"), &error)
        };
        let tree = RootDir::open(path).map_err(unreadable)?;
        let pivoted = self
            .pivot
            .as_ref()
            .map(|new| pivoted(&tree, new))
            .transpose()?;
        let (shown, top) = match &pivoted {
            None => (path.to_owned(), &tree),
            Some((below, top)) => (path.join(below), top),
        };
        if let Some(missing) = missing_os_files(top, mode).map_err(unreadable)? {
            return Err(no_operating_system(&shown, missing, mode));
        }
        let bin = tree.lookup(Path::new("bin")).map_err(unreadable)?;
        if self.volatile == Volatile::Yes && bin.is_some_and(|bin| bin.metadata().is_dir()) {
            let reason = "\"yes\" needs an image whose /bin is a symbolic link into /usr; use state or overlay";
            return Err(ConfigError::new(VOLATILE, reason));
        }
        Ok(())
    }
}

/// Checks `NEW[:OLD]` and returns `NEW`.
fn pivot_root(text: &str) -> Result<PathBuf, ConfigError> {
    let (new, old) = match text.split_once(':') {
        None => (text, None),
        Some((new, old)) => (new, Some(old)),
    };
    let new = inside(PIVOT_ROOT, new)?;
    if let Some(old) = old {
        // A further colon or a backslash has a different meaning wherever this value is parsed.
        if old.contains(':') || text.contains('\\') {
            let reason = format!("{} is not NEW or NEW:OLD", quoted(text));
            return Err(ConfigError::new(PIVOT_ROOT, reason));
        }
        if inside(PIVOT_ROOT, old)? == new {
            let reason = format!(
                "{} names the same path for the new and the old root",
                quoted(text)
            );
            return Err(ConfigError::new(PIVOT_ROOT, reason));
        }
    }
    Ok(new)
}

/// Looks up the image.
fn source(
    image: &str,
    allocation: &Allocation,
    search_path: &ImageSearchPath,
) -> Result<Root, ConfigError> {
    let path = allocation.image(IMAGE, image, search_path)?;
    let kind = path
        .metadata()
        .map_err(|error| {
            let reason = format!("{} can't be examined: {error}", quoted(image));
            ConfigError::on_host(IMAGE, reason, &error)
        })?
        .file_type();
    if kind.is_dir() {
        Ok(Root::Directory(path))
    } else if kind.is_file() || kind.is_block_device() {
        Ok(Root::Image(path))
    } else {
        let reason = format!(
            "{} is neither a directory nor a disk image nor a block device",
            quoted(image)
        );
        Err(ConfigError::new(IMAGE, reason))
    }
}

/// Checks that the copy of an ephemeral root can be written where systemd-nspawn makes it.
fn copied_from(root: &Root) -> Result<(), ConfigError> {
    let (Root::Directory(path) | Root::Image(path)) = root;
    let place = copy_place(path);
    let is_read_only =
        |found: nix::sys::statvfs::Statvfs| found.flags().contains(FsFlags::ST_RDONLY);
    // If the file system can't be queried, leave it to systemd-nspawn to reject it.
    if !statvfs(&place).is_ok_and(is_read_only) {
        return Ok(());
    }
    let shown = |path: &Path| quoted(&path.to_string_lossy());
    let reason = format!(
        "true can't be used with the image {}: its copy is made in {}, which is mounted read-only; mount it writable, or set \
         config.volatile = \"overlay\" in place of config.ephemeral",
        shown(path),
        shown(&place)
    );
    Err(ConfigError::new(EPHEMERAL, reason))
}

/// Rejects the host's own root where systemd-nspawn would change it.
fn check_host_root(volatile: Volatile, users: &Users) -> Result<(), ConfigError> {
    let reason = if !matches!(volatile, Volatile::Yes | Volatile::State) {
        "\"/\" needs config.ephemeral = true, or config.volatile yes or state"
    } else if *users != Users::Host {
        // A file system that the whole host uses can't get an id mapping.
        "\"/\" can't be used in a user namespace: set config.user_namespacing = false"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(IMAGE, reason))
}

fn no_operating_system(shown: &Path, missing: &str, mode: Mode) -> ConfigError {
    let hint = match mode {
        Mode::Boot => "; to run a command instead of an init, set config.boot = false",
        Mode::ProcessTwo | Mode::Plain => "",
    };
    let shown = quoted(&shown.to_string_lossy());
    let reason = format!("{shown} contains no operating system: it lacks {missing}{hint}");
    ConfigError::new(IMAGE, reason)
}

/// The directory of the image that becomes the root, by its path below the image's.
fn pivoted(tree: &RootDir, new: &Path) -> Result<(PathBuf, RootDir), ConfigError> {
    let shown = quoted(&new.to_string_lossy());
    let found = tree.resolve(new).map_err(|error| {
        let reason = format!("{shown} can't be examined in the image: {error}");
        ConfigError::on_host(PIVOT_ROOT, reason, &error)
    })?;
    let directory = found.entry.and_then(Entry::into_root);
    directory.map(|root| (found.below, root)).ok_or_else(|| {
        let reason = format!("{shown} is not a directory of the image");
        ConfigError::new(PIVOT_ROOT, reason)
    })
}

/// The first thing that the tree lacks to be started in this mode. Fails if that can't be found out.
fn missing_os_files(root: &RootDir, mode: Mode) -> io::Result<Option<&'static str>> {
    Ok(match mode {
        Mode::Plain | Mode::ProcessTwo => {
            let usr = root.entry(Path::new("usr"))?;
            let exists = usr.is_some_and(|found| found.metadata().is_dir());
            (!exists).then_some("the directory usr")
        }
        Mode::Boot if !has_one_of(root, &OS_RELEASE)? => {
            Some("etc/os-release and usr/lib/os-release")
        }
        Mode::Boot if !has_one_of(root, &INITS)? => {
            Some("an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init)")
        }
        Mode::Boot => None,
    })
}

/// Whether at least one of these regular files exists.
fn has_one_of(root: &RootDir, files: &[&str]) -> io::Result<bool> {
    for file in files {
        let found = root.entry(Path::new(file))?;
        if found.is_some_and(|found| found.metadata().is_file()) {
            return Ok(true);
        }
    }
    Ok(false)
}
