//! Validates an `overlay` block. The directories are looked up by `sources`.

use std::path::{Path, PathBuf};

use crate::container::{Changes, Mount, Overlay, Propagation, Restrictions};

use super::ConfigError;
use super::decode::quoted;
use super::mounts::{ids, mount_point};
use super::options::OverlayOptions;
use super::resources::tmpfs_size;
use super::sources::Sources;

/// The most directories of one overlay: the kernel takes their names in one page of memory.
const MOST: usize = 64;

/// What of the task an overlay depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfTask {
    pub(super) idmap: bool,
    pub(super) user_namespace: bool,
    /// The memory limit, in bytes.
    pub(super) limit: Option<u64>,
}

/// A directory of the host, and the option that names it.
type Named = (String, PathBuf);

/// What the block mounts.
pub(super) fn overlay(
    option: &str,
    block: &OverlayOptions,
    sources: Sources<'_>,
    task: OfTask,
) -> Result<Mount, ConfigError> {
    let at = |name: &str| format!("{option}.{name}");
    if let Some((name, other)) = misplaced(block) {
        let reason = format!("can't be combined with {other}");
        return Err(ConfigError::new(at(name), reason));
    }
    let idmap = block.idmap.unwrap_or(task.idmap);
    if block.upper.is_some() && task.user_namespace && !idmap {
        let reason = "can't be combined with idmap = false in a user namespace: what is kept would belong to nobody. Remove one of the two, or set \
                      config.user_namespacing = false";
        return Err(ConfigError::new(at("upper"), reason));
    }
    let lower = lower(&at("lower"), &block.lower, sources)?;
    let changes = changes(at, block, sources, task.limit)?;
    let mut directories: Vec<Named> = lower.clone();
    directories.extend(kept(&changes).map(|directory| (at("upper"), directory.clone())));
    refuse_nested(&directories)?;
    let mut paths = lower.into_iter().map(|(_, path)| path);
    let source = paths.next().unwrap_or_default();
    let below: Vec<_> = paths.collect();
    // The kernel makes no overlay of one directory alone. A bind is the same.
    let is_bind = below.is_empty() && changes == Changes::Refused;
    Ok(Mount {
        read_only: block.read_only,
        restrictions: Restrictions {
            nosuid: block.nosuid,
            nodev: block.nodev,
            noexec: block.noexec,
        },
        propagation: Propagation::Private,
        ids: ids(idmap),
        overlay: (!is_bind).then_some(Overlay { below, changes }),
        option: Some(option.to_owned()),
        ..Mount::new(source, mount_point(&at("target"), &block.target)?)
    })
}

/// The name of an option that is set but means nothing with another one, and that one.
fn misplaced(block: &OverlayOptions) -> Option<(&'static str, &'static str)> {
    let (upper, size) = (block.upper.is_some(), block.size.is_some());
    let pairs = [
        (upper && block.read_only, ("upper", "readonly = true")),
        (size && block.read_only, ("size", "readonly = true")),
        (
            size && upper,
            ("size", "upper, whose file system is the limit"),
        ),
        (
            block.create && !upper,
            ("create", "an overlay without upper"),
        ),
    ];
    pairs
        .into_iter()
        .find(|(set, _)| *set)
        .map(|(_, pair)| pair)
}

fn lower(option: &str, texts: &[String], sources: Sources<'_>) -> Result<Vec<Named>, ConfigError> {
    if texts.is_empty() || texts.len() > MOST {
        let reason = format!("has {} directories: name 1 to {MOST}", texts.len());
        return Err(ConfigError::new(option, reason));
    }
    let named = texts.iter().enumerate().map(|(index, text)| {
        let option = format!("{option}[{index}]");
        let path = sources.bind(&option, text)?;
        directory(&option, text, &path)?;
        Ok((option, path))
    });
    named.collect()
}

fn directory(option: &str, text: &str, path: &Path) -> Result<(), ConfigError> {
    match path.metadata() {
        Ok(about) if !about.is_dir() => {
            let reason = format!("{} is not a directory", quoted(text));
            Err(ConfigError::new(option, reason))
        }
        _ => Ok(()),
    }
}

/// What becomes of changes.
fn changes(
    at: impl Fn(&str) -> String,
    block: &OverlayOptions,
    sources: Sources<'_>,
    limit: Option<u64>,
) -> Result<Changes, ConfigError> {
    let Some(text) = &block.upper else {
        let size = block.size.as_ref();
        let size = size.map(|size| tmpfs_size(&at("size"), size, limit));
        return Ok(match block.read_only {
            true => Changes::Refused,
            false => Changes::Discarded {
                size: size.transpose()?.or_else(|| limit.map(|limit| limit / 2)),
            },
        });
    };
    let option = at("upper");
    let (path, create) = match block.create {
        true => sources.bind_to_create(&option, text)?,
        false => (sources.bind(&option, text)?, false),
    };
    directory(&option, text, &path)?;
    Ok(Changes::Kept {
        directory: path,
        create,
    })
}

/// Refuses two overlays that keep their changes in one directory.
pub(super) fn refuse_shared(mounts: &[Mount]) -> Result<(), ConfigError> {
    let named = mounts.iter().filter_map(|mount| {
        let directory = kept(&mount.overlay.as_ref()?.changes)?;
        Some((
            format!("{}.upper", mount.option.as_ref()?),
            directory.clone(),
        ))
    });
    refuse_nested(&named.collect::<Vec<_>>())
}

fn kept(changes: &Changes) -> Option<&PathBuf> {
    match changes {
        Changes::Kept { directory, .. } => Some(directory),
        Changes::Refused | Changes::Discarded { .. } => None,
    }
}

/// The kernel refuses an overlay in which one directory would be seen in another.
fn refuse_nested(directories: &[Named]) -> Result<(), ConfigError> {
    for (index, (option, path)) in directories.iter().enumerate() {
        for (other, earlier) in &directories[..index] {
            let fault = match (path == earlier, path.starts_with(earlier)) {
                (true, _) => "is the same directory as that of",
                (false, true) => "lies in the directory of",
                (false, false) if earlier.starts_with(path) => "contains the directory of",
                (false, false) => continue,
            };
            let path = quoted(&path.to_string_lossy());
            return Err(ConfigError::new(option, format!("{path} {fault} {other}")));
        }
    }
    Ok(())
}
