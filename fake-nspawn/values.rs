//! The grammar of single option values: capability, port, bind mount, machine name and so on. Pure; does not know how options combine.
//! Longer than a file should be, because it is one short function per grammar and their tables.

use crate::options::{Mount, Refusal, Users, Volatile};

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
        "rlimit" => rlimit(text),
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

fn rlimit(text: &str) -> Result<(), Refusal> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(Refusal::invalid("--rlimit= expects an '=' assignment."));
    };
    if !RLIMITS.contains(&name.strip_prefix("RLIMIT_").unwrap_or(name)) {
        return Err(Refusal::invalid(format!("Unknown resource limit: {name}")));
    }
    let bad = || Refusal::invalid(format!("Failed to parse resource limit: {value}"));
    let number = |part: &str| match part {
        "infinity" => Some(u64::MAX),
        part => part
            .trim_end_matches(['K', 'M', 'G', 'T', 'P', 'E', 's'])
            .parse()
            .ok(),
    };
    let (soft, hard) = value.split_once(':').unwrap_or((value, value));
    match (number(soft), number(hard)) {
        (Some(soft), Some(hard)) if soft <= hard => Ok(()),
        _ => Err(bad()),
    }
}

/// A machine or host name; an empty one counts as none.
pub(crate) fn host_name(what: &str, text: &str) -> Result<Option<String>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if text.len() <= 64 && text.split('.').all(label) {
        return Ok(Some(text.to_owned()));
    }
    Err(Refusal::invalid(format!("Invalid {what}: {text}")))
}

/// 128 bits in hexadecimal, with or without dashes; returned with dashes.
pub(crate) fn uuid(text: &str) -> Result<String, Refusal> {
    let digits = text.replace('-', "");
    let dashes = text
        .match_indices('-')
        .map(|(at, _)| at)
        .collect::<Vec<_>>();
    let shape = dashes.is_empty() || dashes == [8, 13, 18, 23];
    if !shape || digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Refusal::invalid(format!("Invalid UUID: {text}")));
    }
    if digits.bytes().all(|byte| byte == b'0') {
        return Err(Refusal::invalid("Machine UUID may not be all zeroes."));
    }
    Ok(dashed(&digits.to_ascii_lowercase()))
}

/// Inserts the dashes into 32 digits.
pub(crate) fn dashed(digits: &str) -> String {
    [
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..],
    ]
    .join("-")
}

pub(crate) fn pivot_root(text: &str) -> Result<String, Refusal> {
    let parts: Vec<_> = text.split(':').collect();
    if parts.len() <= 2 && parts.iter().all(|part| part.starts_with('/')) {
        return Ok(parts[0].to_owned());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse --pivot-root= argument {text}: Invalid argument"
    )))
}

pub(crate) fn chdir(version: u32, text: &str) -> Result<String, Refusal> {
    if !text.starts_with('/') {
        return Err(Refusal::invalid(format!(
            "Working directory {text} is not an absolute path."
        )));
    }
    if version >= 258 && text.split('/').any(|part| part == "..") {
        return Err(Refusal::invalid(format!(
            "Working directory path is not normalized: {text}"
        )));
    }
    Ok(text.to_owned())
}

pub(crate) fn variable_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|first: char| first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A valid value of a variable given as an argument: no Unicode noncharacters, before 248 also no control characters but tab and newline.
pub(crate) fn variable_value(value: &str, version: u32) -> bool {
    value.chars().all(|char| {
        let code = u32::from(char);
        let noncharacter = (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe;
        let control = char.is_ascii_control() && char != '\t' && char != '\n';
        !noncharacter && (version >= 248 || !control)
    })
}

/// A signal by name or number.
pub(crate) fn signal(text: &str) -> Result<i32, Refusal> {
    let bad = || Refusal::invalid(format!("Cannot parse signal: {text}"));
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let real_time = |rest: &str, sign: char| match rest.strip_prefix(sign) {
        Some(digits) => digits.parse::<i32>().ok(),
        None => rest.is_empty().then_some(0),
    };
    let number = if let Ok(number) = name.parse::<i32>() {
        Some(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        real_time(rest, '+').map(|offset| crate::process::RTMIN + offset)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        real_time(rest, '-').map(|offset| 64 - offset)
    } else {
        format!("SIG{name}")
            .parse::<nix::sys::signal::Signal>()
            .ok()
            .map(|signal| signal as i32)
    };
    number
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(bad)
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

/// A port mapping; returns the part that must be unique.
pub(crate) fn port(text: &str) -> Result<String, Refusal> {
    let (protocol, rest) = match text.split_once(':') {
        Some((word @ ("tcp" | "udp"), rest)) => (word, rest),
        _ => ("tcp", text),
    };
    let (host, container) = rest.split_once(':').unwrap_or((rest, rest));
    let number = |what: &str, shown: &str, part: &str| match part.parse::<u32>() {
        Ok(1..=65535) => Ok(()),
        Ok(65536..) => {
            let message =
                format!("Failed to parse {what} port {shown}: Numerical result out of range");
            Err(Refusal { message, errno: 34 })
        }
        _ => Err(Refusal::invalid(format!(
            "Failed to parse {what} port {shown}: Invalid argument"
        ))),
    };
    number("host", rest, host)?;
    number("container", container, container)?;
    Ok(format!("{protocol}:{host}"))
}

pub(crate) fn interface(what: &str, name: &str) -> Result<String, Refusal> {
    if good_interface(name) {
        return Ok(name.to_owned());
    }
    Err(Refusal::invalid(format!("{what} name not valid: {name}")))
}

fn good_interface(name: &str) -> bool {
    let shape =
        !name.is_empty() && name.len() <= 15 && ![".", "..", "all", "default"].contains(&name);
    let number = name.bytes().all(|byte| byte.is_ascii_digit());
    let letters = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && ![b'/', b':', b'%'].contains(&byte));
    shape && !number && letters
}

/// A host's interface, from 254 on with the name that it gets in the container.
pub(crate) fn host_interface(version: u32, text: &str) -> Result<String, Refusal> {
    let (host, inner) = match text.split_once(':') {
        Some((host, inner)) if version >= 254 => (host, inner),
        _ => (text, "host0"),
    };
    if good_interface(host) && good_interface(inner) {
        return Ok(host.to_owned());
    }
    Err(Refusal::invalid(format!(
        "Network interface, interface name not valid: {text}"
    )))
}

pub(crate) fn veth_extra(text: &str) -> Result<(), Refusal> {
    let parts: Vec<_> = text.split(':').collect();
    if parts.len() <= 2 && parts.iter().all(|part| good_interface(part)) {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse --network-veth-extra= parameter: {text}"
    )))
}

/// A credential; returns its name.
pub(crate) fn credential(option: &str, text: &str, version: u32) -> Result<String, Refusal> {
    let Some((id, value)) = text.split_once(':') else {
        let message = if version >= 254 {
            format!("Missing value for credential parameter: {text}")
        } else {
            format!("Missing value for --{option}=: {text}")
        };
        return Err(Refusal::invalid(message));
    };
    if id.is_empty() || id.contains('/') || id == "." || id == ".." || id.len() > 255 {
        return Err(Refusal::invalid(format!(
            "Credential name is not valid: {id}"
        )));
    }
    if option == "load-credential" && !value.starts_with('/') {
        let message = format!("Credential not available (no credentials passed at all): {id}");
        return Err(Refusal { message, errno: 2 });
    }
    Ok(id.to_owned())
}

/// Splits at colons; a backslash escapes the next character.
fn words(text: &str, most: usize) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut characters = text.chars();
    while let Some(next) = characters.next() {
        let count = found.len();
        let Some(last) = found.last_mut() else { break };
        match next {
            '\\' => last.extend(characters.next()),
            ':' if count < most => found.push(String::new()),
            other => last.push(other),
        }
    }
    found
}

/// A mount of any of the five kinds.
pub(crate) fn mount(version: u32, option: &str, text: &str) -> Result<Mount, Refusal> {
    let shown = match option {
        "bind" | "bind-ro" => "bind(-ro)",
        "overlay" | "overlay-ro" => "overlay(-ro)",
        other => other,
    };
    let bad = || {
        Refusal::invalid(format!(
            "Failed to parse --{shown}= argument {text}: Invalid argument"
        ))
    };
    match option {
        "bind" | "bind-ro" => bind(version, text, bad),
        "tmpfs" => {
            let destination = words(text, 2).swap_remove(0);
            if destination.starts_with('/') {
                Ok(Mount::Tmpfs { destination })
            } else {
                Err(bad())
            }
        }
        "inaccessible" if text.starts_with('/') => Ok(Mount::Inaccessible {
            destination: text.to_owned(),
        }),
        "inaccessible" => Err(bad()),
        _ => {
            let parts = words(text, usize::MAX);
            if parts.len() < 2 {
                let message =
                    "--overlay(-ro)= needs at least two colon-separated directories specified.";
                return Err(Refusal {
                    message: message.to_owned(),
                    errno: 99,
                });
            }
            let destination = parts.last().cloned().unwrap_or_default();
            if destination.starts_with('/') {
                Ok(Mount::Overlay { destination })
            } else {
                Err(bad())
            }
        }
    }
}

fn bind(version: u32, text: &str, bad: impl Fn() -> Refusal) -> Result<Mount, Refusal> {
    let mut parts = words(text, 3).into_iter();
    let source = parts.next().unwrap_or_default();
    let destination = parts
        .next()
        .unwrap_or_else(|| source.trim_start_matches('+').to_owned());
    if !destination.starts_with('/') {
        return Err(bad());
    }
    let mut mapped = false;
    for word in parts
        .next()
        .iter()
        .flat_map(|list| list.split(','))
        .filter(|word| !word.is_empty())
    {
        match (word, version) {
            ("rbind" | "norbind", _) => {}
            ("noidmap", 250..) => mapped = false,
            ("idmap", 250..) | ("rootidmap", 252..) | ("owneridmap", 256..) => mapped = true,
            _ => {
                return Err(Refusal::invalid(format!(
                    "Invalid bind mount option: {}",
                    word_list(text)
                )));
            }
        }
    }
    Ok(Mount::Bind {
        source,
        destination,
        mapped,
    })
}

fn word_list(text: &str) -> String {
    let options = words(text, 3).pop().unwrap_or_default();
    // In the real tool too the message ends at the first unknown option.
    options
        .split(',')
        .find(|word| !["rbind", "norbind", "noidmap", "idmap", "rootidmap"].contains(word))
        .map_or_else(|| options.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn bound(text: &str) -> Result<Mount, String> {
        mount(252, "bind", text).map_err(|refusal| refusal.message)
    }

    #[test]
    fn a_bind_mount_is_source_destination_and_options() {
        let mount = |source: &str, destination: &str, mapped| {
            Ok(Mount::Bind {
                source: source.into(),
                destination: destination.into(),
                mapped,
            })
        };
        assert_eq!(bound("/a"), mount("/a", "/a", false));
        assert_eq!(bound(r"/a\:b:/c"), mount("/a:b", "/c", false));
        assert_eq!(bound("/a:/b:rbind,idmap"), mount("/a", "/b", true));
        assert_eq!(bound("+/a:/b"), mount("+/a", "/b", false));
        assert_eq!(bound(":/b"), mount("", "/b", false));
        assert_eq!(
            bound("/a:/b:ro"),
            Err("Invalid bind mount option: ro".into())
        );
        assert_eq!(
            bound("/a:b"),
            Err("Failed to parse --bind(-ro)= argument /a:b: Invalid argument".into())
        );
    }

    #[test]
    fn mapping_words_came_one_after_the_other() {
        assert!(mount(249, "bind", "/a:/b:idmap").is_err());
        assert!(mount(255, "bind", "/a:/b:owneridmap").is_err());
        assert!(mount(256, "bind", "/a:/b:owneridmap").is_ok());
    }

    #[rstest]
    #[case("a", true)]
    #[case("A-b.C", true)]
    #[case("a_b", false)]
    #[case("a..b", false)]
    #[case("a.", false)]
    #[case("a-", false)]
    #[case("-a", false)]
    #[case("a-.b", false)]
    #[case("é", false)]
    fn a_machine_name_is_a_strict_host_name(#[case] name: &str, #[case] good: bool) {
        assert_eq!(host_name("machine name", name).is_ok(), good);
    }

    #[test]
    fn a_machine_name_has_at_most_64_characters() {
        assert!(host_name("machine name", &"a".repeat(64)).is_ok());
        assert!(host_name("machine name", &"a".repeat(65)).is_err());
    }

    #[rstest]
    #[case("80", Ok("tcp:80"))]
    #[case("udp:80:53", Ok("udp:80"))]
    #[case("0", Err("Failed to parse host port 0: Invalid argument"))]
    #[case(
        "70000",
        Err("Failed to parse host port 70000: Numerical result out of range")
    )]
    #[case("80-90", Err("Failed to parse host port 80-90: Invalid argument"))]
    fn a_port_is_protocol_host_and_container(
        #[case] text: &str,
        #[case] wanted: Result<&str, &str>,
    ) {
        let found = port(text).map_err(|refusal| refusal.message);
        assert_eq!(found.as_deref().map_err(String::as_str), wanted);
    }

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

    #[rstest]
    #[case("TERM", Some(15))]
    #[case("SIGRTMIN+4", Some(38))]
    #[case("64", Some(64))]
    #[case("0", None)]
    #[case("65", None)]
    #[case("RTMIN+40", None)]
    #[case("FOO", None)]
    fn a_signal_is_a_name_or_a_number(#[case] text: &str, #[case] number: Option<i32>) {
        assert_eq!(signal(text).ok(), number);
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
