//! Validates the options of the user namespace.

use crate::container::{NetworkNamespace, Users, Volatile};

use super::ConfigError;
use super::decode::quoted;
use super::options::TaskOptions;
use super::rootfs::VOLATILE;
use super::values::{self, one_of};

const OWNERSHIP: &str = "config.private_users_ownership";
const PRIVATE_USERS: &str = "config.private_users";

/// The user namespace, and how the image's files get the owners of its range. Adds to `notes` which option has no effect.
pub(super) fn users(
    options: &TaskOptions,
    volatile: Volatile,
    network: &NetworkNamespace,
    notes: &mut Vec<String>,
) -> Result<Users, ConfigError> {
    check_words(options)?;
    if !options.user_namespacing {
        notes.extend(without_effect(options));
        return Ok(Users::Host);
    }
    let range = options.private_users.as_deref().unwrap_or("pick");
    if range == "no" {
        return Ok(Users::Host);
    }
    if range == "managed" && !matches!(network, NetworkNamespace::Private { .. }) {
        let reason = "\"managed\" needs a private network: set config.network_veth, network_zone or network_bridge";
        return Err(ConfigError::new(PRIVATE_USERS, reason));
    }
    // With the other ranges the files of the image already have their owners.
    let mapped = range == "pick" || range.starts_with(|first: char| first.is_ascii_digit());
    let given = options.private_users_ownership.as_deref();
    let ownership = given.or_else(|| mapped.then_some("auto"));
    check_root_with(
        ownership.filter(|_| mapped || given == Some("chown")),
        options,
        volatile,
    )?;
    Ok(Users::Private {
        range: range.to_owned(),
        ownership: ownership.map(str::to_owned),
    })
}

/// Rejects values that systemd-nspawn does not know.
fn check_words(options: &TaskOptions) -> Result<(), ConfigError> {
    let is_word = |range| ["yes", "no", "pick", "identity", "managed"].contains(&range);
    let range = options.private_users.as_deref();
    if let Some(range) = range.filter(|range| !is_word(*range))
        && let Some(fault) = values::uid_range_error(range)
    {
        let reason = format!("{} {fault}", quoted(range));
        return Err(ConfigError::new(PRIVATE_USERS, reason));
    }
    if let Some(word) = &options.private_users_ownership {
        one_of(OWNERSHIP, word, values::OWNERSHIP)?;
    }
    Ok(())
}

/// Notes on options that need a user namespace.
fn without_effect(options: &TaskOptions) -> impl Iterator<Item = String> {
    let set = [
        (PRIVATE_USERS, &options.private_users),
        (OWNERSHIP, &options.private_users_ownership),
    ];
    let set = set
        .into_iter()
        .filter(|(_, word)| word.as_deref().is_some_and(|word| word != "no"));
    set.map(|(option, _)| {
        format!(
            "{option} has no effect, because config.user_namespacing is false. Remove it, or set config.user_namespacing = true"
        )
    })
}

/// Rejects a way of changing owners that this root does not allow.
fn check_root_with(
    ownership: Option<&str>,
    options: &TaskOptions,
    volatile: Volatile,
) -> Result<(), ConfigError> {
    match (ownership, volatile) {
        (Some("chown"), Volatile::No) if !options.read_only => Ok(()),
        (Some("chown"), _) => {
            let other = match volatile {
                Volatile::No => "config.read_only",
                _ => VOLATILE,
            };
            let reason = format!("\"chown\" can't be combined with {other}");
            Err(ConfigError::new(OWNERSHIP, reason))
        }
        _ => Ok(()),
    }
}
