//! Networks and ports.

use super::*;
use crate::container::{HostInterface, InterfaceMode, Link};

fn forward(label: &str, host: u16, container: u16) -> PortForward {
    PortForward {
        label: label.into(),
        address: None,
        host,
        container,
    }
}

/// Whether its ids can be mapped is found out from the file system, when the start is prepared.
#[rstest]
#[case("volatile = \"yes\"")]
#[case("volatile = \"state\"")]
#[case("volatile = \"overlay\"")]
#[case("volatile = \"state\"\nprivate_users = \"1048576\"")]
#[case("volatile = \"state\"\nprivate_users_ownership = \"map\"")]
#[case("volatile = \"state\"\nprivate_users_ownership = \"off\"")]
#[case("volatile = \"state\"\nuser_namespacing = false")]
fn a_root_of_several_mounts_is_allowed_with_all_users(#[case] options: &str) {
    let host = TestHost::new();
    host.check(&format!("image = \"tree\"\nboot = false\n{options}"))
        .unwrap();
}

#[test]
fn a_port_keeps_its_address() {
    let mut host = with_ports();
    host.context.ports[0].address = Some("10.0.0.1".parse().unwrap());
    let NetworkNamespace::Private { ports, .. } =
        plain(&host, r#"ports = ["web", "raw"]"#).network.namespace
    else {
        panic!("no private network")
    };
    assert_eq!(ports[0].address, Some("10.0.0.1".parse().unwrap()));
    assert_eq!(ports[1].address, None);
}

#[test]
fn ports_are_forwarded_into_the_container() {
    let host = with_ports();
    let spec = plain(&host, r#"ports = ["web", "raw"]"#);
    let private = |ports| NetworkNamespace::Private {
        link: Link::Routed,
        ports,
        interfaces: Vec::new(),
    };
    let expected = vec![forward("web", 18080, 80), forward("raw", 19000, 19000)];
    assert_eq!(spec.network.namespace, private(expected));
    assert_eq!(spec.payload.environment["NOMAD_PORT_web"], "80");
    let spec = plain(&host, "port_map = { old = 80, web = 81 }");
    let expected = vec![
        forward("old", 20001, 80),
        forward("web", 18080, 81),
        forward("same", 20002, 20002),
    ];
    assert_eq!(spec.network.namespace, private(expected));
    assert_eq!(spec.payload.environment["NOMAD_PORT_old"], "80");
    assert_eq!(plain(&host, "").network.namespace, NetworkNamespace::Host);
}

#[rstest]
#[case(
    r#"ports = ["web", "web"]"#,
    r#"config.ports[1]: "web" is listed twice"#
)]
#[case(
    r#"ports = ["x"]"#,
    r#"config.ports[0]: "x" is not a port label: the job's ports are "old", "raw", "same", "web""#
)]
#[case("port_map = { x = 1 }", r#"config.port_map["x"]: "x" is not a port label: the job's ports are "old", "raw", "same", "web""#)]
#[case(
    "port_map = { old = 0 }",
    r#"config.port_map["old"]: 0 is not a port number from 1 to 65535"#
)]
#[case(
    "port_map = { old = 65536 }",
    r#"config.port_map["old"]: 65536 is not a port number from 1 to 65535"#
)]
#[case(
    "port_map = { old = 1.5 }",
    r#"config.port_map["old"]: 1.5 is not a port number from 1 to 65535"#
)]
#[case(
    "port_map = { old = 80 }\nports = [\"web\"]",
    "config.port_map: can't be combined with config.ports"
)]
#[case(
    "ports = [\"web\"]\nnetwork_veth = false",
    "config.network_veth: false can't be combined with config.ports or config.port_map: ports are forwarded into a private network"
)]
fn bad_ports_are_refused_with_a_reason(#[case] extra: &str, #[case] message: &str) {
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    assert_eq!(with_ports().refusal(&body), message);
}

#[test]
fn two_labels_with_one_host_port_are_refused() {
    let mut host = with_ports();
    host.context.ports[1].host = 18080;
    assert_eq!(
        host.refusal("image = \"tree\"\nboot = false\nports = [\"web\", \"raw\"]"),
        r#"config.ports[1]: "raw" has the host port 18080, which "web" already uses"#
    );
}

#[test]
fn a_network_of_the_group_is_joined() {
    let mut host = with_ports();
    host.context.network_namespace = Some("/var/run/netns/x".into());
    let body = "image = \"tree\"\nboot = false\n";
    let join = NetworkNamespace::Join("/var/run/netns/x".into());
    let validated = host.check(body).unwrap();
    assert_eq!(
        (validated.spec.network.namespace, validated.notes),
        (join.clone(), vec![])
    );
    let validated = host
        .check(&format!(
            "{body}network_veth = true\nport_map = {{ web = 80 }}"
        ))
        .unwrap();
    assert_eq!(validated.spec.network.namespace, join);
    assert_eq!(
        validated.spec.payload.environment["NOMAD_PORT_web"],
        "18080"
    );
    assert_eq!(
        validated.notes,
        [
            "config.network_veth has no effect, because the task is in the network of its group. Remove it from the task, or the network mode from the group",
            "config.port_map has no effect, because the task is in the network of its group. Remove it from the task, or the network mode from the group",
        ]
    );
    assert_eq!(
        host.refusal(&format!("{body}port_map = {{ web = 81 }}")),
        r#"config.port_map["web"]: 81 is not 80, the port to which the group network forwards: set to = 81 in the port block of the group"#
    );
    assert_eq!(
        host.refusal(&format!("{body}network_zone = \"z\"")),
        r#"config.network_zone: "z" can't be combined with a network mode of the group"#
    );
    assert_eq!(
        host.refusal(&format!("{body}network_mode = \"none\"")),
        r#"config.network_mode: "none" can't be combined with a network mode of the group"#
    );
    assert_eq!(
        host.refusal(&format!("{body}network_mode = \"task:db\"")),
        r#"config.network_mode: "task:db" can't be combined with a network mode of the group"#
    );
}

#[test]
fn the_network_of_another_task_is_joined() {
    let host = TestHost::new();
    let namespace = NetworkNamespace::OfTask {
        task: "db:1".to_owned(),
        leader: None,
    };
    assert_eq!(
        plain(&host, "network_mode = \"task:db:1\"")
            .network
            .namespace,
        namespace
    );
}

fn zone(name: &str) -> Link {
    Link::Zone(name.to_owned())
}

fn bridge(name: &str) -> Link {
    Link::Bridge(name.to_owned())
}

#[rstest]
#[case("network_veth = true", Link::Routed)]
#[case("network_mode = \"bridge\"", Link::Routed)]
#[case("network_mode = \"none\"", Link::None)]
#[case("network_zone = \"z\"", zone("z"))]
#[case("network_mode = \"zone:z\"", zone("z"))]
#[case("network_zone = \"12\"\nnetwork_veth = false", zone("12"))]
#[case("network_bridge = \"br0\"\nnetwork_veth = true", bridge("br0"))]
fn private_networks(#[case] extra: &str, #[case] link: Link) {
    let ports = vec![];
    let expected = NetworkNamespace::Private {
        link,
        ports,
        interfaces: Vec::new(),
    };
    assert_eq!(plain(&TestHost::new(), extra).network.namespace, expected);
}

#[test]
fn an_operator_decides_what_a_task_has_that_asks_for_nothing() {
    let mut host = TestHost::new();
    host.plugin_config.private_network = true;
    let (link, ports) = (Link::Routed, vec![]);
    let private = NetworkNamespace::Private {
        link,
        ports,
        interfaces: Vec::new(),
    };
    assert_eq!(plain(&host, "").network.namespace, private);
    for extra in ["network_veth = false", "network_mode = \"host\""] {
        assert_eq!(
            plain(&host, extra).network.namespace,
            NetworkNamespace::Host
        );
    }
}

#[rstest]
#[case(
    "network_mode = \"nat\"",
    r#"config.network_mode: "nat" is not host, none, bridge, zone:NAME or task:NAME"#
)]
#[case(
    "network_mode = \"task:\"",
    r#"config.network_mode: "task:" is not host, none, bridge, zone:NAME or task:NAME"#
)]
#[case(
    "network_mode = \"task:web\"",
    r#"config.network_mode: "web" is this task itself"#
)]
#[case("network_mode = \"task:db\"\nports = [\"web\"]", r#"config.ports: can't be set beside a network_mode of another task: it belongs to the network of the task "db", set it there"#)]
#[case("network_mode = \"task:db\"\nport_map = { old = 80 }", r#"config.port_map: can't be set beside a network_mode of another task: it belongs to the network of the task "db", set it there"#)]
#[case("network_mode = \"task:db\"\nnetwork_macvlan = [\"eth0\"]", r#"config.network_macvlan: can't be set beside a network_mode of another task: it belongs to the network of the task "db", set it there"#)]
#[case("network_mode = \"zone:\"", r#"config.network_mode: "" is not a valid zone name: use 1 to 12 letters, digits, -, _ and dots"#)]
#[case(
    "network_mode = \"none\"\nnetwork_zone = \"z\"",
    r#"config.network_zone: "z" can't be combined with config.network_mode"#
)]
#[case(
    "network_mode = \"host\"\nnetwork_veth = true",
    "config.network_veth: true can't be combined with config.network_mode"
)]
#[case("network_mode = \"none\"\nports = [\"web\"]", r#"config.network_mode: "none" can't be combined with config.ports or config.port_map: ports are forwarded into a private network"#)]
#[case("network_mode = \"host\"\nport_map = { old = 80 }", r#"config.network_mode: "host" can't be combined with config.ports or config.port_map: ports are forwarded into a private network"#)]
fn a_bad_network_is_refused_with_a_reason(#[case] extra: &str, #[case] message: &str) {
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    assert_eq!(with_ports().refusal(&body), message);
}

#[test]
fn a_low_port_in_the_hosts_network_is_a_note() {
    let mut host = with_ports();
    host.context.ports[0].host = 1;
    let first = crate::sys::kernel::first_unprivileged_port();
    for (extra, noted) in [
        ("", first > 1),
        ("user_namespacing = false", false),
        ("private_users = \"no\"", false),
        ("network_veth = true", false),
    ] {
        let body = format!("image = \"tree\"\nboot = false\n{extra}");
        let notes = host.check(&body).unwrap().notes;
        let is_noted = notes.iter().any(|note| note.contains("\"web\" (1)"));
        assert_eq!(is_noted, noted, "{extra}: {notes:?}");
    }
}

#[test]
fn interfaces_of_the_host_are_used_besides() {
    let interface = |mode, name: &str| HostInterface {
        mode,
        name: name.to_owned(),
    };
    for (extra, expected) in [("", Link::None), ("network_veth = true", Link::Routed)] {
        let body = format!(
            "network_macvlan = [\"eth1\"]\nnetwork_ipvlan = [\"eth2\"]\nnetwork_interface = [\"eth3\"]\n{extra}"
        );
        let NetworkNamespace::Private {
            link, interfaces, ..
        } = plain(&TestHost::new(), &body).network.namespace
        else {
            panic!("no private network")
        };
        assert_eq!(link, expected);
        let wanted = [
            interface(InterfaceMode::Macvlan, "eth1"),
            interface(InterfaceMode::Ipvlan, "eth2"),
            interface(InterfaceMode::Moved, "eth3"),
        ];
        assert_eq!(interfaces, wanted);
    }
}

#[rstest]
#[case("network_macvlan = [\"a:b\"]", r#"config.network_macvlan[0]: "a:b" is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits"#)]
#[case("network_interface = [\"sixteencharacter\"]", r#"config.network_interface[0]: "sixteencharacter" is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits"#)]
#[case(
    "network_ipvlan = [\"eth1\", \"eth1\"]",
    r#"config.network_ipvlan[1]: "eth1" is listed twice"#
)]
#[case(
    "network_mode = \"host\"\nnetwork_ipvlan = [\"eth1\"]",
    "config.network_mode: can't be combined with config.network_ipvlan: an interface is used by a network of the container's own"
)]
fn bad_interfaces_are_refused_with_a_reason(#[case] extra: &str, #[case] message: &str) {
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    assert_eq!(TestHost::new().refusal(&body), message);
}

#[test]
fn an_operator_keeps_the_interfaces_of_the_host() {
    let mut host = TestHost::new();
    host.plugin_config.devices = false;
    assert_eq!(
        host.refusal("image = \"tree\"\nboot = false\nnetwork_interface = [\"eth0\"]"),
        r#"config.network_interface[0]: "eth0" is a device of the host, and the plugin option devices is false on this node"#
    );
}
