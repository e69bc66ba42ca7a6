//! The grammar of single option values: here those with a list of words and those that change nothing; the other kinds are in the modules
//! below. Pure; does not know how options combine.

use crate::options::{Refusal, Rlimit, Volatile};

mod mounts;
mod names;
mod network;
mod privileges;

pub(crate) use mounts::mount;
pub(crate) use names::{
    chdir, credential, host_name, pivot_root, signal, uuid, variable_name, variable_value,
};
pub(crate) use network::{host_interface, interface, port, veth_extra};
pub(crate) use privileges::{DEFAULT_CAPABILITIES, NET_ADMIN, capabilities, private_users};

const CONSOLES: &[&str] = &["autopipe", "interactive", "passive", "pipe", "read-only"];
const VOLATILES: &[&str] = &["no", "yes", "state", "overlay"];
const OWNERSHIPS: &[&str] = &["off", "chown", "map", "auto"];
const TIMEZONES: &[&str] = &["off", "copy", "bind", "symlink", "delete", "auto"];
const RESOLV_CONFS: &[&str] = &[
    "off",
    "copy-host",
    "copy-static",
    "copy-uplink",
    "copy-stub",
    "replace-host",
    "replace-static",
    "replace-uplink",
    "replace-stub",
    "bind-host",
    "bind-static",
    "bind-uplink",
    "bind-stub",
    "delete",
    "auto",
];
const RLIMITS: &[&str] = &[
    "AS",
    "CORE",
    "CPU",
    "DATA",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RSS",
    "RTPRIO",
    "RTTIME",
    "SIGPENDING",
    "STACK",
];
const PERSONALITIES: &[&str] = if cfg!(target_arch = "aarch64") {
    &["arm64", "arm"]
} else {
    &["x86", "x86-64"]
};

/// The values that an option lists for the value `help`, for the options that have it.
pub(crate) fn listed(version: u32, option: &str) -> Option<Vec<&'static str>> {
    let words = match option {
        "console" => CONSOLES,
        "volatile" => VOLATILES,
        "private-users-ownership" => OWNERSHIPS,
        "timezone" => TIMEZONES,
        "resolv-conf" => RESOLV_CONFS,
        _ => return None,
    };
    Some(
        words
            .iter()
            .copied()
            .filter(|word| word_since(option, word) <= version)
            .collect(),
    )
}

fn word_since(option: &str, word: &str) -> u32 {
    match (option, word) {
        ("console", "autopipe") => 247,
        ("resolv-conf", word) if word.starts_with("replace-") => 246,
        ("resolv-conf", word) if word.ends_with("-uplink") || word.ends_with("-stub") => 246,
        _ => 0,
    }
}

fn one_of(version: u32, option: &str, text: &str, wrong: &str) -> Result<String, Refusal> {
    let known = listed(version, option).is_some_and(|words| words.contains(&text));
    if known {
        Ok(text.to_owned())
    } else {
        Err(Refusal::invalid(format!("{wrong}: {text}")))
    }
}

pub(crate) fn console(version: u32, text: &str) -> Result<String, Refusal> {
    one_of(version, "console", text, "Unknown console mode")
}

pub(crate) fn ownership(text: &str) -> Result<String, Refusal> {
    // The wrong option name in the message is a mistake of systemd 252 itself.
    one_of(
        u32::MAX,
        "private-users-ownership",
        text,
        "Cannot parse --user-namespace-ownership= value",
    )
}

pub(crate) fn volatile(value: Option<&str>) -> Result<Volatile, Refusal> {
    let Some(text) = value else {
        return Ok(Volatile::Yes);
    };
    Ok(match (text, boolean(text)) {
        ("state", _) => Volatile::State,
        ("overlay", _) => Volatile::Overlay,
        (_, Some(true)) => Volatile::Yes,
        (_, Some(false)) => Volatile::No,
        _ => {
            return Err(Refusal::invalid(format!(
                "Failed to parse --volatile= argument: {text}"
            )));
        }
    })
}

pub(crate) fn link_journal(text: &str) -> Result<String, Refusal> {
    if ["no", "auto", "guest", "host", "try-guest", "try-host"].contains(&text) {
        return Ok(text.to_owned());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse link journal mode {text}"
    )))
}

pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
        _ => None,
    }
}

pub(crate) fn named_boolean(option: &str, text: &str) -> Result<bool, Refusal> {
    boolean(text)
        .ok_or_else(|| Refusal::invalid(format!("Failed to parse --{option}= argument: {text}")))
}

/// The options that change nothing in the fake's behaviour: validated, then dropped.
pub(crate) fn check(version: u32, option: &str, text: &str) -> Result<(), Refusal> {
    let parameter = || Refusal::invalid(format!("Failed to parse --{option}= parameter: {text}"));
    match option {
        "no-new-privileges" => named_boolean(option, text).map(drop),
        "suppress-sync" => boolean(text).map(drop).ok_or_else(|| {
            Refusal::invalid(format!(
                "Failed to parse boolean argument to --suppress-sync=: {text}."
            ))
        }),
        "settings" if ["override", "trusted"].contains(&text) => Ok(()),
        "settings" => named_boolean(option, text).map(drop),
        "resolv-conf" => one_of(
            version,
            option,
            text,
            "Failed to parse /etc/resolv.conf mode",
        )
        .map(drop),
        "timezone" => {
            one_of(version, option, text, "Failed to parse /etc/localtime mode").map(drop)
        }
        "personality" if PERSONALITIES.contains(&text) => Ok(()),
        "personality" => Err(Refusal::invalid(format!(
            "Unknown or unsupported personality '{text}'."
        ))),
        "oom-score-adjust" => match text.parse::<i32>() {
            Ok(-1000..=1000) => Ok(()),
            _ => Err(parameter()),
        },
        "private-users-delegate" => text.parse::<u32>().map(drop).map_err(|_| parameter()),
        "cpu-affinity" => cpus(text),
        "root-hash" => root_hash(text),
        _ => Ok(()),
    }
}

fn root_hash(text: &str) -> Result<(), Refusal> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Refusal::invalid(format!(
            "Failed to parse root hash: {text}"
        )));
    }
    if text.len() < 32 {
        return Err(Refusal::invalid(format!(
            "Root hash must be at least 128bit long: {text}"
        )));
    }
    Ok(())
}

fn cpus(text: &str) -> Result<(), Refusal> {
    let good = text
        .split([',', ' '])
        .filter(|part| !part.is_empty())
        .all(|part| {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            match (low.parse::<u32>(), high.parse::<u32>()) {
                (Ok(low), Ok(high)) => low <= high,
                _ => false,
            }
        });
    if good {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse CPU affinity mask {text}: Invalid argument"
    )))
}

/// A resource limit, `NAME=VALUE` or `NAME=SOFT:HARD`. Sizes and times are taken without units only.
pub(crate) fn rlimit(text: &str) -> Result<Rlimit, Refusal> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(Refusal::invalid("--rlimit= expects an '=' assignment."));
    };
    let short = name.strip_prefix("RLIMIT_").unwrap_or(name);
    if !RLIMITS.contains(&short) {
        return Err(Refusal::invalid(format!("Unknown resource limit: {name}")));
    }
    let bad = || Refusal::invalid(format!("Failed to parse resource limit: {value}"));
    let most = match short {
        "NICE" => 40,
        "CPU" => u64::MAX / 1_000_000 - 1,
        _ => u64::MAX - 1,
    };
    let number = |part: &str| match part {
        "infinity" if short != "NICE" => Some(u64::MAX),
        part => part.parse().ok().filter(|number| *number <= most),
    };
    let (soft, hard) = value.split_once(':').unwrap_or((value, value));
    match (number(soft), number(hard)) {
        (Some(soft), Some(hard)) if soft <= hard => Ok(Rlimit {
            name: short.to_owned(),
            soft,
            hard,
        }),
        _ => Err(bad()),
    }
}
