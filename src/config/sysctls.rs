//! Validates the kernel settings of a container: only those that belong to one of its own namespaces. The list is docker's.

use std::collections::BTreeMap;

use crate::container::NetworkNamespace;

use super::ConfigError;
use super::decode::{entry, quoted};
use super::values::has_control;

const SYSCTL: &str = "config.sysctl";
/// Settings of the IPC namespace.
const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];
/// Below these every setting belongs to the IPC or the network namespace.
const MQUEUE: &str = "fs.mqueue.";
const NET: &str = "net.";

/// The longest name and the longest value, in bytes: a file name's and a page's.
const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 4096;

/// The settings by name, with `.` between the parts of a name.
pub(super) fn sysctls(
    given: Option<&BTreeMap<String, String>>,
    network: &NetworkNamespace,
) -> Result<BTreeMap<String, String>, ConfigError> {
    let mut sysctls = BTreeMap::new();
    for (written, value) in given.into_iter().flatten() {
        let option = entry(SYSCTL, written);
        let name = canonical(&option, written)?;
        check_namespace(&option, &name, network)?;
        check_value(&option, value)?;
        if sysctls.insert(name.clone(), value.clone()).is_some() {
            let reason = format!("{} is set twice", quoted(&name));
            return Err(ConfigError::new(option, reason));
        }
    }
    Ok(sysctls)
}

/// The name with `.` between its parts and `/` for a `.` in a part, as in `net.ipv4.conf.eth0/1.forwarding`. As in sysctl(8) the first
/// `.` or `/` decides which of the two separates the parts.
fn canonical(option: &str, written: &str) -> Result<String, ConfigError> {
    let refused = |fault: &str| Err(ConfigError::new(option, fault));
    if written.len() > NAME_MAX {
        return refused("the name is longer than 255 bytes");
    }
    if has_control(written) || written.contains(char::is_whitespace) {
        return refused("the name contains a space or a control character");
    }
    let slashes = written.find(['.', '/']).map(|at| &written[at..=at]) == Some("/");
    let name: String = match slashes {
        false => written.to_owned(),
        true => written.chars().map(swapped).collect(),
    };
    // As the file's name has it: in the canonical form a part contains `/` for `.`.
    let part_is_name = |part: &str| !["", "/", "//"].contains(&part);
    if name.split('.').all(part_is_name) {
        return Ok(name);
    }
    refused("the name has an empty part, or . or .. as a part")
}

fn swapped(char: char) -> char {
    match char {
        '.' => '/',
        '/' => '.',
        other => other,
    }
}

fn check_namespace(
    option: &str,
    name: &str,
    network: &NetworkNamespace,
) -> Result<(), ConfigError> {
    if name.starts_with(NET) {
        if *network != NetworkNamespace::Host {
            return Ok(());
        }
        let reason = "belongs to the network of the host, which this task uses: set config.network_veth = true, network_zone or \
                      network_bridge, or mode = \"bridge\" in the network block of the group";
        return Err(ConfigError::new(option, reason));
    }
    if name.starts_with(MQUEUE) || IPC.contains(&name) {
        return Ok(());
    }
    let reason = format!(
        "is not a setting of a container but of the whole host: use one of {}, {MQUEUE}* and {NET}*",
        IPC.join(", ")
    );
    Err(ConfigError::new(option, reason))
}

fn check_value(option: &str, value: &str) -> Result<(), ConfigError> {
    let fault = if value.trim().is_empty() {
        "the value is empty"
    } else if value.contains(['\n', '\0']) {
        "the value contains a newline or a NUL character"
    } else if value.len() > VALUE_MAX {
        "the value is longer than 4096 bytes"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(option, fault))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn read(name: &str, value: &str, network: &NetworkNamespace) -> Result<String, String> {
        let given = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let read = sysctls(Some(&given), network).map_err(|error| error.to_string())?;
        let (name, value) = read.into_iter().next().unwrap();
        Ok(format!("{name}={value}"))
    }

    fn group() -> NetworkNamespace {
        NetworkNamespace::Join("/var/run/netns/a".into())
    }

    #[rstest]
    #[case("net.core.somaxconn", "4096", "net.core.somaxconn=4096")]
    #[case("net/core/somaxconn", "4096", "net.core.somaxconn=4096")]
    #[case(
        "net.ipv4.ip_local_port_range",
        "1024\t65000",
        "net.ipv4.ip_local_port_range=1024\t65000"
    )]
    #[case(
        "net.ipv4.conf.eth0/1.forwarding",
        "1",
        "net.ipv4.conf.eth0/1.forwarding=1"
    )]
    #[case(
        "net/ipv4/conf/eth0.1/forwarding",
        "1",
        "net.ipv4.conf.eth0/1.forwarding=1"
    )]
    #[case("fs.mqueue.msg_max", "100", "fs.mqueue.msg_max=100")]
    #[case("kernel.sem", "250 32000 100 128", "kernel.sem=250 32000 100 128")]
    #[case("kernel/shm_rmid_forced", "1", "kernel.shm_rmid_forced=1")]
    fn settings_of_a_namespace(#[case] name: &str, #[case] value: &str, #[case] wanted: &str) {
        assert_eq!(read(name, value, &group()), Ok(wanted.to_owned()));
    }

    const HOSTS: &str = "is not a setting of a container but of the whole host: use one of kernel.msgmax, kernel.msgmnb, kernel.msgmni, kernel.sem, kernel.shmall, kernel.shmmax, kernel.shmmni, kernel.shm_rmid_forced, fs.mqueue.* and net.*";
    const PARTS: &str = "the name has an empty part, or . or .. as a part";

    #[rstest]
    #[case("kernel.msg_next_id", "1", HOSTS)]
    #[case("kernel.core_pattern", "|/x", HOSTS)]
    #[case("vm.swappiness", "1", HOSTS)]
    #[case("netx.core", "1", HOSTS)]
    #[case("net", "1", HOSTS)]
    #[case("fs.mqueue", "1", HOSTS)]
    #[case("fs.file-max", "1", HOSTS)]
    #[case("kernel.sem.x", "1", HOSTS)]
    #[case("", "1", PARTS)]
    #[case("net.", "1", PARTS)]
    #[case(".net.x", "1", PARTS)]
    #[case("/net/core/x", "1", PARTS)]
    #[case("net..x", "1", PARTS)]
    #[case("net/../kernel/core_pattern", "1", PARTS)]
    #[case("net/./x", "1", PARTS)]
    #[case("net.//.kernel.core_pattern", "1", PARTS)]
    #[case("net./.x", "1", PARTS)]
    #[case("net.a b", "1", "the name contains a space or a control character")]
    #[case("net.a\nb", "1", "the name contains a space or a control character")]
    #[case("net.x", "", "the value is empty")]
    #[case("net.x", " ", "the value is empty")]
    #[case("net.x", "1\n2", "the value contains a newline or a NUL character")]
    fn anything_else_is_refused(#[case] name: &str, #[case] value: &str, #[case] reason: &str) {
        let wanted = format!("config.sysctl[{name:?}]: {reason}");
        assert_eq!(read(name, value, &group()), Err(wanted));
    }

    #[test]
    fn names_and_values_have_a_length() {
        let name = format!("net.{}", "x".repeat(251));
        let value = "x".repeat(VALUE_MAX);
        assert!(read(&name, &value, &group()).is_ok());
        let long = read(&format!("{name}x"), "1", &group()).unwrap_err();
        assert!(
            long.ends_with(": the name is longer than 255 bytes"),
            "{long}"
        );
        let long = read("net.x", &format!("{value}x"), &group()).unwrap_err();
        assert!(
            long.ends_with(": the value is longer than 4096 bytes"),
            "{long}"
        );
    }

    #[test]
    fn a_setting_of_the_network_needs_a_network() {
        let message = read("net.core.somaxconn", "1", &NetworkNamespace::Host).unwrap_err();
        assert!(message.contains("config.network_veth = true"), "{message}");
        assert!(message.contains("mode = \"bridge\""), "{message}");
        assert!(read("kernel.sem", "1", &NetworkNamespace::Host).is_ok());
    }

    #[test]
    fn two_spellings_of_one_name_are_refused() {
        let given = ["net.core.somaxconn", "net/core/somaxconn"]
            .map(|name| (name.to_owned(), "1".to_owned()))
            .into();
        let message = sysctls(Some(&given), &group()).unwrap_err().to_string();
        assert_eq!(
            message,
            r#"config.sysctl["net/core/somaxconn"]: "net.core.somaxconn" is set twice"#
        );
    }
}
