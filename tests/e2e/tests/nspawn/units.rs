//! The table of what works in booted systems in docs/booted-systems.md, measured: the units of stock images, and units that restrict
//! themselves. Each run compares the rows of the installed systemd-nspawn.

use dev_agent::Plugin;
use rstest::rstest;
use support::not_applicable;

use super::own_network::Hosts;
use super::*;

const PROBE: &str = include_str!("units/probe.sh");

/// A network of the container: its name in the table, the value of `network_mode`, the capabilities that are added, and whether it is tried
/// without a user namespace.
type Network = (&'static str, &'static str, &'static [&'static str], bool);

const NETWORKS: [Network; 3] = [
    ("the host's", "host", &[], true),
    (
        "the host's, `capability = [\"CAP_NET_ADMIN\"]`",
        "host",
        &["CAP_NET_ADMIN"],
        // It would be a capability on the host.
        false,
    ),
    ("none", "none", &[], true),
];
/// In a network namespace of the test, because the driver changes the host's.
const OWN: Network = ("its own", "bridge", &[], true);

/// What a system has said: the units that have failed, and the restrictions that are not what they are on a host.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    failed: Vec<String>,
    limited: Vec<String>,
}

impl Found {
    fn in_text(said: &str, network: &Network) -> Self {
        let all = |kind: &str| -> Vec<String> {
            let lines = said.lines().filter_map(|line| line.strip_prefix(kind));
            lines.map(str::to_owned).collect()
        };
        // Without a network of its own, nothing in a container's `/proc/sys` can be written anyway.
        let mut unproven = all("unproven ");
        unproven.retain(|name| network.1 != "host" || name != "ProtectKernelTunables=yes");
        assert_eq!(unproven, Vec::<String>::new(), "{said}");
        let (failed, limited) = (all("failed "), all("limited "));
        assert_eq!(all("works ").len() + limited.len(), 18, "{said}");
        Self { failed, limited }
    }

    fn cells(&self) -> String {
        let text = |all: &[String]| match all {
            [] => "none".to_owned(),
            all => all.join("; "),
        };
        format!("{} | {} |", text(&self.failed), text(&self.limited))
    }
}

/// The rows of one image.
struct Rows<'a> {
    stage: &'a Stage,
    tree: &'a Path,
    start: String,
    text: String,
}

impl Rows<'_> {
    async fn boot(&self, plugin: &Plugin, network: &Network, users: bool) -> Found {
        let (_, mode, capability, _) = network;
        let task = self
            .stage
            .words(&[])
            .with("image", json!(self.tree))
            .with("boot", true)
            .with("ready", "notify")
            .with("user_namespacing", users)
            .with("network_mode", *mode)
            .with("capability", json!(capability));
        let running = self.stage.start(plugin, task).await;
        let script = ["/bin/sh", "-c", PROBE];
        let said = plugin.exec(&running.id, &script, None).await.unwrap();
        running.stop(plugin, AMPLE, "").await;
        running.destroy(plugin).await;
        Found::in_text(&String::from_utf8_lossy(&said.stdout), network)
    }

    /// Adds the rows of this network.
    async fn add(&mut self, plugin: &Plugin, network: Network) {
        let with = self.boot(plugin, &network, true).await;
        let mut found = vec![("with", with)];
        if network.3 {
            found.push(("without", self.boot(plugin, &network, false).await));
        }
        if found.len() == 2 && found[0].1 == found[1].1 {
            found.truncate(1);
            found[0].0 = "with or without";
        }
        for (users, found) in found {
            let (start, name, cells) = (&self.start, network.0, found.cells());
            self.text += &format!("{start} {name} | {users} | {cells}\n");
        }
    }

    /// The row of an image that this host can't boot.
    async fn add_refusal(&mut self, plugin: &Plugin) {
        let task = self.stage.words(&[]).with("image", json!(self.tree));
        let error = self.stage.refused(plugin, task.with("boot", true)).await;
        let (_, reason) = error.split_once(": the image ").expect(&error);
        let (reason, _) = reason.split_once(", which boots only ").expect(&error);
        assert!(reason.starts_with("has systemd 2"), "{error}");
        let start = &self.start;
        self.text += &format!("{start} any, on a host with cgroup v1 | | refused | |\n");
    }
}

/// Real only: a real init.
#[rstest]
#[case::debian_12("bookworm", "Debian 12")]
#[case::debian_13("trixie", "Debian 13")]
#[case::debian_sid("sid", "Debian sid")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_of_what_works_inside_is_what_happens(#[case] suite: &str, #[case] name: &str) {
    if suite == "sid" && !debian::has_tree_of(suite) {
        return not_applicable(
            "needs a tree of Debian sid, which is made with NOMAD_DRIVER_NSPAWN_E2E_SID=1",
        );
    }
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy_tree(&debian::tree_of(suite), &tree);
    let start = format!("| {} | {name} |", e2e::nspawn_version());
    let mut rows = Rows {
        stage: &stage,
        tree: &tree,
        start,
        text: String::new(),
    };
    let plugin = stage.plugin().await;
    if suite == "sid" && !Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        rows.add_refusal(&plugin).await;
        end(plugin).await;
    } else {
        for network in NETWORKS {
            rows.add(&plugin, network).await;
        }
        end(plugin).await;
        let hosts = Hosts::new(&stage);
        let plugin = stage.plugin_in(&hosts.host).await;
        rows.add(&plugin, OWN).await;
        end(plugin).await;
        drop(hosts);
    }
    compare(&rows.start, &rows.text);
    stage.leave();
}

/// Compares with the rows of the documentation that start like this.
fn compare(start: &str, rows: &str) {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/booted-systems.md");
    let docs = fs::read_to_string(docs).unwrap();
    let refused = rows.contains("| refused |");
    let known: String = docs
        .lines()
        .filter(|line| line.starts_with(start) && line.contains("| refused |") == refused)
        .fold(String::new(), |all, line| all + line + "\n");
    let version = start.split(" | ").next().unwrap();
    if !docs
        .lines()
        .any(|line| line.starts_with(&format!("{version} | ")))
    {
        return not_applicable(&format!(
            "docs/booted-systems.md has no rows of this systemd-nspawn: {rows}"
        ));
    }
    assert!(
        known == rows,
        "docs/booted-systems.md has\n{known}and not\n{rows}"
    );
}
