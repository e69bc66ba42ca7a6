//! Networks. Everything that creates interfaces runs in the test's own network namespace.

use std::os::unix::fs::symlink;

use nomad_driver_nspawn::container::{Dns, NetworkNamespace, Users};
use rstest::rstest;

use super::inside::{Inside, private_users};
use super::*;

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_network_options_the_container_is_in_the_hosts_network() {
    let stage = Stage::new();
    let host = fs::read_link("/proc/self/ns/net").unwrap();
    let ended = stage
        .run(stage.words(&["/bin/readlink", "/proc/self/ns/net"]))
        .await;
    assert_eq!(ended.said().trim(), host.to_str().unwrap());
    stage.leave();
}

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_groups_network_is_joined_with_and_without_user_namespaces() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    namespace.ip(&["link", "add", "e2elink", "type", "bridge"]);
    namespace.ip(&["address", "add", "198.51.100.7/32", "dev", "e2elink"]);
    let plugin = stage.plugin().await;
    for users in [false, true] {
        let task = stage
            .shell("ip -o address show dev e2elink")
            .with("user_namespacing", users)
            .network(&namespace.path());
        let ended = stage.run_on(&plugin, task).await;
        assert!(ended.said().contains("198.51.100.7/32"), "{ended:?}");
    }
    let task = stage
        .shell("exit 0")
        .with("network_zone", "e2e")
        .network(&namespace.path());
    let refused = stage.refused(&plugin, task).await;
    assert!(refused.contains("config.network_zone"), "{refused}");
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_addresses_of_a_network_of_its_own_are_shown() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    namespace.ip(&["address", "add", "192.0.2.7/24", "dev", "lo"]);
    let plugin = stage.plugin().await;
    let hosts = stage.shell("echo up; exec sleep 1000");
    let joined = hosts.clone().network(&namespace.path());
    for (task, wanted) in [(joined, Some("192.0.2.7")), (hosts, None)] {
        let task = stage.up(&plugin, task).await;
        let inspected = task.inspect(&plugin).await.unwrap().driver.unwrap();
        let addresses = inspected.attributes.get("addresses");
        assert_eq!(addresses.map(String::as_str), wanted, "{inspected:?}");
        task.destroy(&plugin).await;
    }
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// Real only: network and user namespaces. The user namespace of the container does not own the network of the group.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_user_listens_on_a_low_port_in_a_groups_network() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    let plugin = stage.plugin().await;
    for user in ["root", "bob"] {
        let task = stage
            .shell("httpd -p 80 -h / && echo bound")
            .with("user_namespacing", true)
            .with("user", user)
            .network(&namespace.path());
        let ended = stage.run_on(&plugin, task).await;
        assert!(ended.said() == "bound\n", "{user}: {ended:?}");
    }
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// Real only: mount points. In the group's network and then in the host's.
#[rstest]
#[case::files("files", false, Users::Host)]
#[case::files_in_a_user_namespace("files", false, private_users())]
#[case::links("links", false, private_users())]
#[case::links_in_a_read_only_root("links", true, Users::Host)]
#[case::read_only_links_in_a_user_namespace("links", true, private_users())]
#[case::nothing("nothing", false, private_users())]
#[case::nothing_in_a_read_only_root("nothing", true, Users::Host)]
#[case::read_only_nothing_in_a_user_namespace("nothing", true, private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_has_resolv_conf_and_hosts_in_any_tree(
    #[case] tree: &str,
    #[case] read_only: bool,
    #[case] users: Users,
) {
    let inside = Inside::new();
    let namespace = Namespace::new(inside.stage.name());
    namespace.ip(&["address", "add", "192.0.2.7/24", "dev", "lo"]);
    let etc = inside.stage.join("tree/etc");
    for (name, target) in [
        ("hosts", "/run/none/hosts"),
        ("resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
    ] {
        let path = etc.join(name);
        fs::remove_file(&path).unwrap();
        match tree {
            "files" => fs::write(path, "192.0.2.99 old\n").unwrap(),
            "links" => symlink(target, path).unwrap(),
            _ => {}
        }
    }
    let spec = |namespace, dns| {
        inside
            .spec("cat /etc/resolv.conf; tail -n 1 /etc/hosts; hostname; echo x >> /etc/hosts")
            .with(|spec| {
                spec.users = users.clone();
                spec.rootfs.read_only = read_only;
                spec.network.resolv_conf = None;
                spec.network.namespace = namespace;
                spec.network.dns = dns;
                spec.payload.command[2].push_str(" || exit 0");
            })
    };
    let dns = Dns {
        servers: vec!["192.0.2.53".parse().unwrap()],
        searches: vec!["trial.example".to_owned()],
        options: vec!["ndots:3".to_owned()],
    };
    let name = spec(NetworkNamespace::Host, Dns::default())
        .identity
        .machine;
    let printed = inside
        .run(spec(NetworkNamespace::Join(namespace.path()), dns))
        .await;
    assert_eq!(
        printed,
        format!(
            "nameserver 192.0.2.53\nsearch trial.example\noptions ndots:3\n192.0.2.7 {name}\n{name}\n"
        )
    );
    let of_host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    fs::write(inside.stage.join("stdout"), "").unwrap();
    let printed = inside
        .run(spec(NetworkNamespace::Host, Dns::default()))
        .await;
    // An empty file that the first container has left as a mount point counts as none.
    let line = match tree {
        "files" => "192.0.2.99 old\n".to_owned(),
        _ => format!("127.0.1.1 {name}\n"),
    };
    assert_eq!(printed, format!("{of_host}{line}{name}\n"));
    drop(namespace);
    inside.stage.leave();
}
