//! Lets the host forward packets to and from a container, interface by interface: no setting of the whole host is changed. An interface that
//! forwards is not switched back, because others may rely on it by then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Attachment, NetworkError, NetworkPlan, is_of_containers};

const CONF4: &str = "/proc/sys/net/ipv4/conf";
const CONF6: &str = "/proc/sys/net/ipv6/conf";
/// Forwards IPv6 on one interface, without which `all` has to be set. Linux 6.17 and later.
const FORCE6: &str = "force_forwarding";

/// Configures the host's end of a container's link. `has_ports` is whether ports are forwarded to it: then answers to connections from the
/// host's own 127.0.0.1 have to go back there. The firewall keeps everything else from reaching it.
pub(super) fn of_container(link: &str, has_ports: bool) -> Result<(), NetworkError> {
    let settings = ["forwarding", "route_localnet"];
    for setting in settings.iter().take(1 + usize::from(has_ports)) {
        write(&Path::new(CONF4).join(link).join(setting), "1")?;
    }
    let ipv6 = Path::new(CONF6).join(link);
    // Nothing that a container announces may change the routes of the host.
    for (setting, value) in [("accept_ra", "0"), (FORCE6, "1")] {
        let file = ipv6.join(setting);
        if file.exists() {
            write(&file, value)?;
        }
    }
    Ok(())
}

/// Lets those interfaces of the host forward through which a container reaches others, and others its ports. Returns what the user should
/// know.
pub(super) fn of_host(plan: &NetworkPlan) -> Result<Vec<String>, NetworkError> {
    let mut notes = Vec::new();
    let interfaces =
        interfaces().map_err(|error| NetworkError::new("listing interfaces", &error))?;
    let mut used = match plan.ports.is_empty() {
        true => default_interfaces(),
        false => interfaces,
    };
    if let Attachment::Bridge(bridge) = &plan.attachment {
        used.push(bridge.clone());
    }
    let ipv6_everywhere = is_on(&Path::new(CONF6).join("all/forwarding"));
    let mut without = Vec::new();
    for interface in used {
        let file = Path::new(CONF4).join(&interface).join("forwarding");
        if !is_on(&file) {
            write(&file, "1")?;
        }
        let force = Path::new(CONF6).join(&interface).join(FORCE6);
        if ipv6_everywhere || is_on(&force) {
            continue;
        }
        match force.exists() {
            true => write(&force, "1")?,
            false => without.push(interface),
        }
    }
    if !without.is_empty() && has_global_ipv6() {
        notes.push(format!(
            "IPv6 reaches the container only from this host: the host does not forward IPv6, and this kernel can't change that for {} alone. Set \
             net.ipv6.conf.all.forwarding = 1 (and accept_ra = 2 where the host learns its routes from announcements)",
            without.join(", ")
        ));
    }
    Ok(notes)
}

fn is_on(file: &Path) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
}

fn write(file: &PathBuf, value: &str) -> Result<(), NetworkError> {
    let written = fs::write(file, value);
    written.map_err(|error| {
        NetworkError::new(&format!("writing {value} to {}", file.display()), &error)
    })
}

/// The interfaces that packets for other hosts may come from: all but loopback and those of containers.
fn interfaces() -> io::Result<Vec<String>> {
    let names = fs::read_dir(CONF4)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names
        .filter(|name| !["all", "default", "lo"].contains(&&**name) && !is_of_containers(name))
        .collect())
}

/// The interfaces of the host's default routes.
fn default_interfaces() -> Vec<String> {
    let table = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let mut found: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (interface, destination) = (fields.next()?, fields.next()?);
            (destination == "00000000").then(|| interface.to_owned())
        })
        .collect();
    let table = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    found.extend(table.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let is_default =
            fields.first()?.bytes().all(|byte| byte == b'0') && fields.get(1) == Some(&"00");
        // The kernel has default routes of its own that reject everything, on `lo`.
        let interface = *fields.last()?;
        (is_default && interface != "lo").then(|| interface.to_owned())
    }));
    found.sort();
    found.dedup();
    found
}

/// Whether the host has an IPv6 address with which it reaches others.
fn has_global_ipv6() -> bool {
    let table = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    table
        .lines()
        .any(|line| line.split_ascii_whitespace().nth(3) == Some("00") && !line.ends_with(" lo"))
}
