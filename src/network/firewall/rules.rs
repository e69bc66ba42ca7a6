//! What the driver's table contains, in nft's language: sets, chains and rules, which are the same on every host, and the elements of a plan.
//! The statements are accepted by nft 0.9.8 (Debian 11) and later ones: those need `addr . port` and a protocol before the map, and can't
//! have keys and values that are concatenations of different types.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

use sha2::{Digest as _, Sha256};

use crate::container::Cause;
use crate::network::{LINK_PREFIX, NetworkError, NetworkPlan, ZONE_PREFIX};

/// The driver's table, of the family `inet`. A name with other characters could be no word of nft's language, or one with a meaning.
pub const TABLE: &str = "nomad_driver_nspawn";

/// How the names of the interfaces begin on which only packets of containers arrive.
const PREFIXES: [&str; 2] = [LINK_PREFIX, ZONE_PREFIX];

/// The longest comment of an element, in bytes.
const MAX_COMMENT: usize = 128;

/// The sets and maps of the table. An element of a port is for TCP and UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    /// Ports of all addresses of the host.
    Ports4,
    /// Ports of one address.
    Ports4At,
    /// As [`Self::Ports4`], for IPv6.
    Ports6,
    /// As [`Self::Ports4At`], for IPv6.
    Ports6At,
    /// Addresses of containers.
    Addresses4,
    /// The same for IPv6.
    Addresses6,
    /// Links of containers, each with the address that is behind it.
    Links4,
    /// The same for IPv6.
    Links6,
}

impl Set {
    const ALL: [Self; 8] = [
        Self::Ports4,
        Self::Ports4At,
        Self::Ports6,
        Self::Ports6At,
        Self::Addresses4,
        Self::Addresses6,
        Self::Links4,
        Self::Links6,
    ];

    /// Part of what drivers of other versions find: they remove elements that this one has added.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ports4 => "ports4",
            Self::Ports4At => "ports4_at",
            Self::Ports6 => "ports6",
            Self::Ports6At => "ports6_at",
            Self::Addresses4 => "addresses4",
            Self::Addresses6 => "addresses6",
            Self::Links4 => "links4",
            Self::Links6 => "links6",
        }
    }

    /// The kind of the object, and the types of its elements.
    fn definition(self) -> (&'static str, &'static str) {
        match self {
            Self::Ports4 => ("map", "inet_service : ipv4_addr . inet_service"),
            Self::Ports4At => ("map", "ipv4_addr . inet_service : ipv4_addr . inet_service"),
            Self::Ports6 => ("map", "inet_service : ipv6_addr . inet_service"),
            Self::Ports6At => ("map", "ipv6_addr . inet_service : ipv6_addr . inet_service"),
            Self::Addresses4 => ("set", "ipv4_addr"),
            Self::Addresses6 => ("set", "ipv6_addr"),
            Self::Links4 => ("set", "ifname . ipv4_addr"),
            Self::Links6 => ("set", "ifname . ipv6_addr"),
        }
    }

    pub(super) fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.name() == name)
    }
}

/// An element of a set or a map, without its comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) set: Set,
    pub(super) key: Vec<String>,
    /// `None` in a set.
    pub(super) value: Option<Vec<String>>,
}

impl Element {
    fn set(set: Set, key: &[&dyn ToString]) -> Self {
        Self {
            set,
            key: key.iter().map(|part| part.to_string()).collect(),
            value: None,
        }
    }

    fn map(set: Set, key: &[&dyn ToString], value: &[&dyn ToString]) -> Self {
        Self {
            value: Some(value.iter().map(|part| part.to_string()).collect()),
            ..Self::set(set, key)
        }
    }

    /// The address of the container that it is about.
    pub(super) fn container(&self) -> Option<&str> {
        let text = match (self.set, &self.value) {
            (Set::Links4 | Set::Links6, _) => self.key.get(1),
            (_, Some(value)) => value.first(),
            (_, None) => self.key.first(),
        };
        text.map(String::as_str)
    }

    /// Whether both can't be in the table at once.
    pub(super) fn has_key_of(&self, other: &Self) -> bool {
        self.set == other.set && self.key == other.key
    }

    /// The statement that does something with it.
    fn statement(&self, verb: &str, owner: &str) -> String {
        let mut key = self.key.clone();
        if let (Set::Links4 | Set::Links6, Some(link)) = (self.set, key.first_mut()) {
            *link = format!("\"{link}\"");
        }
        let mut text = key.join(" . ");
        if verb != "delete" {
            let _ = write!(text, " comment \"{owner}\"");
            if let Some(value) = &self.value {
                let _ = write!(text, " : {}", value.join(" . "));
            }
        }
        format!(
            "{verb} element inet {TABLE} {} {{ {text} }}\n",
            self.set.name()
        )
    }
}

/// The statements that add these elements. They fail if one of them exists.
pub(super) fn create(elements: &[Element], owner: &str) -> String {
    let statements = elements
        .iter()
        .map(|element| element.statement("create", owner));
    statements.collect()
}

/// The statements that remove this element if it exists, and fail if it has another value: adding it fails then.
pub(super) fn remove(element: &Element, owner: &str) -> String {
    element.statement("add", owner) + &element.statement("delete", owner)
}

/// The statements that remove these elements, which fail if an address or a link among them is not there.
pub(super) fn remove_all(elements: &[Element], owner: &str) -> String {
    let statements = elements.iter().map(|element| match element.value {
        None => element.statement("delete", owner),
        Some(_) => remove(element, owner),
    });
    statements.collect()
}

/// The statement that removes the table.
pub(super) fn delete() -> String {
    format!("delete table inet {TABLE}\n")
}

/// The set of which every plan has an element.
pub(super) const EVERY: Set = Set::Addresses4;

/// The statements that make the table with its sets, chains and rules, or replace the rules of one that exists. Elements stay.
pub(super) fn base() -> String {
    let mut text = format!("add table inet {TABLE}\n");
    for set in Set::ALL {
        let (kind, types) = set.definition();
        let _ = writeln!(
            text,
            "add {kind} inet {TABLE} {} {{ type {types}; }}",
            set.name()
        );
    }
    for (chain, hook, rules) in chains() {
        let _ = writeln!(text, "add chain inet {TABLE} {chain} {{ type {hook}; }}");
        let _ = writeln!(text, "flush chain inet {TABLE} {chain}");
        for rule in rules {
            let _ = writeln!(text, "add rule inet {TABLE} {chain} {rule}");
        }
    }
    text
}

fn chains() -> [(&'static str, &'static str, Vec<String>); 4] {
    // With `route_localnet` on a link, a container could reach what listens on a loopback address only. An address of a neighbour, or of
    // anyone else, is not the container's to use; 0.0.0.0, :: and link-local addresses are for finding out the own one.
    let incoming = PREFIXES.iter().flat_map(|prefix| {
        let from = format!("iifname \"{prefix}*\"");
        [
            format!("{from} ip daddr 127.0.0.0/8 drop"),
            format!("{from} ip saddr != 0.0.0.0 iifname . ip saddr != @links4 drop"),
            format!("{from} ip6 saddr != {{ ::, fe80::/10 }} iifname . ip6 saddr != @links6 drop"),
        ]
    });
    let incoming = incoming.collect();
    // A packet that is not in the map goes on to the next rule. Not ::1: the kernel drops the answers of a container to it, so a connection
    // would end after minutes instead of being refused.
    let forwarded = [
        "meta l4proto { tcp, udp } dnat ip addr . port to ip daddr . th dport map @ports4_at",
        "meta l4proto { tcp, udp } dnat ip6 addr . port to ip6 daddr . th dport map @ports6_at",
        "meta nfproto ipv4 meta l4proto { tcp, udp } fib daddr type local dnat ip addr . port to th dport map @ports4",
        "meta l4proto { tcp, udp } ip6 daddr != ::1 fib daddr type local dnat ip6 addr . port to th dport map @ports6",
    ];
    // To itself or to a neighbour through an address of the host: the answer has to come back through the host. A container can't answer
    // 127.0.0.1. Others can't answer a container. Connections from other hosts keep their source.
    let outgoing = [
        "ct status dnat ip saddr @addresses4 ip daddr @addresses4 masquerade",
        "ct status dnat ip6 saddr @addresses6 ip6 daddr @addresses6 masquerade",
        "ip saddr 127.0.0.0/8 ip daddr @addresses4 masquerade",
        "ip saddr @addresses4 ip daddr != @addresses4 masquerade",
        "ip6 saddr @addresses6 ip6 daddr != @addresses6 masquerade",
    ];
    let owned = |rules: &[&str]| {
        rules
            .iter()
            .map(|&rule| rule.to_owned())
            .collect::<Vec<_>>()
    };
    // Numbers, because names of priorities differ between versions: those of conntrack and of the two kinds of NAT are -200, -100 and 100.
    // At equal priority the chain that was loaded last would win.
    [
        ("incoming", "filter hook prerouting priority -300", incoming),
        (
            "forwarded",
            "nat hook prerouting priority -101",
            owned(&forwarded),
        ),
        (
            "forwarded_local",
            "nat hook output priority -101",
            owned(&forwarded),
        ),
        (
            "outgoing",
            "nat hook postrouting priority 99",
            owned(&outgoing),
        ),
    ]
}

/// The elements of a plan, each once, with what it is about.
pub(super) fn elements(plan: &NetworkPlan) -> Vec<(Element, String)> {
    let (v4, v6) = (&plan.address, &plan.address6);
    let address = |address: &dyn ToString| format!("the address {}", address.to_string());
    let mut all = vec![
        (Element::set(Set::Addresses4, &[v4]), address(v4)),
        (Element::set(Set::Addresses6, &[v6]), address(v6)),
    ];
    if let Some(link) = plan.arrives_on() {
        let about = format!("the link {link}");
        all.push((Element::set(Set::Links4, &[&link, v4]), about.clone()));
        all.push((Element::set(Set::Links6, &[&link, v6]), about));
    }
    for port in &plan.ports {
        let about = port.to_string();
        let (to4, to6): ([&dyn ToString; 2], [&dyn ToString; 2]) =
            ([v4, &port.container], [v6, &port.container]);
        let elements = match &port.address {
            None => vec![
                Element::map(Set::Ports4, &[&port.host], &to4),
                Element::map(Set::Ports6, &[&port.host], &to6),
            ],
            // As for all addresses: the answers would be dropped.
            Some(IpAddr::V6(Ipv6Addr::LOCALHOST)) => Vec::new(),
            Some(IpAddr::V4(at)) => vec![Element::map(Set::Ports4At, &[at, &port.host], &to4)],
            Some(IpAddr::V6(at)) => vec![Element::map(Set::Ports6At, &[at, &port.host], &to6)],
        };
        all.extend(elements.into_iter().map(|element| (element, about.clone())));
    }
    let mut once: Vec<(Element, String)> = Vec::new();
    for (element, about) in all {
        if !once.iter().any(|(other, _)| *other == element) {
            once.push((element, about));
        }
    }
    once
}

/// Refuses a plan whose elements exclude each other, or whose link the rules do not match.
pub(super) fn check(
    plan: &NetworkPlan,
    elements: &[(Element, String)],
) -> Result<(), NetworkError> {
    let refused = |reason| {
        let cause = Cause::Config;
        Err(NetworkError { cause, reason })
    };
    if let Some(link) = plan.arrives_on().filter(|link| !is_link(link)) {
        return refused(format!("{link:?} is no name of a container's link"));
    }
    for (index, (element, about)) in elements.iter().enumerate() {
        let mut before = elements.iter().take(index);
        if let Some((_, other)) = before.find(|(other, _)| other.has_key_of(element)) {
            return refused(format!(
                "{other} and {about} lead to different ports of the container"
            ));
        }
    }
    Ok(())
}

/// Whether the rules match a link of this name, and nft's language can express it.
pub(super) fn is_link(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let has_prefix = PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    name.len() <= 15 && has_prefix && name.bytes().all(is_plain)
}

/// The comment of an owner's elements: the owner, unless nft could not print and read it again. Different owners have different ones.
pub(super) fn tag(owner: &str) -> String {
    let is_plain = |char: char| matches!(char, ' ' | '!' | '#'..='&' | '('..='[' | ']'..='~');
    if owner.len() <= MAX_COMMENT && !owner.is_empty() && owner.chars().all(is_plain) {
        return owner.to_owned();
    }
    let hash = Sha256::digest(owner.as_bytes());
    let hash: String = hash
        .iter()
        .take(8)
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let plain = owner
        .chars()
        .map(|char| if is_plain(char) { char } else { '_' });
    let begin: String = plain.take(MAX_COMMENT - hash.len() - 1).collect();
    format!("{begin}~{hash}")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::network::testing::{plan, port};

    #[rstest]
    #[case::usual("1ee9c5f4-75fa-a0b1-ddf4-7e3b6f2c9f05/web", true)]
    #[case::with_spaces("1ee9c5f4/web server #1 (blue)", true)]
    #[case::none("", false)]
    #[case::quote("1ee9c5f4/a\"b", false)]
    #[case::single_quote("1ee9c5f4/a'b", false)]
    #[case::backslash("1ee9c5f4/a\\", false)]
    #[case::line("1ee9c5f4/a\nflush ruleset", false)]
    #[case::not_ascii("1ee9c5f4/wéb", false)]
    #[case::long(&"x".repeat(129), false)]
    #[case::longest(&"x".repeat(128), true)]
    fn a_comment_is_the_owner_or_a_plain_text_with_a_hash(#[case] owner: &str, #[case] kept: bool) {
        let tag = tag(owner);
        assert_eq!(tag == owner, kept, "{tag}");
        assert!(tag.len() <= MAX_COMMENT, "{tag}");
        assert!(!tag.contains(['"', '\'', '\\', '\n']), "{tag}");
    }

    #[test]
    fn owners_that_differ_in_what_is_replaced_have_different_comments() {
        let long = "x".repeat(200);
        assert_ne!(tag("a/b\""), tag("a/b'"));
        assert_ne!(tag(&format!("{long}1")), tag(&format!("{long}2")));
    }

    #[test]
    fn a_port_is_one_element_for_each_address_family_and_both_protocols() {
        let mut plan = plan(1, &[port("http", None, 8080, 80)]);
        plan.ports.push(port("again", None, 8080, 80));
        plan.ports.push(port("one", Some("192.0.2.1"), 53, 5353));
        plan.ports.push(port("six", Some("2001:db8::1"), 53, 5353));
        plan.ports.push(port("loopback", Some("::1"), 53, 5353));
        let elements: Vec<Element> = elements(&plan)
            .into_iter()
            .map(|(element, _)| element)
            .collect();
        insta::assert_snapshot!(create(&elements, "alloc/task"), @r#"
        create element inet nomad_driver_nspawn addresses4 { 10.77.0.1 comment "alloc/task" }
        create element inet nomad_driver_nspawn addresses6 { fd77::1 comment "alloc/task" }
        create element inet nomad_driver_nspawn links4 { "nd-1" . 10.77.0.1 comment "alloc/task" }
        create element inet nomad_driver_nspawn links6 { "nd-1" . fd77::1 comment "alloc/task" }
        create element inet nomad_driver_nspawn ports4 { 8080 comment "alloc/task" : 10.77.0.1 . 80 }
        create element inet nomad_driver_nspawn ports6 { 8080 comment "alloc/task" : fd77::1 . 80 }
        create element inet nomad_driver_nspawn ports4_at { 192.0.2.1 . 53 comment "alloc/task" : 10.77.0.1 . 5353 }
        create element inet nomad_driver_nspawn ports6_at { 2001:db8::1 . 53 comment "alloc/task" : fd77::1 . 5353 }
        "#);
    }

    #[rstest]
    #[case::two_targets("nd-1", &[("a", 8080, 80), ("b", 8080, 81)], "port \"a\" (8080) and port \"b\" (8080)")]
    #[case::a_link_of_someone_else("eth0", &[], "\"eth0\"")]
    #[case::a_link_with_a_quote("nd-\"", &[], "no name")]
    #[case::a_long_link("nd-0123456789abc", &[], "no name")]
    fn an_impossible_plan_is_refused(
        #[case] link: &str,
        #[case] ports: &[(&str, u16, u16)],
        #[case] reason: &str,
    ) {
        let mut plan = plan(1, &[]);
        plan.link = link.to_owned();
        plan.ports = ports
            .iter()
            .map(|(label, host, to)| port(label, None, *host, *to))
            .collect();
        let error = check(&plan, &elements(&plan)).unwrap_err();
        assert_eq!(error.cause, Cause::Config);
        assert!(error.reason.contains(reason), "{error}");
    }

    #[test]
    fn only_plain_words_name_sets() {
        for set in Set::ALL {
            assert!(
                set.name()
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            );
            assert_eq!(Set::of_name(set.name()), Some(set));
        }
        assert_eq!(Set::of_name("of_another_version"), None);
    }
}
