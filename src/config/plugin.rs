//! The agent's `plugin` block, checked. Asks nothing of the host: whether a program is there is the fingerprint's matter.

use std::path::PathBuf;

use super::options::PluginOptions;
use super::paths::inside;
use super::{ConfigError, PluginConfig};

pub(super) fn check(options: PluginOptions) -> Result<PluginConfig, ConfigError> {
    let path = |option: &str, text: &str| inside(option, text);
    Ok(PluginConfig {
        enabled: options.enabled,
        volumes: options.volumes,
        state_dir: path("plugin.state_dir", &options.state_dir)?,
        nspawn_path: options
            .nspawn_path
            .map(|text| path("plugin.nspawn_path", &text))
            .transpose()?
            .map(PathBuf::from),
    })
}
