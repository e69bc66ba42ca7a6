//! The texts of a container's `/etc/resolv.conf` and `/etc/hosts`, and of the configuration of an image's systemd-resolved. Pure.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use crate::container::Dns;

/// What a resolv.conf says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Addresses, those of link-local ones with `%` and an interface.
    pub servers: Vec<String>,
    /// The domains in which short names are looked up.
    pub searches: Vec<String>,
    /// The options of the resolver.
    pub options: Vec<String>,
}

impl Resolver {
    /// Reads a resolv.conf as the C library does: of several `search` and `domain` lines the last one counts.
    pub fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => resolver.servers.extend(words.next()),
                Some("search") => resolver.searches = words.collect(),
                Some("domain") => resolver.searches = words.take(1).collect(),
                Some("options") => resolver.options.extend(words),
                _ => {}
            }
        }
        resolver
    }

    /// The same with the lists of a dns block in place of its own, as far as they are not empty.
    #[must_use]
    pub fn with(mut self, dns: &Dns) -> Self {
        if !dns.servers.is_empty() {
            self.servers = dns.servers.iter().map(IpAddr::to_string).collect();
        }
        if !dns.searches.is_empty() {
            self.searches.clone_from(&dns.searches);
        }
        if !dns.options.is_empty() {
            self.options.clone_from(&dns.options);
        }
        self
    }

    /// The same without servers that can only be reached in the network to which the text belongs.
    #[must_use]
    pub fn without_loopback(mut self) -> Self {
        self.servers.retain(|server| !is_loopback(server));
        self
    }

    /// Whether it has servers, all of them on loopback addresses.
    pub fn is_on_loopback(&self) -> bool {
        !self.servers.is_empty() && self.servers.iter().all(|server| is_loopback(server))
    }

    /// As the content of `/etc/resolv.conf`.
    pub fn resolv_conf(&self) -> String {
        let mut text = String::new();
        for server in &self.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        for (keyword, words) in [("search", &self.searches), ("options", &self.options)] {
            if !words.is_empty() {
                let _ = writeln!(text, "{keyword} {}", words.join(" "));
            }
        }
        text
    }

    /// As a configuration file of systemd-resolved, which has no such options. Its own server on a loopback address is off: all
    /// containers of a network would share the address. It then lists these servers in its resolv.conf.
    pub fn resolved_conf(&self) -> String {
        // `~.` is every name: no link has servers of its own.
        let domains = self.searches.iter().map(String::as_str);
        let domains: Vec<_> = domains.filter(|name| *name != ".").chain(["~."]).collect();
        format!(
            "[Resolve]\nDNS={}\nDomains={}\nDNSStubListener=no\n",
            self.servers.join(" "),
            domains.join(" ")
        )
    }
}

fn is_loopback(server: &str) -> bool {
    server
        .parse::<IpAddr>()
        .is_ok_and(|address| address.to_canonical().is_loopback())
}

/// An `/etc/hosts` for a container with this name and these addresses. Without one that others can reach, it is a loopback address,
/// so that the name can be looked up at all.
pub fn hosts(name: &str, addresses: &[IpAddr], extra: &[(String, IpAddr)]) -> String {
    let is_usable = |address: &&IpAddr| match address {
        IpAddr::V4(_) => true,
        // Means nothing without an interface.
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    let mut own: Vec<_> = addresses.iter().filter(is_usable).copied().collect();
    if own.is_empty() {
        own.push(Ipv4Addr::new(127, 0, 1, 1).into());
    }
    let mut text = "127.0.0.1 localhost\n\
                    ::1 localhost ip6-localhost ip6-loopback\n\
                    ff02::1 ip6-allnodes\n\
                    ff02::2 ip6-allrouters\n"
        .to_owned();
    let own = own.iter().map(|address| (address, name));
    let extra = extra.iter().map(|(name, address)| (address, name.as_str()));
    for (address, name) in own.chain(extra) {
        let _ = writeln!(text, "{address} {name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# a comment\n; another\nnameserver 10.0.0.53\nnameserver fe80::1%eth0 \ndomain one.example\n\
                        search a.example b.example\noptions edns0\noptions ndots:2 trust-ad\nsortlist 10.0.0.0\nnameserver\n";

    fn dns(servers: &[&str], searches: &[&str], options: &[&str]) -> Dns {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Dns {
            servers: servers
                .iter()
                .map(|server| server.parse().unwrap())
                .collect(),
            searches: words(searches),
            options: words(options),
        }
    }

    #[test]
    fn each_list_of_a_dns_block_replaces_that_of_the_host() {
        let host = Resolver::parse(HOST);
        let same = "nameserver 10.0.0.53\nnameserver fe80::1%eth0\nsearch a.example b.example\noptions edns0 ndots:2 trust-ad\n";
        assert_eq!(host.resolv_conf(), same);
        assert_eq!(host.clone().with(&Dns::default()).resolv_conf(), same);
        let servers = host
            .clone()
            .with(&dns(&["192.0.2.53", "fd00::53"], &[], &[]));
        assert_eq!(
            servers.resolv_conf(),
            "nameserver 192.0.2.53\nnameserver fd00::53\nsearch a.example b.example\noptions edns0 ndots:2 trust-ad\n"
        );
        let rest = host.with(&dns(&[], &["."], &["ndots:3"]));
        assert_eq!(
            rest.resolv_conf(),
            "nameserver 10.0.0.53\nnameserver fe80::1%eth0\nsearch .\noptions ndots:3\n"
        );
        assert_eq!(Resolver::parse("").resolv_conf(), "");
        assert_eq!(Resolver::parse("search a\ndomain b c\n").searches, ["b"]);
    }

    #[test]
    fn servers_on_loopback_addresses_belong_to_the_host() {
        let stub = Resolver::parse("nameserver 127.0.0.53\nnameserver ::1\nsearch a.example\n");
        assert!(stub.is_on_loopback());
        assert_eq!(stub.without_loopback().resolv_conf(), "search a.example\n");
        let both = Resolver::parse("nameserver 127.0.0.1\nnameserver 10.0.0.53\n");
        assert!(!both.is_on_loopback());
        assert_eq!(both.without_loopback().servers, ["10.0.0.53"]);
        assert!(!Resolver::default().is_on_loopback());
    }

    #[test]
    fn an_images_resolved_gets_servers_and_domains() {
        let resolver =
            Resolver::default().with(&dns(&["192.0.2.53", "fd00::53"], &["a.example", "."], &[]));
        assert_eq!(
            resolver.resolved_conf(),
            "[Resolve]\nDNS=192.0.2.53 fd00::53\nDomains=a.example ~.\nDNSStubListener=no\n"
        );
    }

    #[test]
    fn a_container_is_in_its_own_hosts_file() {
        let end = |addresses: &[&str]| {
            let addresses: Vec<_> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            let text = hosts("web-1", &addresses, &[]);
            let begin = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n";
            text.strip_prefix(begin).unwrap().to_owned()
        };
        assert_eq!(
            end(&["172.26.64.7", "fd00::7", "fe80::7"]),
            "172.26.64.7 web-1\nfd00::7 web-1\n"
        );
        assert_eq!(end(&["fe80::7"]), "127.0.1.1 web-1\n");
        assert_eq!(end(&[]), "127.0.1.1 web-1\n");
    }
}
