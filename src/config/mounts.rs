//! The host directories and files that are mounted into a container: Nomad's own, then volumes, then the job's binds.
//! Rejects sources that do not exist or that the task may not see, and two mounts with the same target.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::container::{Mount, Propagation};

use super::decode::{entry, quoted};
use super::options::TaskOptions;
use super::paths::{Allocation, inside, validate_path_text};
use super::values::{self, BIND_OPTIONS};
use super::{ConfigError, PluginConfig, TaskContext};

/// All mounts, in the order in which they are mounted.
pub(super) fn mounts(
    options: &TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
    allocation: &Allocation,
) -> Result<Vec<Mount>, ConfigError> {
    let visible = allocation
        .visible_dirs()
        .map(|(source, target)| Mount::new(source, target));
    let mut mounts = visible.to_vec();
    volumes(&mut mounts, context, plugin_config)?;
    let mut binds = |name, map: &Option<BTreeMap<String, String>>, read_only| {
        for (source, target) in map.iter().flatten() {
            let option = entry(name, source);
            let bind = Mount::new(
                bind_source(&option, source, plugin_config, allocation)?,
                bind_target(&option, target)?,
            )
            .with_read_only(read_only);
            add(&mut mounts, &option, bind)?;
        }
        Ok::<_, ConfigError>(())
    };
    binds("config.bind", &options.bind, false)?;
    binds("config.bind_read_only", &options.bind_read_only, true)?;
    Ok(mounts)
}

fn volumes(
    mounts: &mut Vec<Mount>,
    context: &TaskContext,
    plugin_config: &PluginConfig,
) -> Result<(), ConfigError> {
    for volume in &context.mounts {
        let target = volume.target.to_string_lossy();
        let option = entry("task.volume_mount", &target);
        if !plugin_config.volumes {
            let reason = "volumes are disabled on this node (plugin.volumes = false)";
            return Err(ConfigError::new(option, reason));
        }
        let mount = Mount::new(
            volume_source(&option, &volume.source)?,
            mount_point(&option, &target)?,
        );
        let mount = Mount {
            read_only: volume.read_only,
            propagation: volume_propagation(&option, &volume.propagation)?,
            ..mount
        };
        add(mounts, &option, mount)?;
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

fn volume_source(option: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let text = path.to_string_lossy();
    validate_path_text(option, &text)?;
    let text = quoted(&text);
    match path.canonicalize() {
        Ok(source) if path.is_absolute() => Ok(source),
        Ok(_) => {
            let reason = format!("the source {text} is not an absolute path");
            Err(ConfigError::new(option, reason))
        }
        Err(error) => {
            let reason = format!("the source {text} can't be resolved: {error}");
            Err(ConfigError::on_host(option, reason, &error))
        }
    }
}

fn bind_source(
    option: &str,
    text: &str,
    plugin_config: &PluginConfig,
    allocation: &Allocation,
) -> Result<PathBuf, ConfigError> {
    let source = allocation.source(option, text)?;
    if !plugin_config.volumes && !allocation.contains(&source) {
        let reason = format!(
            "{} is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)",
            quoted(text)
        );
        return Err(ConfigError::new(option, reason));
    }
    Ok(source)
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

fn mount_point(option: &str, text: &str) -> Result<PathBuf, ConfigError> {
    let target = inside(option, text)?;
    if target == Path::new("/") {
        let reason = "the target \"/\" would hide the image";
        return Err(ConfigError::new(option, reason));
    }
    Ok(target)
}

fn add(mounts: &mut Vec<Mount>, option: &str, mount: Mount) -> Result<(), ConfigError> {
    if let Some(earlier) = mounts.iter().find(|earlier| earlier.target == mount.target) {
        let reason = format!(
            "the target {} is already used by {}",
            quoted(&mount.target.to_string_lossy()),
            quoted(&earlier.source.to_string_lossy())
        );
        return Err(ConfigError::new(option, reason));
    }
    mounts.push(Mount {
        option: Some(option.to_owned()),
        ..mount
    });
    Ok(())
}
