//! The network that the driver makes for the task of some cells, in a network namespace of the cell that stands for the host's. As root only:
//! without root the driver makes none, and the cells are played without one.

use nomad_driver_nspawn::proto::driver::{PortMapping, Resources};
use serde_json::json;
use support::netns::Space;
use support::wire::Task;

use super::*;

/// The network of the host of one cell.
#[derive(Debug, Default)]
pub(super) struct Network(Option<Space>);

impl Network {
    /// `None` if the cell needs one that can't be made here, which is reported.
    pub(super) fn of(cell: Cell) -> Option<Self> {
        if !cell.step.has_network() || !nix::unistd::geteuid().is_root() {
            return Some(Self::default());
        }
        let space = Space::new()?;
        if !space.has("nft") {
            return None;
        }
        space.program(&["ip", "link", "set", "lo", "up"]);
        Some(Self(Some(space)))
    }

    /// A plugin whose host has this network.
    pub(super) async fn plugin<W: World>(&self, world: &W) -> Plugin {
        match &self.0 {
            None => world.plugin().await,
            Some(space) => {
                let path = space.path();
                let script = format!("exec nsenter --net={} \"$0\"", path.display());
                world.plugin_by(&script).await
            }
        }
    }

    /// The driver has made what there is to make before this step.
    pub(super) fn is_made(&self, step: Step) {
        let Some(space) = &self.0 else {
            return;
        };
        let firewall = firewall(space);
        for port in ["25101", "127.0.0.1 . 25102"] {
            assert!(firewall.contains(port), "{port}: {firewall}");
        }
        let interfaces = space.program(&["ip", "-o", "link"]);
        let is_connected = step == Step::NetworkConnected;
        for prefix in ["nd-", "nz-"] {
            assert_eq!(interfaces.contains(prefix), is_connected, "{interfaces}");
        }
    }

    /// Nothing of it is left.
    pub(super) fn is_gone(&self) {
        let Some(space) = &self.0 else {
            return;
        };
        let interfaces = space.program(&["ip", "-o", "link"]);
        let routes = space.program(&["ip", "route", "show", "table", "all"]);
        let routes6 = space.program(&["ip", "-6", "route", "show", "table", "all"]);
        for prefix in ["nd-", "nz-"] {
            for left in [&interfaces, &routes, &routes6] {
                assert!(!left.contains(prefix), "left: {left}");
            }
        }
        let firewall = firewall(space);
        assert_eq!(firewall, "", "left in the firewall");
    }
}

/// The driver's table, in which every element has its owner as a comment.
fn firewall(space: &Space) -> String {
    space.program(&["nft", "list", "ruleset"])
}

/// The task with what makes the driver give it a network: at one of the steps in a zone, whose bridge goes with it.
pub(super) fn with_network(task: Task, step: Step) -> Task {
    if !step.has_network() {
        return task;
    }
    let task = task.with("ports", json!(["http", "dns"]));
    match step {
        Step::NetworkConnected => task.with("network_zone", "matrix"),
        _ => task,
    }
}

/// One start of the task, with the ports that Nomad would allocate: on all addresses, and on one.
pub(super) async fn config_of(line: &Plugin, allocation: &Allocation, step: Step) -> TaskConfig {
    let mut config = line.task_config(allocation).await.unwrap();
    if step.has_network() {
        let port = |label: &str, value, to, host_ip: &str| PortMapping {
            label: label.to_owned(),
            value,
            to,
            host_ip: host_ip.to_owned(),
        };
        let resources = config.resources.get_or_insert_with(Resources::default);
        resources.ports = vec![
            port("http", 25_101, 80, "0.0.0.0"),
            port("dns", 25_102, 53, "127.0.0.1"),
        ];
    }
    config
}
