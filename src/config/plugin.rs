//! The agent's `plugin` block, checked. Asks nothing of the host: whether a program is there is the fingerprint's matter.

use super::options::PluginOptions;
use super::paths::inside;
use super::{ConfigError, PluginConfig};

pub(super) fn check(options: PluginOptions) -> Result<PluginConfig, ConfigError> {
    Ok(PluginConfig {
        enabled: options.enabled,
        volumes: options.volumes,
        state_dir: inside("plugin.state_dir", &options.state_dir)?,
        nspawn_path: options
            .nspawn_path
            .map(|text| inside("plugin.nspawn_path", &text))
            .transpose()?,
    })
}
