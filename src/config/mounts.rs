//! What is mounted into a container: Nomad's own directories, then volumes, then the job's binds, its `mount` blocks, its
//! `overlay` blocks and its temporary file systems. The host's side is in `sources`, the options of a block in `mount_block` and `overlay_block`;
//! `mount_targets` compares the targets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::container::{Mount, MountIds, Propagation, Tmpfs};

use super::decode::{entry, quoted};
use super::mount_block::{self, Mounted};
use super::options::TaskOptions;
use super::overlay_block::OfTask;
use super::paths::inside;
use super::resources::ResourceOptions;
use super::sources::Sources;
use super::values::{self, BIND_OPTIONS};
use super::{ConfigError, TaskContext, mount_targets, overlay_block, tmpfs};

/// All mounts, in the order of this module's description, and all temporary file systems.
pub(super) fn mounts(
    options: &TaskOptions,
    context: &TaskContext,
    sources: Sources<'_>,
    resources: &ResourceOptions,
) -> Result<(Vec<Mount>, Vec<Tmpfs>), ConfigError> {
    let visible = sources
        .visible_dirs()
        .map(|(source, target)| Mount::new(source, target));
    let mut mounts = visible.to_vec();
    let ids = ids(options.idmap);
    volumes(&mut mounts, context, sources, ids)?;
    for (name, map, read_only) in [
        ("config.bind", &options.bind, false),
        ("config.bind_read_only", &options.bind_read_only, true),
    ] {
        binds(&mut mounts, (name, map.as_ref(), read_only), sources, ids)?;
    }
    let limit = resources.memory_limit();
    let mut temporary = Vec::new();
    for (index, block) in options.mount.iter().flatten().enumerate() {
        let option = format!("config.mount[{index}]");
        match mount_block::mounted(option, block, sources, (ids, limit))? {
            Mounted::Bind(mount) => mounts.push(mount),
            Mounted::Tmpfs(tmpfs) => temporary.push(tmpfs),
        }
    }
    for (index, block) in options.overlay.iter().flatten().enumerate() {
        let option = format!("config.overlay[{index}]");
        let of_task = OfTask {
            idmap: options.idmap,
            user_namespace: options.user_namespacing,
            limit,
        };
        mounts.push(overlay_block::overlay(&option, block, sources, of_task)?);
    }
    overlay_block::refuse_shared(&mounts)?;
    for (index, text) in options.tmpfs.iter().flatten().enumerate() {
        temporary.push(tmpfs::of_text(
            format!("config.tmpfs[{index}]"),
            text,
            limit,
        )?);
    }
    mount_targets::check(&mounts, &temporary, resources.devices())?;
    Ok((mounts, temporary))
}

/// What `idmap` means for a mount that the job asks for.
pub(super) fn ids(idmap: bool) -> MountIds {
    match idmap {
        true => MountIds::Mapped,
        false => MountIds::Unmapped,
    }
}

fn volumes(
    mounts: &mut Vec<Mount>,
    context: &TaskContext,
    sources: Sources<'_>,
    ids: MountIds,
) -> Result<(), ConfigError> {
    for volume in &context.mounts {
        let target = volume.target.to_string_lossy();
        let option = entry("task.volume_mount", &target);
        let mount = Mount::new(
            sources.volume(&option, &volume.source)?,
            mount_point(&option, &target)?,
        );
        mounts.push(Mount {
            read_only: volume.read_only,
            propagation: volume_propagation(&option, &volume.propagation)?,
            ids,
            option: Some(option),
            ..mount
        });
    }
    Ok(())
}

/// Nomad sends `private` for a block that sets nothing.
fn volume_propagation(option: &str, word: &str) -> Result<Propagation, ConfigError> {
    if word.is_empty() {
        return Ok(Propagation::Private);
    }
    let option = format!("{option}.propagation_mode");
    values::propagation(&option, word, values::VOLUME_PROPAGATION)
}

/// The binds of one of the two options.
fn binds(
    mounts: &mut Vec<Mount>,
    (name, map, read_only): (&str, Option<&BTreeMap<String, String>>, bool),
    sources: Sources<'_>,
    ids: MountIds,
) -> Result<(), ConfigError> {
    for (source, target) in map.into_iter().flatten() {
        let option = entry(name, source);
        let mount = Mount::new(
            sources.bind(&option, source)?,
            bind_target(&option, target)?,
        );
        mounts.push(Mount {
            read_only,
            ids,
            option: Some(option),
            ..mount
        });
    }
    Ok(())
}

fn bind_target(option: &str, text: &str) -> Result<PathBuf, ConfigError> {
    // Escaped, these would become part of the path, which is never what the author of the job means.
    if let Some((_, last)) = text.rsplit_once(':')
        && last.split(',').all(|word| BIND_OPTIONS.contains(&word))
    {
        let reason = format!(
            "{} ends in mount options, which are not supported",
            quoted(text)
        );
        return Err(ConfigError::new(option, reason));
    }
    mount_point(option, text)
}

/// A path in the container at which something can be mounted.
pub(super) fn mount_point(option: &str, text: &str) -> Result<PathBuf, ConfigError> {
    let target = inside(option, text)?;
    if target == Path::new("/") {
        let reason = "the target \"/\" would hide the image";
        return Err(ConfigError::new(option, reason));
    }
    Ok(target)
}
