//! Validates the agent's `plugin` block. Does not look at the host: whether a program exists is checked by the
//! fingerprint.

use job_values::duration;

use super::options::PluginOptions;
use super::paths::inside;
use super::{ConfigError, PluginConfig};

/// The longest state directory, in bytes: sockets lie below it, and the kernel limits the path of a socket to 107
/// bytes. A task directory and the name of the socket in it need up to 43.
pub const MAX_STATE_DIR_BYTES: usize = 64;

pub(super) fn check(options: PluginOptions) -> Result<PluginConfig, ConfigError> {
    let state_dir = inside("plugin.state_dir", &options.state_dir)?;
    if state_dir.as_os_str().len() > MAX_STATE_DIR_BYTES {
        let reason = format!(
            "{state_dir:?} is longer than {MAX_STATE_DIR_BYTES} bytes: the paths of sockets in it would be too long"
        );
        return Err(ConfigError::new("plugin.state_dir", reason));
    }
    let reconcile_after = duration::parse(&options.reconcile_after)
        .map_err(|error| ConfigError::new("plugin.reconcile_after", error.to_string()))?;
    Ok(PluginConfig {
        enabled: options.enabled,
        volumes: options.volumes,
        devices: options.devices,
        require_limits: options.require_limits,
        exec_unfiltered: options.exec_unfiltered,
        seccomp_cache: options.seccomp_cache,
        state_dir,
        nspawn_path: options
            .nspawn_path
            .map(|text| inside("plugin.nspawn_path", &text))
            .transpose()?,
        reconcile_after: Some(reconcile_after).filter(|after| !after.is_zero()),
    })
}
