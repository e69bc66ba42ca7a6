//! Booted systems in a network that the driver makes.

use std::collections::BTreeSet;

use rstest::rstest;

use super::own_network::{Hosts, addresses, ask, within_network};
use super::*;

/// Enables systemd-networkd and the unit that waits for it, and a server that says `page` on port 80. The test's own unit starts when the
/// network is online.
fn network_units(tree: &Path) {
    let units = tree.join("etc/systemd/system");
    let write = |name: &str, text: &str| {
        let path = units.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write(
        "e2e.service.d/online.conf",
        "[Unit]\nWants=network-online.target\nAfter=network-online.target page.socket\nRequires=page.socket\n",
    );
    write("page.socket", "[Socket]\nListenStream=80\nAccept=yes\n");
    write(
        "page@.service",
        "[Service]\nExecStart=/bin/sh -c \"read get; read empty; echo page\"\nStandardInput=socket\n",
    );
    for (target, unit) in [
        ("multi-user", "systemd-networkd.service"),
        ("network-online", "systemd-networkd-wait-online.service"),
    ] {
        let wants = units.join(format!("{target}.target.wants"));
        fs::create_dir_all(&wants).unwrap();
        symlink(
            Path::new("/usr/lib/systemd/system").join(unit),
            wants.join(unit),
        )
        .unwrap();
    }
}

/// Says how the units are, and last that it has.
const SAY: &str = "{ systemctl is-active systemd-networkd systemd-networkd-wait-online network-online.target; \
    systemctl --failed --no-legend --plain; echo end; } >> /local/said 2>&1";

/// Boots this tree with a network of its own, and waits until it has said everything.
async fn boot(stage: &Stage, plugin: &Plugin, tree: &Path, users: bool) -> (Running, String) {
    let task = stage
        .words(&[])
        .with("image", json!(tree))
        .with("boot", true)
        .with("user_namespacing", users)
        .with("network_veth", true);
    let running = stage.start(plugin, task).await;
    let said = running.allocation.task_dir().join("local/said");
    let said = tokio::task::block_in_place(|| {
        until("the test's unit", || {
            let text = fs::read_to_string(&said).unwrap_or_default();
            text.ends_with("end\n").then_some(text)
        })
    });
    (running, said)
}

/// What the host's `ip` says in the network of a task.
async fn ip_of(running: &Running, plugin: &Plugin, words: &[&str]) -> String {
    let inspected = running.inspect(plugin).await.unwrap().driver.unwrap();
    let namespace = format!("--net=/proc/{}/ns/net", inspected.attributes["pid"]);
    let output = Command::new("nsenter")
        .args([&*namespace, "ip"])
        .args(words)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn of_link(running: &Running, plugin: &Plugin) -> BTreeSet<String> {
    let text = ip_of(running, plugin, &["-br", "address", "show", "dev", "host0"]).await;
    let words = text.split_whitespace().filter(|word| word.contains('/'));
    let own = words.filter(|word| !word.starts_with("fe80:"));
    own.map(str::to_owned).collect()
}

/// systemd-networkd would replace addresses and routes by those of a DHCP client, and who waits for the network would wait in vain. Real only:
/// a real init.
#[rstest]
#[case::with_user_namespace(true)]
#[case::without(false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networkd_of_a_booted_system_keeps_the_network_and_is_online(#[case] users: bool) {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let tree = stage.join("debian");
    debian::copy(&tree, SAY, "true");
    network_units(&tree);
    let plugin = stage.plugin_in(&hosts.host).await;
    let (running, said) = boot(&stage, &plugin, &tree, users).await;
    assert_eq!(said, "active\nactive\nactive\nend\n");
    let own = addresses(&running, &plugin).await;
    let wanted = [format!("{}/32", own[0]), format!("{}/128", own[1])];
    assert_eq!(of_link(&running, &plugin).await, BTreeSet::from(wanted));
    for (family, gateway) in [("-4", "via 169.254.1.1 "), ("-6", "via fe80::1 ")] {
        let routes = ip_of(&running, &plugin, &[family, "route", "show", "default"]).await;
        assert_eq!(routes.lines().count(), 1, "{routes}");
        assert!(routes.contains(gateway), "{routes}");
    }
    for address in &own {
        let said = within_network(&hosts.host, || ask(address, 80));
        assert!(
            said.as_ref().is_ok_and(|said| said == "page\n"),
            "{address}: {said:?}"
        );
    }
    let exit = running.stop(&plugin, AMPLE, "").await;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    running.destroy(&plugin).await;
    end(plugin).await;
    drop(hosts);
    stage.leave();
}

/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_may_configure_its_link_itself() {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    let tree = stage.join("debian");
    debian::copy(&tree, SAY, "true");
    network_units(&tree);
    fs::write(
        tree.join("etc/systemd/network/10-own.network"),
        "[Match]\nName=host0\n\n[Network]\nAddress=198.51.100.9/24\n",
    )
    .unwrap();
    let plugin = stage.plugin_in(&hosts.host).await;
    let (running, said) = boot(&stage, &plugin, &tree, true).await;
    assert_eq!(said, "active\nactive\nactive\nend\n");
    let found = of_link(&running, &plugin).await;
    assert!(found.contains("198.51.100.9/24"), "{found:?}");
    running.stop(&plugin, AMPLE, "").await;
    running.destroy(&plugin).await;
    end(plugin).await;
    drop(hosts);
    stage.leave();
}
