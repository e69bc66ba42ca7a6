//! Tells the user about ports on which the task can't listen. Does no I/O.

use crate::container::{NetworkNamespace, Users};

use super::AllocatedPort;
use super::decode::quoted;

/// The note about ports in the host's network below `first`, the first port that needs no privilege there: a user namespace has no
/// privilege in a network that belongs to the host. Allocated ports are known, and those that the command uses anyway are not.
pub(super) fn note(
    ports: &[AllocatedPort],
    network: &NetworkNamespace,
    users: &Users,
    first: u16,
) -> Option<String> {
    let in_host = *network == NetworkNamespace::Host && *users != Users::Host;
    let low = ports
        .iter()
        .filter(|port| in_host && port.host != 0 && port.host < first);
    let mut low: Vec<_> = low
        .map(|port| format!("{} ({})", quoted(&port.label), port.host))
        .collect();
    low.sort();
    low.dedup();
    if low.is_empty() {
        return None;
    }
    Some(format!(
        "the task can't listen on ports below {first} in the host's network, because it has a user namespace: {}. Set \
         config.user_namespacing = false, or mode = \"bridge\" in the network block of the group, or use a port from {first} on",
        low.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(numbers: &[u16]) -> Vec<AllocatedPort> {
        let port = |host: &u16| AllocatedPort {
            label: format!("p{host}"),
            host: *host,
            to: 0,
            address: None,
            task_level: false,
        };
        numbers.iter().map(port).collect()
    }

    fn private_users() -> Users {
        Users::Private {
            range: "pick".to_owned(),
            ownership: None,
        }
    }

    #[test]
    fn low_ports_in_the_hosts_network_are_named_with_the_ways_out() {
        let (host, users) = (NetworkNamespace::Host, private_users());
        let note = |numbers: &[u16]| super::note(&ports(numbers), &host, &users, 1024);
        let text = note(&[8080, 443, 80, 1024]).unwrap();
        for part in [
            "\"p443\" (443), \"p80\" (80). ",
            "user_namespacing = false",
            "mode = \"bridge\"",
            "from 1024 on",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(note(&[1024, 8080]), None);
        // One that Nomad has not allocated.
        assert_eq!(note(&[0]), None);
    }

    #[test]
    fn other_networks_no_user_namespace_and_an_open_host_need_no_note() {
        let ports = ports(&[80]);
        let join = NetworkNamespace::Join("/run/netns/a".into());
        let host = NetworkNamespace::Host;
        assert_eq!(note(&ports, &join, &private_users(), 1024), None);
        assert_eq!(note(&ports, &host, &Users::Host, 1024), None);
        assert_eq!(note(&ports, &host, &private_users(), 80), None);
        assert!(note(&ports, &host, &private_users(), 81).is_some());
    }
}
