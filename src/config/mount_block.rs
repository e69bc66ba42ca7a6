//! Validates a `mount` block, which has the names and meanings of the docker driver's. The source is looked up by `sources`.

use crate::container::{Mount, MountIds, Restrictions, Tmpfs};

use super::ConfigError;
use super::mounts::{ids, mount_point};
use super::options::{BindOptions, MountOptions};
use super::sources::Sources;
use super::tmpfs;
use super::values::{self, BIND_PROPAGATION, Values, one_of};

/// What a block mounts.
#[derive(Debug)]
pub(super) enum Mounted {
    /// A directory or file of the host.
    Bind(Mount),
    /// A temporary file system.
    Tmpfs(Tmpfs),
}

#[derive(Debug, Clone, Copy)]
enum Type {
    Bind,
    Tmpfs,
}

const TYPE: &Values<Type> = &[("bind", Type::Bind), ("tmpfs", Type::Tmpfs)];

/// What the block mounts, with the task's own `idmap` and its memory limit in bytes.
pub(super) fn mounted(
    option: String,
    block: &MountOptions,
    sources: Sources<'_>,
    (task_ids, limit): (MountIds, Option<u64>),
) -> Result<Mounted, ConfigError> {
    let kind = kind(&format!("{option}.type"), &block.kind)?;
    if let Some(name) = misplaced(kind, block) {
        let reason = format!("can't be combined with the type {:?}", block.kind);
        return Err(ConfigError::new(format!("{option}.{name}"), reason));
    }
    match kind {
        Type::Bind => bind(option, block, sources, task_ids).map(Mounted::Bind),
        Type::Tmpfs => {
            tmpfs::of_block(option, block, restrictions(block), limit).map(Mounted::Tmpfs)
        }
    }
}

fn kind(option: &str, word: &str) -> Result<Type, ConfigError> {
    if word == "volume" {
        let reason = "\"volume\" is a volume that docker manages: use a volume block of the group and a volume_mount block of the task, or one of bind, tmpfs";
        return Err(ConfigError::new(option, reason));
    }
    one_of(option, word, TYPE)
}

/// The name of an option that is set but means nothing for this type.
fn misplaced(kind: Type, block: &MountOptions) -> Option<&'static str> {
    let set: &[(&str, bool)] = match kind {
        Type::Bind => &[("tmpfs_options", block.tmpfs_options.is_some())],
        Type::Tmpfs => &[
            ("source", block.source.is_some()),
            ("idmap", block.idmap.is_some()),
            ("create", block.create),
            ("bind_options", block.bind_options.is_some()),
        ],
    };
    set.iter().find(|(_, set)| *set).map(|(name, _)| *name)
}

fn bind(
    option: String,
    block: &MountOptions,
    sources: Sources<'_>,
    task_ids: MountIds,
) -> Result<Mount, ConfigError> {
    let at = |name: &str| format!("{option}.{name}");
    let Some(text) = &block.source else {
        return Err(ConfigError::new(
            at("source"),
            "is required for the type \"bind\"",
        ));
    };
    let (source, create) = match block.create {
        true => sources.bind_to_create(&at("source"), text)?,
        false => (sources.bind(&at("source"), text)?, false),
    };
    let given = block.bind_options.as_ref();
    let word = given.map_or("rprivate", |BindOptions { propagation }| propagation);
    Ok(Mount {
        source,
        create,
        target: mount_point(&at("target"), &block.target)?,
        read_only: block.read_only,
        restrictions: restrictions(block),
        propagation: values::propagation(&at("bind_options.propagation"), word, BIND_PROPAGATION)?,
        ids: block.idmap.map_or(task_ids, ids),
        overlay: None,
        option: Some(option),
    })
}

fn restrictions(block: &MountOptions) -> Restrictions {
    Restrictions {
        nosuid: block.nosuid,
        nodev: block.nodev,
        noexec: block.noexec,
    }
}
