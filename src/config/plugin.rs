//! Validates the agent's `plugin` block. Does not look at the host: whether a program exists is checked by the
//! fingerprint.

use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use job_values::duration;

use super::allowed::AllowedPaths;
use super::decode::quoted;
use super::options::{NetworkPool, PluginOptions};
use super::paths::inside;
use super::{ConfigError, PluginConfig};
use crate::network::pool::Pool;

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
        volumes_allow: AllowedPaths::of(
            "plugin.volumes_allow",
            options.volumes_allow.as_deref().unwrap_or_default(),
        )?,
        devices: options.devices,
        require_limits: options.require_limits,
        exec_unfiltered: options.exec_unfiltered,
        seccomp_cache: options.seccomp_cache,
        private_network: options.private_network,
        network_pool: pool(options.network_pool.as_ref())?,
        state_dir,
        nspawn_path: options
            .nspawn_path
            .map(|text| inside("plugin.nspawn_path", &text))
            .transpose()?,
        reconcile_after: Some(reconcile_after).filter(|after| !after.is_zero()),
    })
}

/// The addresses for containers.
fn pool(options: Option<&NetworkPool>) -> Result<Pool, ConfigError> {
    let Some(options) = options else {
        return Ok(Pool::default());
    };
    let (option, text) = ("plugin.network_pool.ipv4", &options.ipv4);
    let ipv4: Ipv4Net = range(option, text, "10.213.0.0/16")?;
    if !(8..=29).contains(&ipv4.prefix_len()) || ipv4.trunc() != ipv4 {
        return Err(no_range(
            option,
            text,
            "with a prefix from /8 to /29 and no bits after it",
        ));
    }
    let option = "plugin.network_pool.ipv6";
    let ipv6 = options.ipv6.as_ref().map(|text| {
        let ipv6: Ipv6Net = range(option, text, "fd12:3456:789a::/64")?;
        if !(16..=96).contains(&ipv6.prefix_len()) || ipv6.trunc() != ipv6 {
            return Err(no_range(
                option,
                text,
                "with a prefix from /16 to /96 and no bits after it",
            ));
        }
        Ok(ipv6)
    });
    Ok(Pool {
        ipv4,
        ipv6: ipv6.transpose()?,
    })
}

fn range<T: FromStr>(option: &str, text: &str, example: &str) -> Result<T, ConfigError> {
    let parsed = text.parse();
    parsed.map_err(|_| no_range(option, text, &format!("such as {example}")))
}

fn no_range(option: &str, text: &str, what: &str) -> ConfigError {
    let reason = format!("{} is not a range of addresses {what}", quoted(text));
    ConfigError::new(option, reason)
}
