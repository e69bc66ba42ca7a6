//! Decides which network a container is in, and which ports are forwarded into it. Does no I/O: a missing bridge is
//! only noticed when the container joins it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::container::{HostInterface, InterfaceMode, Link, NetworkNamespace, PortForward};

use super::decode::{Number, entry, quoted};
use super::options::TaskOptions;
use super::values::is_interface_name;
use super::{AllocatedPort, ConfigError, PluginConfig, TaskContext};

const BRIDGE: &str = "config.network_bridge";
const MODE: &str = "config.network_mode";
const PORT_MAP: &str = "config.port_map";
const PORTS: &str = "config.ports";
const VETH: &str = "config.network_veth";
const ZONE: &str = "config.network_zone";

const INTERFACE_FAULT: &str = "is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits";

/// The network of the container, and notes about it for the user.
pub(super) fn network(
    options: &TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
) -> Result<(NetworkNamespace, Vec<String>), ConfigError> {
    let requested = requested(options)?;
    let ports = forwards(options, context)?;
    let interfaces = interfaces(options, context, plugin_config)?;
    if let Some(namespace) = &context.network_namespace {
        check_group_network(namespace, options, requested.as_ref())?;
        let notes = joined(options, context)?;
        return Ok((NetworkNamespace::Join(namespace.clone()), notes));
    }
    let by_default = match (!ports.is_empty(), !interfaces.is_empty()) {
        (true, _) => Requested::Link(Link::Routed),
        (false, true) => Requested::Link(Link::None),
        (false, false) if plugin_config.private_network => Requested::Link(Link::Routed),
        (false, false) => Requested::Host,
    };
    let (option, requested) = requested.unwrap_or((MODE, by_default));
    if let Requested::Task(task) = requested {
        check_network_of_task(&task, options, context, &interfaces)?;
        let namespace = NetworkNamespace::OfTask { task, leader: None };
        return Ok((namespace, Vec::new()));
    }
    let link = match requested {
        Requested::Host if let Some(interface) = interfaces.first() => {
            let reason = format!(
                "can't be combined with {}: an interface is used by a network of the container's own",
                interface.mode.option()
            );
            return Err(ConfigError::new(option, reason));
        }
        Requested::Host if ports.is_empty() => return Ok((NetworkNamespace::Host, Vec::new())),
        Requested::Link(link) if ports.is_empty() || link != Link::None => link,
        Requested::Host | Requested::Link(_) | Requested::Task(_) => {
            let value = match option {
                VETH => "false".to_owned(),
                _ => quoted(options.network_mode.as_deref().unwrap_or_default()),
            };
            let reason = format!(
                "{value} can't be combined with {PORTS} or {PORT_MAP}: ports are forwarded into a private network"
            );
            return Err(ConfigError::new(option, reason));
        }
    };
    let private = NetworkNamespace::Private {
        link,
        ports,
        interfaces,
    };
    Ok((private, Vec::new()))
}

/// The interfaces of the host that the container uses.
fn interfaces(
    options: &TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
) -> Result<Vec<HostInterface>, ConfigError> {
    let lists = [
        (InterfaceMode::Macvlan, &options.network_macvlan),
        (InterfaceMode::Ipvlan, &options.network_ipvlan),
        (InterfaceMode::Moved, &options.network_interface),
    ];
    let mut found: Vec<HostInterface> = Vec::new();
    for (mode, list) in lists {
        for (index, name) in list.iter().flatten().enumerate() {
            let refused = |reason: &str| {
                let option = format!("{}[{index}]", mode.option());
                ConfigError::new(option, format!("{} {reason}", quoted(name)))
            };
            if !is_interface_name(name) {
                return Err(refused(INTERFACE_FAULT));
            }
            if context.network_namespace.is_some() {
                return Err(refused(
                    "can't be combined with a network mode of the group",
                ));
            }
            if !plugin_config.devices {
                return Err(refused(
                    "is a device of the host, and the plugin option devices is false on this node",
                ));
            }
            if found.iter().any(|earlier| earlier.name == *name) {
                return Err(refused("is listed twice"));
            }
            let name = name.clone();
            found.push(HostInterface { mode, name });
        }
    }
    Ok(found)
}

/// What the options for the network ask for.
#[derive(Debug)]
enum Requested {
    /// The host's network.
    Host,
    /// A network of the container's own.
    Link(Link),
    /// The network of the task with this name.
    Task(String),
}

/// What the options ask for, and the option that says so; `None` if they say nothing.
fn requested(options: &TaskOptions) -> Result<Option<(&'static str, Requested)>, ConfigError> {
    let mut requested = Vec::new();
    if let Some(mode) = &options.network_mode {
        requested.push((MODE, quoted(mode), of_mode(mode)?));
    }
    if let Some(zone) = &options.network_zone {
        let link = of_zone(ZONE, zone)?;
        requested.push((ZONE, quoted(zone), Requested::Link(link)));
    }
    if let Some(bridge) = &options.network_bridge {
        let link = of_bridge(bridge)?;
        requested.push((BRIDGE, quoted(bridge), Requested::Link(link)));
    }
    // A zone and a bridge imply it, and neither can be had without.
    let is_implied = options.network_zone.is_some() || options.network_bridge.is_some();
    if let Some(veth) = options.network_veth.filter(|_| !is_implied) {
        let wanted = match veth {
            true => Requested::Link(Link::Routed),
            false => Requested::Host,
        };
        requested.push((VETH, veth.to_string(), wanted));
    }
    let mut requested = requested.into_iter();
    let first = requested.next();
    if let (Some((option, ..)), Some((other, value, _))) = (&first, requested.next()) {
        let reason = format!("{value} can't be combined with {option}");
        return Err(ConfigError::new(other, reason));
    }
    Ok(first.map(|(option, _, requested)| (option, requested)))
}

fn of_mode(mode: &str) -> Result<Requested, ConfigError> {
    Ok(match mode {
        "host" => Requested::Host,
        "none" => Requested::Link(Link::None),
        "bridge" => Requested::Link(Link::Routed),
        _ => match mode.split_once(':') {
            Some(("zone", zone)) => Requested::Link(of_zone(MODE, zone)?),
            Some(("task", task)) if !task.is_empty() => Requested::Task(task.to_owned()),
            _ => {
                let reason = format!(
                    "{} is not host, none, bridge, zone:NAME or task:NAME",
                    quoted(mode)
                );
                return Err(ConfigError::new(MODE, reason));
            }
        },
    })
}

/// Rejects what belongs to the task whose network it is.
fn check_network_of_task(
    task: &str,
    options: &TaskOptions,
    context: &TaskContext,
    interfaces: &[HostInterface],
) -> Result<(), ConfigError> {
    let refused = |option: &str, reason: String| Err(ConfigError::new(option, reason));
    if task == context.task {
        let reason = format!("{} is this task itself", quoted(task));
        return refused(MODE, reason);
    }
    let of_other = format!(
        "can't be set beside a network_mode of another task: it belongs to the network of the task {}, set it there",
        quoted(task)
    );
    if options.ports.iter().flatten().next().is_some() {
        return refused(PORTS, of_other);
    }
    if options.port_map.iter().flatten().next().is_some() {
        return refused(PORT_MAP, of_other);
    }
    match interfaces.first() {
        Some(interface) => refused(interface.mode.option(), of_other),
        None => Ok(()),
    }
}

fn of_zone(option: &str, zone: &str) -> Result<Link, ConfigError> {
    // Its bridge is named after it, and the name of an interface has at most 15 characters.
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=12).contains(&zone.len()) && zone.bytes().all(is_plain) {
        return Ok(Link::Zone(zone.to_owned()));
    }
    let reason = format!(
        "{} is not a valid zone name: use 1 to 12 letters, digits, -, _ and dots",
        quoted(zone)
    );
    Err(ConfigError::new(option, reason))
}

fn of_bridge(bridge: &str) -> Result<Link, ConfigError> {
    if is_interface_name(bridge) {
        return Ok(Link::Bridge(bridge.to_owned()));
    }
    let reason = format!("{} {INTERFACE_FAULT}", quoted(bridge));
    Err(ConfigError::new(BRIDGE, reason))
}

/// Rejects a mode, a zone or a bridge beside the namespace of the group.
fn check_group_network(
    namespace: &Path,
    options: &TaskOptions,
    requested: Option<&(&'static str, Requested)>,
) -> Result<(), ConfigError> {
    if !namespace.is_absolute() {
        let path = quoted(&namespace.to_string_lossy());
        let reason = format!("{path} is not an absolute path");
        return Err(ConfigError::new("task.network_isolation", reason));
    }
    let (option, name) = match requested {
        Some((option @ MODE, _)) => (*option, &options.network_mode),
        Some((option @ ZONE, _)) => (*option, &options.network_zone),
        Some((option @ BRIDGE, _)) => (*option, &options.network_bridge),
        // Without effect, which a note says.
        _ => return Ok(()),
    };
    let name = quoted(name.as_deref().unwrap_or_default());
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
    let is_same = |earlier: &&PortForward| {
        let (one, other) = (earlier.address, port.address);
        earlier.host == port.host && (one.is_none() || other.is_none() || one == other)
    };
    if let Some(earlier) = forwards.iter().find(is_same) {
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
