//! Validates what concerns names: the `dns` block of the network, the host name, and names for `/etc/hosts`. Does no I/O.

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

const HOST_NAME_FAULT: &str = "is not a host name: use letters, digits, - and dots, at most 64 bytes, no part of it empty or with a - at an end";

fn is_host_name(name: &str) -> bool {
    name.len() <= HOST_NAME_MAX && name.split('.').all(is_label)
}

/// The host name: that of the job, or of a group whose network another driver has made. Nomad names none for a network of its own.
pub(super) fn host_name(
    of_job: Option<&str>,
    given: &RequestedHostName,
) -> Result<Option<HostName>, ConfigError> {
    const OPTION: &str = "task.network_isolation.hosts_config";
    let refused = |option: &str, name: &str| {
        ConfigError::new(option, format!("{} {HOST_NAME_FAULT}", quoted(name)))
    };
    let RequestedHostName { name, address } = given;
    if !name.is_empty() && !is_host_name(name) {
        return Err(refused(&format!("{OPTION}.hostname"), name));
    }
    let address = match address.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| {
            let reason = format!("{} is not an IP address", quoted(text));
            ConfigError::new(format!("{OPTION}.address"), reason)
        })?),
    };
    match of_job {
        Some(own) if !is_host_name(own) => Err(refused("config.hostname", own)),
        None if name.is_empty() => Ok(None),
        own => Ok(Some(HostName {
            name: own.unwrap_or(name).to_owned(),
            address,
        })),
    }
}

/// The names for `/etc/hosts`.
pub(super) fn extra_hosts(given: &[String]) -> Result<Vec<(String, IpAddr)>, ConfigError> {
    let entries = given.iter().enumerate().map(|(index, text)| {
        let entry = text.split_once(':').and_then(|(name, address)| {
            // As docker accepts it too.
            let inner = address
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'));
            let address = inner.unwrap_or(address).parse().ok()?;
            is_host_name(name).then(|| (name.to_owned(), address))
        });
        entry.ok_or_else(|| {
            let reason = format!(
                "{} is not NAME:ADDRESS, a host name and an IP address",
                quoted(text)
            );
            ConfigError::new(format!("config.extra_hosts[{index}]"), reason)
        })
    });
    entries.collect()
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
        host_name(
            None,
            &RequestedHostName {
                name: name.to_owned(),
                address: address.to_owned(),
            },
        )
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

    #[rstest]
    #[case::of_the_job(Some("web.example"), "", Some("web.example"))]
    #[case::of_the_group(None, "of-group", Some("of-group"))]
    #[case::of_both(Some("web"), "of-group", Some("web"))]
    #[case::of_none(None, "", None)]
    fn the_job_decides_about_its_host_name(
        #[case] of_job: Option<&str>,
        #[case] of_group: &str,
        #[case] want: Option<&str>,
    ) {
        let given = RequestedHostName {
            name: of_group.to_owned(),
            address: "192.0.2.7".to_owned(),
        };
        let found = host_name(of_job, &given).unwrap();
        assert_eq!(found.as_ref().map(|found| &*found.name), want);
        let address = found.and_then(|found| found.address);
        assert_eq!(address.is_some(), want.is_some());
    }

    #[rstest]
    #[case("")]
    #[case("a b")]
    #[case("-a")]
    #[case("a..b")]
    fn a_bad_host_name_of_the_job_is_refused(#[case] name: &str) {
        let error = host_name(Some(name), &RequestedHostName::default()).unwrap_err();
        assert_eq!(error.option, "config.hostname");
        assert!(error.reason.contains("is not a host name"), "{error}");
    }

    #[test]
    fn names_for_hosts_are_read() {
        let given = [
            "db.example:192.0.2.10",
            "cache:[2001:db8::1]",
            "c:2001:db8::2",
        ];
        let read = extra_hosts(&given.map(str::to_owned)).unwrap();
        let want = [
            ("db.example", "192.0.2.10"),
            ("cache", "2001:db8::1"),
            ("c", "2001:db8::2"),
        ];
        assert_eq!(
            read,
            want.map(|(name, address)| (name.to_owned(), address.parse().unwrap()))
        );
    }

    #[rstest]
    #[case("db")]
    #[case("db:")]
    #[case(":192.0.2.1")]
    #[case("db:192.0.2.1 evil")]
    #[case("d b:192.0.2.1")]
    #[case("db:other")]
    #[case("db\nx:192.0.2.1")]
    fn other_entries_for_hosts_are_refused(#[case] entry: &str) {
        let error = extra_hosts(&["a:192.0.2.1".to_owned(), entry.to_owned()]).unwrap_err();
        assert_eq!(error.option, "config.extra_hosts[1]");
        assert!(error.reason.contains("is not NAME:ADDRESS"), "{error}");
    }
}
