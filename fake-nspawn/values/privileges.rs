//! Capabilities, and the users of a container.

use super::boolean;
use crate::options::{Refusal, Users};

const CAPABILITIES: &[&str] = &[
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The capabilities that a container keeps by default.
pub(crate) const DEFAULT_CAPABILITIES: u64 = {
    let (net_admin, ipc_lock, sys_module, sys_rawio, sys_pacct, sys_time) =
        (12, 14, 16, 17, 20, 25);
    let up_to_setfcap = (1 << 32) - 1;
    up_to_setfcap
        & !(1 << net_admin
            | 1 << ipc_lock
            | 1 << sys_module
            | 1 << sys_rawio
            | 1 << sys_pacct
            | 1 << sys_time)
};

/// The capability that a private network adds.
pub(crate) const NET_ADMIN: u64 = 1 << 12;

/// A list of capabilities as a mask; `all` is every bit.
pub(crate) fn capabilities(text: &str) -> Result<u64, Refusal> {
    let mut mask = 0;
    for word in text.split(',').filter(|word| !word.is_empty()) {
        if word == "all" {
            mask = u64::MAX;
            continue;
        }
        let named = word.to_ascii_lowercase();
        let by_name = named
            .strip_prefix("cap_")
            .and_then(|name| CAPABILITIES.iter().position(|known| *known == name));
        let number = by_name.or_else(|| word.parse().ok().filter(|number| *number <= 62));
        let number = number
            .ok_or_else(|| Refusal::invalid(format!("Failed to parse capability {word}.")))?;
        mask |= 1 << number;
    }
    Ok(mask)
}

pub(crate) fn private_users(version: u32, value: Option<&str>) -> Result<Users, Refusal> {
    let Some(text) = value else {
        return Ok(Users::Fixed);
    };
    match (text, boolean(text)) {
        ("pick", _) => return Ok(Users::Pick),
        ("identity", _) if version >= 249 => return Ok(Users::Identity),
        ("managed", _) if version >= 258 => return Ok(Users::Managed),
        // A lone 0 or 1 is a boolean here before it is a number.
        (_, Some(true)) => return Ok(Users::Fixed),
        (_, Some(false)) => return Ok(Users::No),
        _ => {}
    }
    let (shift, count) = match text.split_once(':') {
        Some((shift, count)) => (shift, Some(count)),
        None => (text, None),
    };
    let Ok(first) = shift.parse::<u32>() else {
        return Err(Refusal::invalid(format!(
            "Failed to parse UID \"{shift}\": Invalid argument"
        )));
    };
    if first == u32::MAX || first == 0xffff {
        let message = format!("Failed to parse UID \"{shift}\": No such device or address");
        return Err(Refusal { message, errno: 6 });
    }
    let count = count.unwrap_or("65536");
    let Ok(number) = count.parse::<u32>() else {
        return Err(Refusal::invalid(format!(
            "Failed to parse UID range \"{count}\": Invalid argument"
        )));
    };
    if number == 0 || first.checked_add(number).is_none() {
        return Err(Refusal::invalid(
            "UID range cannot be empty or go beyond 4294967295.",
        ));
    }
    Ok(Users::Fixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_a_mask() {
        assert_eq!(
            capabilities("cap_chown,CAP_NET_ADMIN").unwrap(),
            1 | 1 << 12
        );
        assert_eq!(capabilities("all").unwrap(), u64::MAX);
        assert_eq!(
            capabilities("NET_ADMIN").unwrap_err().message,
            "Failed to parse capability NET_ADMIN."
        );
        assert_eq!(DEFAULT_CAPABILITIES & NET_ADMIN, 0);
        assert_eq!(DEFAULT_CAPABILITIES & 1, 1);
    }

    #[test]
    fn a_range_of_users_is_not_empty() {
        assert!(private_users(252, Some("100")).is_ok());
        assert!(private_users(252, Some("65536:0")).is_err());
        assert!(private_users(252, Some("4294967295")).is_err());
        assert!(private_users(257, Some("managed")).is_err());
        assert_eq!(private_users(258, Some("managed")), Ok(Users::Managed));
    }
}
