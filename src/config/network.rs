//! Decides which network a container is in, and which ports are forwarded into it. Does no I/O: a missing bridge is
//! only noticed when the container joins it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::container::{NetworkNamespace, PortForward};

use super::decode::{Number, entry, quoted};
use super::options::TaskOptions;
use super::values::is_interface_name;
use super::{AllocatedPort, ConfigError, TaskContext};

const BRIDGE: &str = "config.network_bridge";
const PORT_MAP: &str = "config.port_map";
const PORTS: &str = "config.ports";
const VETH: &str = "config.network_veth";
const ZONE: &str = "config.network_zone";

/// The network of the container, and notes about it for the user.
pub(super) fn network(
    options: &TaskOptions,
    context: &TaskContext,
) -> Result<(NetworkNamespace, Vec<String>), ConfigError> {
    names(options)?;
    let ports = forwards(options, context)?;
    let named = [
        (ZONE, &options.network_zone),
        (BRIDGE, &options.network_bridge),
    ];
    let attached = named
        .into_iter()
        .find_map(|(option, name)| Some((option, name.as_deref()?)));
    if let Some(namespace) = &context.network_namespace {
        check_group_network(namespace, attached)?;
        let notes = joined(options, context)?;
        return Ok((NetworkNamespace::Join(namespace.clone()), notes));
    }
    let wanted = options.network_veth == Some(true);
    if attached.is_none() && ports.is_empty() && !wanted {
        return Ok((NetworkNamespace::Host, Vec::new()));
    }
    if options.network_veth == Some(false) && attached.is_none() {
        let reason = format!(
            "false can't be combined with {PORTS} or {PORT_MAP}: ports are forwarded into a private network"
        );
        return Err(ConfigError::new(VETH, reason));
    }
    let private = NetworkNamespace::Private {
        veth: wanted || attached.is_none(),
        zone: options.network_zone.clone(),
        bridge: options.network_bridge.clone(),
        ports,
    };
    Ok((private, Vec::new()))
}

/// Rejects a zone or a bridge beside the namespace of the group.
fn check_group_network(
    namespace: &Path,
    attached: Option<(&str, &str)>,
) -> Result<(), ConfigError> {
    if !namespace.is_absolute() {
        let path = quoted(&namespace.to_string_lossy());
        let reason = format!("{path} is not an absolute path");
        return Err(ConfigError::new("task.network_isolation", reason));
    }
    let Some((option, name)) = attached else {
        return Ok(());
    };
    let name = quoted(name);
    let reason = format!("{name} can't be combined with a network mode of the group");
    Err(ConfigError::new(option, reason))
}

/// Nomad's port variables as the container needs them: where ports are forwarded, with the port number inside.
pub(super) fn variables(network: &NetworkNamespace) -> BTreeMap<String, String> {
    let NetworkNamespace::Private { ports, .. } = network else {
        return BTreeMap::new();
    };
    let name = |label: &str| {
        let plain = label.replace(
            |char: char| !char.is_ascii_alphanumeric() && char != '.',
            "_",
        );
        format!("NOMAD_PORT_{plain}")
    };
    ports
        .iter()
        .map(|port| (name(&port.label), port.container.to_string()))
        .collect()
}

fn names(options: &TaskOptions) -> Result<(), ConfigError> {
    if let Some(zone) = &options.network_zone
        // systemd-nspawn names the bridge of a zone after the zone.
        && !is_interface_name(&format!("vz-{zone}"))
    {
        let reason = format!(
            "{} is not a valid zone name: use 1 to 12 printable characters other than space, :, / and %",
            quoted(zone)
        );
        return Err(ConfigError::new(ZONE, reason));
    }
    let Some(bridge) = &options.network_bridge else {
        return Ok(());
    };
    if !is_interface_name(bridge) {
        let reason = format!(
            "{} is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits",
            quoted(bridge)
        );
        return Err(ConfigError::new(BRIDGE, reason));
    }
    if options.network_zone.is_some() {
        let reason = format!("{} can't be combined with {ZONE}", quoted(bridge));
        return Err(ConfigError::new(BRIDGE, reason));
    }
    Ok(())
}

/// Checks the options for a private network in a container whose network Nomad made: there they have no effect, or
/// contradict it.
fn joined(options: &TaskOptions, context: &TaskContext) -> Result<Vec<String>, ConfigError> {
    for (label, number) in options.port_map.iter().flatten() {
        let (port, inside) = mapped(label, number, context)?;
        let nomads = inside_port(port);
        if inside != nomads {
            let reason = format!(
                "{inside} is not {nomads}, the port to which the group network forwards: set to = {inside} in the port block of the group"
            );
            return Err(ConfigError::new(entry(PORT_MAP, label), reason));
        }
    }
    let without_effect = [
        (VETH, options.network_veth == Some(true)),
        (PORTS, options.ports.iter().flatten().next().is_some()),
        (PORT_MAP, options.port_map.iter().flatten().next().is_some()),
    ];
    Ok(without_effect
        .into_iter()
        .filter(|(_, set)| *set)
        .map(|(option, _)| {
            format!("{option} has no effect, because the task is in the network of its group. Remove it from the task, or the network mode from the group")
        })
        .collect())
}

fn forwards(options: &TaskOptions, context: &TaskContext) -> Result<Vec<PortForward>, ConfigError> {
    let labels = options.ports.as_deref().unwrap_or_default();
    let map = options.port_map.iter().flatten().collect::<Vec<_>>();
    if !labels.is_empty() && !map.is_empty() {
        let reason = format!("can't be combined with {PORTS}");
        return Err(ConfigError::new(PORT_MAP, reason));
    }
    let mut forwards: Vec<PortForward> = Vec::new();
    for (index, label) in labels.iter().enumerate() {
        let option = format!("{PORTS}[{index}]");
        let port = find(label, false, context, &option)?;
        if forwards.iter().any(|earlier| earlier.label == *label) {
            let reason = format!("{} is listed twice", quoted(label));
            return Err(ConfigError::new(option, reason));
        }
        add(&mut forwards, port, inside_port(port), &option)?;
    }
    for (label, number) in &map {
        let (port, inside) = mapped(label, number, context)?;
        add(&mut forwards, port, inside, &entry(PORT_MAP, label))?;
    }
    // As soon as one port of the task's own network is mapped, all of them are forwarded.
    for port in context.ports.iter().filter(|port| port.task_level) {
        if !map.is_empty() && forwards.iter().all(|earlier| earlier.label != port.label) {
            add(&mut forwards, port, port.host, PORT_MAP)?;
        }
    }
    Ok(forwards)
}

fn add(
    forwards: &mut Vec<PortForward>,
    port: &AllocatedPort,
    container: u16,
    option: &str,
) -> Result<(), ConfigError> {
    let label = quoted(&port.label);
    if port.host == 0 {
        let reason = format!("{label} has no host port");
        return Err(ConfigError::new(option, reason));
    }
    if let Some(earlier) = forwards.iter().find(|earlier| earlier.host == port.host) {
        let reason = format!(
            "{label} has the host port {}, which {} already uses",
            port.host,
            quoted(&earlier.label)
        );
        return Err(ConfigError::new(option, reason));
    }
    forwards.push(PortForward {
        label: port.label.clone(),
        address: port.address,
        host: port.host,
        container,
    });
    Ok(())
}

/// The port that a `port_map` entry refers to, and its number inside.
fn mapped<'a>(
    label: &str,
    number: &Number,
    context: &'a TaskContext,
) -> Result<(&'a AllocatedPort, u16), ConfigError> {
    let option = entry(PORT_MAP, label);
    let inside = number.0.parse().ok().filter(|inside| *inside != 0);
    let inside = inside.ok_or_else(|| {
        let reason = format!("{} is not a port number from 1 to 65535", number.shown());
        ConfigError::new(&option, reason)
    })?;
    Ok((find(label, true, context, &option)?, inside))
}

fn inside_port(port: &AllocatedPort) -> u16 {
    if port.to == 0 { port.host } else { port.to }
}

/// The granted port with this label. Ports of the task's own network come first if `task_level_first` is set, else
/// last.
fn find<'a>(
    label: &str,
    task_level_first: bool,
    context: &'a TaskContext,
    option: &str,
) -> Result<&'a AllocatedPort, ConfigError> {
    context
        .ports
        .iter()
        .filter(|port| port.label == label)
        .max_by_key(|port| port.task_level == task_level_first)
        .ok_or_else(|| {
            let mut known: Vec<_> = context
                .ports
                .iter()
                .map(|port| quoted(&port.label))
                .collect();
            known.sort();
            known.dedup();
            let known = match known.as_slice() {
                [] => "the job has no ports".to_owned(),
                known => format!("the job's ports are {}", known.join(", ")),
            };
            let reason = format!("{} is not a port label: {known}", quoted(label));
            ConfigError::new(option, reason)
        })
}
