//! Looks up the host's side of mounts: the sources of volumes and binds, and whether the operator allows them. Creates nothing.

use std::path::{Path, PathBuf};

use super::decode::quoted;
use super::paths::{Allocation, validate_path_text};
use super::{ConfigError, PluginConfig};

/// Where sources are looked up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sources<'a> {
    plugin_config: &'a PluginConfig,
    allocation: &'a Allocation,
}

impl<'a> Sources<'a> {
    pub(super) fn new(plugin_config: &'a PluginConfig, allocation: &'a Allocation) -> Self {
        Self {
            plugin_config,
            allocation,
        }
    }

    /// Nomad's directories on the host, and the paths at which the task sees them.
    pub(super) fn visible_dirs(&self) -> [(PathBuf, &'static Path); 3] {
        self.allocation.visible_dirs()
    }

    /// The source of a volume, with links resolved.
    pub(super) fn volume(&self, option: &str, path: &Path) -> Result<PathBuf, ConfigError> {
        if !self.plugin_config.volumes {
            let reason = "volumes are disabled on this node (plugin.volumes = false)";
            return Err(ConfigError::new(option, reason));
        }
        let text = path.to_string_lossy();
        validate_path_text(option, &text)?;
        let shown = quoted(&text);
        match path.canonicalize() {
            Ok(source) if path.is_absolute() => {
                self.match_patterns(option, &source)?;
                Ok(source)
            }
            Ok(_) => {
                let reason = format!("the source {shown} is not an absolute path");
                Err(ConfigError::new(option, reason))
            }
            Err(error) => {
                let reason = format!("the source {shown} can't be resolved: {error}");
                Err(ConfigError::on_host(option, reason, &error))
            }
        }
    }

    /// The source of a bind, with links resolved.
    pub(super) fn bind(&self, option: &str, text: &str) -> Result<PathBuf, ConfigError> {
        let source = self.allocation.source(option, text)?;
        self.allow(option, text, &source)?;
        Ok(source)
    }

    /// The same for a directory that may be missing, and whether it is.
    pub(super) fn bind_to_create(
        &self,
        option: &str,
        text: &str,
    ) -> Result<(PathBuf, bool), ConfigError> {
        let (source, missing) = self.allocation.source_to_create(option, text)?;
        self.allow(option, text, &source)?;
        Ok((source, missing))
    }

    fn allow(&self, option: &str, text: &str, source: &Path) -> Result<(), ConfigError> {
        if self.plugin_config.volumes || self.allocation.contains(source) {
            return self.match_patterns(option, source);
        }
        let reason = format!(
            "{} is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)",
            quoted(text)
        );
        Err(ConfigError::new(option, reason))
    }

    /// Rejects a path outside the allocation that the operator has not listed.
    fn match_patterns(&self, option: &str, source: &Path) -> Result<(), ConfigError> {
        let allowed = &self.plugin_config.volumes_allow;
        if self.allocation.contains(source) || allowed.allows(source) {
            return Ok(());
        }
        let reason = format!(
            "the source is {} on this node, which matches none of plugin.volumes_allow: {}",
            quoted(&source.to_string_lossy()),
            allowed.shown()
        );
        Err(ConfigError::new(option, reason))
    }
}
