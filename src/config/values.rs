//! The values and small grammars that systemd-nspawn accepts: tables and pure checks. Does no look-ups on the host.

use std::ops::RangeInclusive;

use crate::container::{Console, JournalFormat, Propagation, Volatile};

use super::ConfigError;
use super::decode::{Number, quoted};

/// The keywords of an option, each with the value it stands for.
pub(super) type Values<T> = [(&'static str, T)];

/// Whether the task has to say that it is ready.
pub(super) const READY: &Values<bool> = &[("started", false), ("notify", true)];

pub(super) const JOURNAL_FORMAT: &Values<JournalFormat> = &[
    ("short", JournalFormat::Short),
    ("cat", JournalFormat::Cat),
    ("json", JournalFormat::Json),
];

pub(super) const CONSOLE: &Values<Console> = &[
    ("interactive", Console::Interactive),
    ("read-only", Console::ReadOnly),
    ("passive", Console::Passive),
    ("pipe", Console::Pipe),
    ("autopipe", Console::Autopipe),
];

pub(super) const VOLATILE: &Values<Volatile> = &[
    ("yes", Volatile::Yes),
    ("state", Volatile::State),
    ("overlay", Volatile::Overlay),
    ("no", Volatile::No),
];

pub(super) const RESOLV_CONF: &Values<()> = &[
    ("off", ()),
    ("copy-host", ()),
    ("copy-static", ()),
    ("copy-uplink", ()),
    ("copy-stub", ()),
    ("replace-host", ()),
    ("replace-static", ()),
    ("replace-uplink", ()),
    ("replace-stub", ()),
    ("bind-host", ()),
    ("bind-static", ()),
    ("bind-uplink", ()),
    ("bind-stub", ()),
    ("delete", ()),
    ("auto", ()),
];

pub(super) const OWNERSHIP: &Values<()> = &[("off", ()), ("chown", ()), ("map", ()), ("auto", ())];

pub(super) const DOWNLOAD_TYPE: &Values<()> = &[("tar", ()), ("raw", ()), ("docker", ())];

pub(super) const DOWNLOAD_VERIFY: &Values<()> = &[("no", ()), ("checksum", ()), ("signature", ())];

/// Of a `volume_mount` block.
pub(super) const VOLUME_PROPAGATION: &Values<Propagation> = &[
    ("private", Propagation::Private),
    ("host-to-task", Propagation::HostToTask),
];

/// Of a `mount` block, in docker's words. systemd-nspawn makes no difference between a mount and those below it.
pub(super) const BIND_PROPAGATION: &Values<Propagation> = &[
    ("private", Propagation::Private),
    ("rprivate", Propagation::Private),
    ("slave", Propagation::HostToTask),
    ("rslave", Propagation::HostToTask),
    ("host-to-task", Propagation::HostToTask),
];

/// Modes of propagation by which mounts that a task makes would appear on the host.
const TO_HOST: &[&str] = &["bidirectional", "shared", "rshared"];

/// Keywords after the last `:` of a bind that systemd-nspawn takes as mount options.
pub(super) const BIND_OPTIONS: &[&str] = &[
    "rbind",
    "norbind",
    "idmap",
    "noidmap",
    "rootidmap",
    "owneridmap",
];

/// The kernel's capabilities, ordered by number.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The value that the keyword `word` stands for, or an error that lists the keywords.
pub(super) fn one_of<T: Copy>(
    option: &str,
    word: &str,
    words: &Values<T>,
) -> Result<T, ConfigError> {
    words
        .iter()
        .find(|(known, _)| *known == word)
        .map(|(_, meaning)| *meaning)
        .ok_or_else(|| {
            let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
            let reason = format!("{} is not one of {}", quoted(word), known.join(", "));
            ConfigError::new(option, reason)
        })
}

/// The mode of propagation that `word` stands for, or an error that lists those there are.
pub(super) fn propagation(
    option: &str,
    word: &str,
    words: &Values<Propagation>,
) -> Result<Propagation, ConfigError> {
    if !TO_HOST.contains(&word) {
        return one_of(option, word, words);
    }
    let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
    let reason = format!(
        "{} is not supported, because mounts that a task makes can't reach the host: use one of {}",
        quoted(word),
        known.join(", ")
    );
    Err(ConfigError::new(option, reason))
}

/// The capabilities of a list, in upper case and without duplicates. An element may hold several, separated by commas.
/// `all` stands for every capability and is kept as it is.
pub(super) fn capabilities(option: &str, list: &[String]) -> Result<Vec<String>, ConfigError> {
    let mut names = Vec::new();
    for name in list.iter().flat_map(|element| element.split(',')) {
        let upper = name.trim().to_ascii_uppercase();
        let known = if upper == "ALL" {
            "all"
        } else {
            CAPABILITIES
                .iter()
                .find(|known| **known == upper)
                .ok_or_else(|| {
                    let reason = format!(
                        "{} is not a capability: use names such as CAP_NET_ADMIN, or all",
                        quoted(name)
                    );
                    ConfigError::new(option, reason)
                })?
        };
        if !names.iter().any(|name| name == known) {
            names.push(known.to_owned());
        }
    }
    Ok(names)
}

/// The number, if it is whole and in this range.
pub(super) fn whole(
    option: &str,
    number: &Number,
    range: RangeInclusive<i64>,
) -> Result<i64, ConfigError> {
    let value = number.0.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| {
        let reason = format!(
            "{} is not a whole number from {} to {}",
            number.shown(),
            range.start(),
            range.end()
        );
        ConfigError::new(option, reason)
    })
}

/// A number of bytes with docker's units, `512m` or `64KiB`. Without a unit it is in bytes. At most `i64::MAX`.
pub(super) fn bytes(option: &str, text: &str) -> Result<u64, ConfigError> {
    let digits = text.trim_end_matches(|char: char| char.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => u32::MAX,
    };
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number || shift == u32::MAX {
        let reason = format!(
            "{} is not a size: use a whole number with one of the units b, k, m and g, such as 512m",
            quoted(text)
        );
        return Err(ConfigError::new(option, reason));
    }
    let most = i64::MAX.unsigned_abs();
    let bytes = digits.parse().ok();
    let bytes = bytes.and_then(|number: u64| number.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes <= most).ok_or_else(|| {
        let reason = format!("{} is more than {most} bytes", quoted(text));
        ConfigError::new(option, reason)
    })
}

/// Whether systemd-nspawn accepts it as the name of an environment variable.
pub(super) fn is_variable_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Whether the kernel and systemd accept it as the name of a network interface.
pub(super) fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !["all", "default", ".", ".."].contains(&name)
        && !name.bytes().all(|byte| byte.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b":/%".contains(&byte))
}

/// What is wrong with a range of user ids, `UID[:COUNT]`; `None` if it can be used.
pub(super) fn uid_range_error(range: &str) -> Option<&'static str> {
    let (uid, count) = match range.split_once(':') {
        None => (range, "65536"),
        Some(parts) => parts,
    };
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u32>().ok(),
        false => None,
    };
    let (Some(first), Some(count)) = (number(uid), number(count)) else {
        return Some("is not one of yes, no, pick, identity, managed, UID, UID:COUNT");
    };
    if [0xFFFF, u32::MAX].contains(&first) {
        return Some("begins with a user id that the kernel reserves");
    }
    if count == 0 {
        return Some("is an empty range of user ids");
    }
    // The last id means "no user" and can't be in a range.
    if first > u32::MAX - count {
        return Some("goes beyond the last user id, 4294967294");
    }
    None
}

/// Whether `text` has a control character, which makes it unfit for a command line or a log line.
pub(super) fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const NOT_A_SIZE: &str =
        "is not a size: use a whole number with one of the units b, k, m and g, such as 512m";
    const TOO_MUCH: &str = "is more than 9223372036854775807 bytes";

    #[rstest]
    #[case("0", Ok(0))]
    #[case("4096", Ok(4096))]
    #[case("10b", Ok(10))]
    #[case("64k", Ok(64 << 10))]
    #[case("512m", Ok(512 << 20))]
    #[case("512M", Ok(512 << 20))]
    #[case("2g", Ok(2 << 30))]
    #[case("2GB", Ok(2 << 30))]
    #[case("2GiB", Ok(2 << 30))]
    #[case("9223372036854775807", Ok(i64::MAX as u64))]
    #[case("9223372036854775808", Err(TOO_MUCH))]
    #[case("8589934592g", Err(TOO_MUCH))]
    #[case("99999999999999999999999", Err(TOO_MUCH))]
    #[case("-1", Err(NOT_A_SIZE))]
    #[case("+1", Err(NOT_A_SIZE))]
    #[case("1.5g", Err(NOT_A_SIZE))]
    #[case("1 g", Err(NOT_A_SIZE))]
    #[case("g", Err(NOT_A_SIZE))]
    #[case("1t", Err(NOT_A_SIZE))]
    #[case("1gg", Err(NOT_A_SIZE))]
    #[case("50%", Err(NOT_A_SIZE))]
    #[case("١m", Err(NOT_A_SIZE))]
    fn sizes(#[case] text: &str, #[case] wanted: Result<u64, &str>) {
        let read = bytes("config.x", text).map_err(|error| error.to_string());
        let wanted = wanted.map_err(|reason| format!("config.x: {text:?} {reason}"));
        assert_eq!(read, wanted);
    }
}
