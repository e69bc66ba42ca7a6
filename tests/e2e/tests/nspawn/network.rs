//! Networks. Everything that creates interfaces runs in the test's own network namespace.

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

/// Real only: network interfaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_veth_a_zone_and_a_bridge_come_and_go_with_the_container() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    namespace.ip(&["link", "add", "e2ebr", "type", "bridge"]);
    let plugin = stage.plugin_in(&namespace).await;
    let names = || namespace.ip(&["-o", "link"]);
    let text = "ls /sys/class/net; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let wanted = [
        ("network_veth", json!(true), vec!["ve-"]),
        (
            "network_zone",
            json!("e2e"),
            vec!["vb-", "vz-e2e", "master vz-e2e"],
        ),
        (
            "network_bridge",
            json!("e2ebr"),
            vec!["vb-", "master e2ebr"],
        ),
    ];
    for (option, value, links) in wanted {
        let task = stage.shell(text).with(option, value);
        let running = stage.start(&plugin, task).await;
        let inside = running.stdout.contains("up").await;
        assert!(inside.contains("host0"), "{option}: {inside}");
        let outside = names();
        for link in links {
            assert!(outside.contains(link), "{option}: {outside}");
        }
        assert_eq!(running.stop(&plugin, AMPLE, "SIGTERM").await.code, 0);
        running.destroy(&plugin).await;
        within(option, async {
            while ["ve-", "vb-", "vz-"]
                .iter()
                .any(|kind| names().contains(kind))
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    end(plugin).await;
    drop(namespace);
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
