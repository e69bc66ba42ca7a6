//! What a container gets of the host's files, and its temporary file systems.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A host directory or file mounted in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Absolute host path without links. It existed when it was checked, unless it is to be created.
    pub source: PathBuf,
    /// The source is a directory that did not exist when it was checked: whoever starts the container creates it and its missing
    /// parents, with mode 0755, and follows no link, because a task may have made one there since.
    pub create: bool,
    /// Absolute path in the container.
    pub target: PathBuf,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// What is ignored below the mount.
    pub restrictions: Restrictions,
    /// Which mounts made on the host later appear below it.
    pub propagation: Propagation,
    /// Whether its files have the same owners inside as on the host, although the ids of the container are shifted.
    pub ids: MountIds,
    /// The source is the topmost directory of an overlay, of which these are the other parts.
    pub overlay: Option<Overlay>,
    /// The option of the job that asks for it, for error messages. `None` is what Nomad or the driver adds.
    pub option: Option<String>,
}

impl Mount {
    /// A writable mount that nobody has asked for by an option.
    pub fn new(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            create: false,
            target: target.into(),
            read_only: false,
            restrictions: Restrictions::default(),
            propagation: Propagation::default(),
            ids: MountIds::default(),
            overlay: None,
            option: None,
        }
    }

    /// The same, read-only or not.
    pub fn with_read_only(self, read_only: bool) -> Self {
        Self { read_only, ..self }
    }
}

/// Several directories of the host that are mounted as one (overlayfs). The topmost one is the source of the mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The directories below the topmost one, each below the one before: absolute host paths without links, which existed when they were checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub below: Vec<PathBuf>,
    /// What becomes of changes.
    pub changes: Changes,
}

/// What becomes of changes in an overlay, whose directories stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Changes {
    /// There are none: the mount is read-only.
    Refused,
    /// They are in memory, and gone with the task.
    Discarded {
        /// The most they take, in bytes; `None` is the kernel's default: half of the host's memory.
        size: Option<u64>,
    },
    /// They are in this directory of the host.
    Kept {
        /// Absolute host path without links.
        directory: PathBuf,
        /// The same as [`Mount::create`], for this directory.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        create: bool,
    },
}

/// A temporary file system of the container, in memory and empty at the start. Its root belongs to the container's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Absolute path in the container.
    pub target: PathBuf,
    /// The most it holds, in bytes; `None` is the kernel's default: half of the host's memory.
    pub size: Option<u64>,
    /// The permissions of its root.
    pub mode: u32,
    /// Whether it is read-only.
    pub read_only: bool,
    /// What is ignored on it.
    pub restrictions: Restrictions,
    /// The option of the job that asks for it, for error messages.
    pub option: String,
}

/// What is ignored below a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restrictions {
    /// The set-user-ID bits and capabilities of programs.
    pub nosuid: bool,
    /// Device nodes.
    pub nodev: bool,
    /// The permission to execute programs.
    pub noexec: bool,
}

/// Which mounts made later below the source of a mount appear in the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// None.
    Private,
    /// Those of the host.
    #[default]
    HostToTask,
}

/// How the owners of files on a mount appear in a container with a user namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountIds {
    /// As on the host where the file system can do that. Otherwise they belong to nobody, and a note says so.
    #[default]
    MappedIfPossible,
    /// As on the host. The start is refused where that is not possible.
    Mapped,
    /// They belong to nobody.
    Unmapped,
}
