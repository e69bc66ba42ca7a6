//! Compares the targets of everything that is mounted in a container. Rejects two with the same one, and one that systemd-nspawn can't
//! create because it lies in another mount. Looks into the sources, but never through a link: where one leads is decided in the container.

use std::io;
use std::path::{Component, Path};

use crate::container::{Mount, Tmpfs};

use super::ConfigError;
use super::decode::quoted;

/// A path in the container that is taken.
#[derive(Debug, Clone, Copy)]
struct Target<'a> {
    path: &'a Path,
    /// The option that asks for it; `None` for Nomad's directories.
    option: Option<&'a str>,
    content: Content<'a>,
}

/// What is there.
#[derive(Debug, Clone, Copy)]
enum Content<'a> {
    Host(&'a Mount),
    Tmpfs { read_only: bool },
    Device,
}

impl Target<'_> {
    fn named(&self) -> String {
        self.option.map_or_else(
            || format!("Nomad's own directory {}", self.path.display()),
            str::to_owned,
        )
    }

    fn error(&self, reason: &str) -> ConfigError {
        let path = quoted(&self.path.to_string_lossy());
        ConfigError::new(self.named(), format!("the target {path} {reason}"))
    }
}

/// Returns the first conflict of two targets.
pub(super) fn check<'a>(
    mounts: &'a [Mount],
    tmpfs: &'a [Tmpfs],
    devices: impl Iterator<Item = (&'a str, &'a Path)>,
) -> Result<(), ConfigError> {
    let devices = devices.map(|(option, path)| Target {
        path,
        option: Some(option),
        content: Content::Device,
    });
    let all: Vec<_> = devices.chain(targets(mounts, tmpfs)).collect();
    for (index, target) in all.iter().enumerate() {
        if let Some(earlier) = all[..index].iter().find(|other| other.path == target.path) {
            return Err(target.error(&format!("is also that of {}", earlier.named())));
        }
    }
    for target in &all {
        let around = all
            .iter()
            .filter(|other| other.path != target.path && target.path.starts_with(other.path));
        // The innermost one.
        if let Some(around) = around.max_by_key(|other| other.path.components().count()) {
            check_below(target, around)?;
        }
    }
    Ok(())
}

/// Returns the first mount that would hide this directory, which systemd-nspawn fills before it mounts anything of the job, or that would lie in it.
pub(super) fn keep_visible(
    (directory, option): (&Path, &str),
    mounts: &[Mount],
    tmpfs: &[Tmpfs],
) -> Result<(), ConfigError> {
    let is_in_the_way = |target: &Target<'_>| {
        directory.starts_with(target.path) || target.path.starts_with(directory)
    };
    match targets(mounts, tmpfs).find(is_in_the_way) {
        None => Ok(()),
        Some(target) => Err(target.error(&format!(
            "can't be combined with {option}, whose files are in {}",
            quoted(&directory.to_string_lossy())
        ))),
    }
}

fn targets<'a>(mounts: &'a [Mount], tmpfs: &'a [Tmpfs]) -> impl Iterator<Item = Target<'a>> {
    let mounts = mounts.iter().map(|mount| Target {
        path: &mount.target,
        option: mount.option.as_deref(),
        content: Content::Host(mount),
    });
    let tmpfs = tmpfs.iter().map(|tmpfs| Target {
        path: &tmpfs.target,
        option: Some(&tmpfs.option),
        content: Content::Tmpfs {
            read_only: tmpfs.read_only,
        },
    });
    mounts.chain(tmpfs)
}

/// Whether the mount point of `target` exists in `around` or can be created there.
fn check_below(target: &Target<'_>, around: &Target<'_>) -> Result<(), ConfigError> {
    let name = around.named();
    match (around.content, target.content) {
        (Content::Device, _) | (_, Content::Device) | (Content::Tmpfs { read_only: false }, _) => {
            Ok(())
        }
        (Content::Tmpfs { read_only: true }, _) => Err(target.error(&format!(
            "can't be created in {name}, which is empty and read-only"
        ))),
        (Content::Host(mount), _) if mount.source.metadata().is_ok_and(|about| !about.is_dir()) => {
            Err(target.error(&format!("lies in {name}, which is a file")))
        }
        (Content::Host(mount), _) => {
            let rest = target.path.strip_prefix(around.path);
            let lacks =
                |rest: &&Path| mount.read_only && directories(mount).all(|at| lacks(at, rest));
            match rest.ok().filter(lacks) {
                None => Ok(()),
                Some(rest) => Err(target.error(&format!(
                    "can't be created in {name}, which is read-only: create {} on the host",
                    quoted(&mount.source.join(rest).to_string_lossy())
                ))),
            }
        }
    }
}

/// The directories of the host that are seen at the target of a mount.
fn directories(mount: &Mount) -> impl Iterator<Item = &Path> {
    let below = mount.overlay.iter().flat_map(|overlay| &overlay.below);
    std::iter::once(&*mount.source).chain(below.map(|directory| &**directory))
}

/// Whether nothing has this name below the directory.
fn lacks(directory: &Path, rest: &Path) -> bool {
    let mut path = directory.to_owned();
    for part in rest.components() {
        let Component::Normal(name) = part else {
            return false;
        };
        path.push(name);
        match path.symlink_metadata() {
            Ok(about) if about.is_symlink() => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
        }
    }
    false
}
