//! The container's `/etc/resolv.conf`, `/etc/hosts` and `/etc/machine-id`: files in the task directory that are mounted read-only, so that
//! nothing is written to the image, a link that leads nowhere is filled, and a read-only root has them too. What a job mounts there itself
//! is left alone. With a network that the driver makes, also the file by which an image's systemd-networkd keeps it as it is.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::{addresses, io_error};
use crate::backend::BackendError;
use crate::container::{ContainerSpec, Mode, Mount, NetworkNamespace, Root, Volatile};
use crate::network::{self, Attachment, NetworkPlan};
use crate::nspawn::machine_id;
use crate::nspawn::resolver::{self, Resolver};
use crate::rootfs_path::RootDir;
use crate::state::TaskDir;

#[path = "name_files/machine_id.rs"]
mod own_id;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";
/// Where the host's systemd-resolved lists the servers that it uses itself.
const UPLINK: &str = "/run/systemd/resolve/resolv.conf";
/// Where an image's systemd-resolved writes, which can't do so where something is mounted: it does not start then.
const RESOLVED_DIR: &str = "/run/systemd/resolve";
/// Not below `/run/systemd`: systemd-nspawn makes missing directories as root of the host, and an init with a user namespace ends if it can't
/// write to that one.
const RESOLVED_CONF: &str = "/etc/systemd/resolved.conf.d/50-nomad.conf";

/// Named so that it comes after what an image has for its link itself, and before systemd's own `80-container-host0.network`. With that one
/// systemd-networkd (257 and later) would remove addresses and routes that it did not set.
const NETWORKD: &str = "/etc/systemd/network/79-nomad.network";

/// The maximum size of a resolv.conf of the host. Those that work have a few lines.
const TEXT_MAX: u64 = 64 * 1024;

/// What a start needs for name resolution.
#[derive(Debug, Default)]
pub(super) struct NameFiles {
    /// To be mounted after everything else.
    pub(super) mounts: Vec<Mount>,
    /// The value for systemd-nspawn's `--resolv-conf`; `None` leaves it to systemd-nspawn.
    pub(super) resolv_conf: Option<String>,
    /// What the user should know.
    pub(super) notes: Vec<String>,
}

/// Writes the files. `network` is the network that the driver makes. Fails if the network of the group does not exist.
pub(super) fn write(
    spec: &ContainerSpec,
    network: Option<&NetworkPlan>,
    task_dir: &TaskDir,
) -> Result<NameFiles, BackendError> {
    let addresses = match network {
        Some(plan) => vec![plan.address.into(), plan.address6.into()],
        None => addresses::of_joined(spec)?,
    };
    let tree = Tree::open(spec)?;
    let mut files = NameFiles {
        resolv_conf: spec.network.resolv_conf.clone(),
        ..NameFiles::default()
    };
    let add = |file: &str, text: &str, target: &str| {
        let written = task_dir.write_visible(file, text.as_bytes());
        let source =
            written.map_err(|source| io_error("writing a file in", task_dir.path(), source))?;
        Ok::<_, BackendError>(Mount::new(source, target).with_read_only(true))
    };
    if files.resolv_conf.is_none() {
        let place = tree.place(RESOLV_CONF);
        let unused = match place {
            Place::OfTheJob => {
                files.resolv_conf = Some("off".to_owned());
                Some("the task mounts its own")
            }
            Place::Unusable => Some("a link of the image can't be followed:"),
            _ => None,
        };
        if let Some(why) = unused {
            if !spec.network.dns.is_empty() {
                files.notes.push(format!(
                    "the dns block of the network is not applied, because {why} {RESOLV_CONF}"
                ));
            }
        } else if let Some((text, target)) =
            resolv_conf(spec, network, &tree, &place, &mut files.notes)
        {
            files.resolv_conf = Some("off".to_owned());
            files.mounts.push(add("resolver", &text, target)?);
        }
    }
    let text = hosts(spec, network, &tree, &addresses, &mut files.notes);
    if let Some(text) = text {
        files.mounts.push(add("hosts", &text, HOSTS)?);
    }
    let own_id = machine_id::of(spec.identity.owner()) + "\n";
    let with_id = own_id::to_replace(spec, &tree, &mut files.notes);
    for target in &with_id {
        files.mounts.push(add("machine-id", &own_id, target)?);
    }
    if spec.payload.mode == Mode::Boot && with_id.contains(&own_id::MACHINE_ID) {
        let mount = add("machine-id-commit", own_id::COMMIT_TEXT, own_id::COMMIT)?;
        files.mounts.push(mount);
    }
    // On a bridge of the host the image may have to ask a DHCP server there.
    let is_alone = network.is_some_and(|plan| !matches!(plan.attachment, Attachment::Bridge(_)));
    if is_alone && spec.payload.mode == Mode::Boot {
        files.mounts.push(add(
            "network",
            &networkd(network::new_links_have_ipv6()),
            NETWORKD,
        )?);
    }
    Ok(files)
}

/// The resolver's configuration and where it is mounted. `None` where systemd-nspawn decides: in a network of the container's own that the
/// driver does not make, which has servers of its own, and in a disk image, which may be read-only and lack the file.
fn resolv_conf(
    spec: &ContainerSpec,
    network: Option<&NetworkPlan>,
    tree: &Tree<'_>,
    place: &Place,
    notes: &mut Vec<String>,
) -> Option<(String, &'static str)> {
    let dns = &spec.network.dns;
    let in_host = spec.network.namespace == NetworkNamespace::Host;
    let is_private =
        network.is_none() && matches!(spec.network.namespace, NetworkNamespace::Private { .. });
    let is_image = matches!(spec.rootfs.source, Root::Image(_));
    if dns.is_empty() && (is_private || is_image) {
        return None;
    }
    let resolved = spec.payload.mode == Mode::Boot
        && matches!(place, Place::File(path) | Place::Missing(path) if path.starts_with(RESOLVED_DIR))
        && tree.runs_resolved();
    let text = read(RESOLV_CONF, notes);
    if in_host && dns.is_empty() && !resolved {
        return Some((text?, RESOLV_CONF));
    }
    let mut host = Resolver::parse(&text.unwrap_or_default());
    if host.is_on_loopback()
        && (!in_host || resolved)
        && let Some(uplink) = read(UPLINK, notes)
    {
        host = Resolver::parse(&uplink);
    }
    if !in_host {
        host = host.without_loopback();
    }
    let resolver = host.with(dns);
    if resolver.servers.is_empty() {
        notes.push("the task has no name server: the host has none, or only on loopback addresses, which the network of the task does not reach. Set servers in the dns block of the network".to_owned());
    }
    if !resolved {
        return Some((resolver.resolv_conf(), RESOLV_CONF));
    }
    if !dns.options.is_empty() {
        notes.push("the options of the dns block are not applied, because the image runs systemd-resolved, which has none of them".to_owned());
    }
    Some((resolver.resolved_conf(), RESOLVED_CONF))
}

/// The content of `/etc/hosts`. `None` leaves it as it is: where the image has one for the host's network, and in a network that nobody has
/// configured yet; unless the job has names for it.
fn hosts(
    spec: &ContainerSpec,
    network: Option<&NetworkPlan>,
    tree: &Tree<'_>,
    addresses: &[IpAddr],
    notes: &mut Vec<String>,
) -> Option<String> {
    let place = tree.place(HOSTS);
    let extra = &spec.network.extra_hosts;
    if matches!(place, Place::OfTheJob | Place::Unusable) {
        if !extra.is_empty() {
            notes.push(format!("config.extra_hosts is not applied, because the task mounts its own {HOSTS}, or a link of the image there can't be followed"));
        }
        return None;
    }
    let is_needed = match (&spec.network.namespace, place) {
        // Whether it lacks the file can't be seen.
        (_, Place::Unknown) if spec.rootfs.read_only => false,
        (NetworkNamespace::Join(_) | NetworkNamespace::OfTask { .. }, _) => true,
        (NetworkNamespace::Private { .. }, _) => network.is_some(),
        (NetworkNamespace::Host, place) => matches!(place, Place::Missing(_)),
    };
    if !is_needed && extra.is_empty() {
        return None;
    }
    let given = spec.network.host_name.as_ref();
    let name = given.map_or(&spec.identity.machine, |given| &given.name);
    let address = given.and_then(|given| given.address);
    let addresses = address.map_or_else(|| addresses.to_vec(), |address| vec![address]);
    Some(resolver::hosts(name, &addresses, extra))
}

/// By this systemd-networkd keeps the link as it is. Not by `Unmanaged=yes`: systemd-networkd-wait-online waits for a link that it manages,
/// until its timeout. It would also wait for a link-local address without IPv6.
fn networkd(has_ipv6: bool) -> String {
    let link_local = if has_ipv6 { "ipv6" } else { "no" };
    format!(
        "[Match]\nName=host0\n\n[Network]\nKeepConfiguration=yes\nDHCP=no\nLinkLocalAddressing={link_local}\nIPv6AcceptRA=no\n"
    )
}

/// The start of a file of the host; `None` without one. A note says why one can't be read.
fn read(path: &str, notes: &mut Vec<String>) -> Option<String> {
    let text = File::open(path).and_then(|file| {
        let mut text = Vec::new();
        file.take(TEXT_MAX).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    });
    match text {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            notes.push(format!("{path} of the host can't be read: {error}"));
            None
        }
    }
}

/// What is at a path in the container.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Something that the job mounts.
    OfTheJob,
    /// A file of the image, at this path without links.
    File(PathBuf),
    /// Nothing, or an empty file as systemd-nspawn leaves it for a mount point, at this path without links.
    Missing(PathBuf),
    /// Links without an end, or what else can't be looked up, so that nothing can be mounted over it.
    Unusable,
    /// A disk image, which is not looked into.
    Unknown,
}

/// The root of the container before it is started.
struct Tree<'a> {
    spec: &'a ContainerSpec,
    root: Option<RootDir>,
}

impl<'a> Tree<'a> {
    fn open(spec: &'a ContainerSpec) -> Result<Self, BackendError> {
        let root = match &spec.rootfs.source {
            Root::Image(_) => None,
            Root::Directory(path) => Some(
                RootDir::open(path)
                    .map_err(|source| io_error("looking into the image", path, source))?,
            ),
        };
        Ok(Self { spec, root })
    }

    fn place(&self, path: &str) -> Place {
        let is_mounted = |at: &Path| {
            let mounts = self.spec.mounts.iter().map(|mount| &mount.target);
            let mut targets = mounts.chain(self.spec.tmpfs.iter().map(|tmpfs| &tmpfs.target));
            targets.any(|target| at.starts_with(target))
        };
        if is_mounted(Path::new(path)) {
            return Place::OfTheJob;
        }
        // Only `/usr` of the image is there.
        if self.spec.rootfs.volatile == Volatile::Yes {
            return Place::Missing(path.into());
        }
        let Some(root) = &self.root else {
            return Place::Unknown;
        };
        match root.resolve(Path::new(path)) {
            Err(_) => Place::Unusable,
            Ok(found) => match (Path::new("/").join(found.below), found.entry) {
                (at, _) if is_mounted(&at) => Place::OfTheJob,
                (at, Some(file)) if file.metadata().len() > 0 => Place::File(at),
                (at, _) => Place::Missing(at),
            },
        }
    }

    /// Whether systemd-resolved is enabled in the image.
    fn runs_resolved(&self) -> bool {
        let Some(root) = &self.root else {
            return false;
        };
        let units = ["etc/systemd/system", "usr/lib/systemd/system"];
        let targets = ["sysinit.target.wants", "multi-user.target.wants"];
        units.iter().any(|units| {
            targets.iter().any(|target| {
                let Ok(directory) = root.resolve(&Path::new(units).join(target)) else {
                    return false;
                };
                let link = directory.below.join("systemd-resolved.service");
                matches!(root.lookup(&link), Ok(Some(_)))
            })
        })
    }
}

#[cfg(test)]
#[path = "name_files_tests.rs"]
mod tests;
