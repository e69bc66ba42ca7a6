//! Validates what Nomad says about name resolution: the `dns` block of the network, and the host name that comes with a network that
//! another driver has made. Does no I/O.

use std::net::IpAddr;

use crate::container::{Dns, HostName};

use super::decode::quoted;
use super::identity::is_label;
use super::{ConfigError, RequestedDns, RequestedHostName};

/// More than any resolver uses.
const ENTRIES_MAX: usize = 32;
/// The longest domain name, with a dot at its end.
const DOMAIN_MAX: usize = 254;
const OPTION_MAX: usize = 64;
/// The longest host name that the kernel takes.
const HOST_NAME_MAX: usize = 64;

/// The `dns` block.
pub(super) fn dns(given: &RequestedDns) -> Result<Dns, ConfigError> {
    let lists = [
        ("servers", &given.servers),
        ("searches", &given.searches),
        ("options", &given.options),
    ];
    for (name, list) in lists {
        if list.len() > ENTRIES_MAX {
            let reason = format!(
                "has {} entries; at most {ENTRIES_MAX} are allowed",
                list.len()
            );
            return Err(ConfigError::new(format!("task.dns.{name}"), reason));
        }
    }
    let servers = given.servers.iter().enumerate().map(server);
    Ok(Dns {
        servers: servers.collect::<Result<_, _>>()?,
        searches: words(
            "searches",
            &given.searches,
            is_domain,
            "is not a domain name: use letters, digits, -, _ and dots, or . alone, at most 254 bytes",
        )?,
        options: words(
            "options",
            &given.options,
            is_option,
            "is not an option of resolv.conf: use letters, digits, :, -, _ and dots, without spaces, at most 64 bytes",
        )?,
    })
}

fn server((index, text): (usize, &String)) -> Result<IpAddr, ConfigError> {
    text.parse().map_err(|_| {
        let reason = format!(
            "{} is not an IP address, which a name server has to be",
            quoted(text)
        );
        ConfigError::new(format!("task.dns.servers[{index}]"), reason)
    })
}

/// The entries of a list, each of which becomes a word of a line.
fn words(
    name: &str,
    given: &[String],
    is_valid: impl Fn(&str) -> bool,
    fault: &str,
) -> Result<Vec<String>, ConfigError> {
    match given.iter().position(|word| !is_valid(word)) {
        None => Ok(given.to_vec()),
        Some(index) => Err(ConfigError::new(
            format!("task.dns.{name}[{index}]"),
            format!("{} {fault}", quoted(&given[index])),
        )),
    }
}

fn is_domain(text: &str) -> bool {
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(in_name);
    text == "."
        || text.len() <= DOMAIN_MAX && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

fn is_option(text: &str) -> bool {
    let is_valid = |byte: u8| in_name(byte) || matches!(byte, b':' | b'.');
    (1..=OPTION_MAX).contains(&text.len()) && text.bytes().all(is_valid)
}

fn in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// The host name of a group whose network another driver has made. Nomad names none for a network of its own.
pub(super) fn host_name(given: &RequestedHostName) -> Result<Option<HostName>, ConfigError> {
    const OPTION: &str = "task.network_isolation.hosts_config";
    let RequestedHostName { name, address } = given;
    if name.is_empty() {
        return Ok(None);
    }
    if name.len() > HOST_NAME_MAX || !name.split('.').all(is_label) {
        let reason = format!(
            "{} is not a host name: use letters, digits, - and dots, at most 64 bytes, no part of it empty or with a - at an end",
            quoted(name)
        );
        return Err(ConfigError::new(format!("{OPTION}.hostname"), reason));
    }
    let address = match address.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| {
            let reason = format!("{} is not an IP address", quoted(text));
            ConfigError::new(format!("{OPTION}.address"), reason)
        })?),
    };
    Ok(Some(HostName {
        name: name.clone(),
        address,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn requested(list: &str, entries: Vec<String>) -> RequestedDns {
        let mut dns = RequestedDns::default();
        match list {
            "servers" => dns.servers = entries,
            "searches" => dns.searches = entries,
            _ => dns.options = entries,
        }
        dns
    }

    #[test]
    fn a_dns_block_is_read() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let given = RequestedDns {
            servers: words(&["192.0.2.53", "2001:db8::53"]),
            searches: words(&["trial.example", "a_b.example.", "."]),
            options: words(&["ndots:3", "single-request-reopen"]),
        };
        let read = dns(&given).unwrap();
        assert_eq!(read.servers.len(), 2);
        assert_eq!(
            (read.searches, read.options),
            (given.searches, given.options)
        );
        assert_eq!(dns(&RequestedDns::default()), Ok(Dns::default()));
    }

    #[rstest]
    #[case("servers", "")]
    #[case("servers", "dns.example")]
    #[case("servers", "192.0.2.53\nnameserver 10.0.0.1")]
    #[case("servers", "192.0.2.53 ")]
    #[case("servers", "fe80::1%eth0")]
    #[case("searches", "")]
    #[case("searches", "a b")]
    #[case("searches", "a\nnameserver 10.0.0.1")]
    #[case("searches", "a..b")]
    #[case("searches", "~.")]
    #[case("searches", "b\u{fc}cher.example")]
    #[case("options", "")]
    #[case("options", "ndots:3 edns0")]
    #[case("options", "ndots:3\nnameserver 10.0.0.1")]
    #[case("options", "#x")]
    fn anything_else_is_refused(#[case] list: &str, #[case] entry: &str) {
        let error = dns(&requested(list, vec![entry.to_owned()])).unwrap_err();
        assert_eq!(error.option, format!("task.dns.{list}[0]"));
        assert!(
            error
                .reason
                .starts_with(&format!("{} is not ", quoted(entry))),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }

    #[rstest]
    #[case("servers", "::1")]
    #[case("searches", "a")]
    #[case("options", "a")]
    fn lists_have_a_length(#[case] list: &str, #[case] entry: &str) {
        let entries = |count| requested(list, vec![entry.to_owned(); count]);
        assert!(dns(&entries(ENTRIES_MAX)).is_ok());
        let error = dns(&entries(ENTRIES_MAX + 1)).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("task.dns.{list}: has 33 entries; at most 32 are allowed")
        );
    }

    fn named(name: &str, address: &str) -> Result<Option<HostName>, ConfigError> {
        host_name(&RequestedHostName {
            name: name.to_owned(),
            address: address.to_owned(),
        })
    }

    #[test]
    fn a_host_name_and_its_address() {
        assert_eq!(named("", "").unwrap(), None);
        let read = named("web.example", "172.26.64.7").unwrap().unwrap();
        assert_eq!(read.name, "web.example");
        assert_eq!(read.address, Some("172.26.64.7".parse().unwrap()));
        assert_eq!(named("web", "").unwrap().unwrap().address, None);
        assert!(named(&"a".repeat(64), "").is_ok());
    }

    #[rstest]
    #[case("a b", "", "hostname")]
    #[case("a\n10.0.0.1 b", "", "hostname")]
    #[case("-a", "", "hostname")]
    #[case("a..b", "", "hostname")]
    #[case("a_b", "", "hostname")]
    #[case("web", "10.0.0.1 x", "address")]
    #[case("web", "10.0.0.0/8", "address")]
    fn a_bad_host_name_is_refused(#[case] name: &str, #[case] address: &str, #[case] part: &str) {
        let error = named(name, address).unwrap_err();
        assert_eq!(
            error.option,
            format!("task.network_isolation.hosts_config.{part}")
        );
        let long = named(&"a".repeat(65), "").unwrap_err();
        assert!(long.reason.contains("at most 64 bytes"), "{long}");
    }
}
