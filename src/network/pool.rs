//! The addresses that the driver gives to containers. An address is reserved by a symbolic link `<address> -> <task directory>` below the
//! state directory, made under a lock, so no two starts get the same, whatever process asks, and it outlives them all. Which address a start gets follows from allocation and task, so it usually keeps it when it is restarted.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use super::NetworkError;
use crate::container::Cause;

/// The routes of this thread's network namespace.
const ROUTES: &str = "/proc/thread-self/net/route";

/// The ranges of addresses for containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Of IPv4: one address for each container.
    pub ipv4: Ipv4Net,
    /// Of IPv6: at least as large, because a container's address has the same number in it. `None` is a range of unique local addresses
    /// that follows from the host's machine id.
    pub ipv6: Option<Ipv6Net>,
}

impl Default for Pool {
    /// That of a driver that is not configured otherwise.
    fn default() -> Self {
        Self {
            ipv4: Ipv4Net::new_assert(Ipv4Addr::new(10, 213, 0, 0), 16),
            ipv6: None,
        }
    }
}

/// A pair of addresses that a start has reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The IPv4 address.
    pub address: Ipv4Addr,
    /// The IPv6 address.
    pub address6: Ipv6Addr,
}

/// The directory of the reservations, in the state directory.
pub const DIRECTORY: &str = ".addresses";

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join(DIRECTORY)
}

/// Reserves addresses for the start with this task directory. Of the same `owner` it tries the same ones first.
pub fn reserve(
    pool: &Pool,
    state_dir: &Path,
    task_dir: &Path,
    owner: &str,
) -> Result<Reserved, NetworkError> {
    let text = fs::read_to_string(ROUTES).unwrap_or_default();
    let routes = routes(&text);
    if let Some(route) = overlapping(pool.ipv4, &routes) {
        return Err(NetworkError {
            cause: Cause::Config,
            reason: format!(
                "plugin.network_pool.ipv4 = \"{}\" overlaps {route} of this host: set it to a range that nothing else uses",
                pool.ipv4
            ),
        });
    }
    let failed = |error| NetworkError::new("reserving an address", &error);
    let directory = directory(state_dir);
    let _lock = lock(&directory).map_err(failed)?;
    let leaf = task_dir.file_name().unwrap_or_default();
    let usable = usable(pool.ipv4);
    let first = number(owner) % usable;
    for step in 0..usable {
        // The first one is the network's own.
        let index = 1 + (first + step) % usable;
        let address = Ipv4Addr::from_bits(pool.ipv4.network().to_bits() + index);
        if routes
            .iter()
            .any(|(route, _)| *route == Ipv4Net::from(address))
        {
            continue;
        }
        let reservation = directory.join(address.to_string());
        remove_orphan(state_dir, &reservation).map_err(failed)?;
        match symlink(leaf, reservation) {
            Ok(()) => {
                let network = pool.ipv6.map_or_else(local_range, |range| range.network());
                let address6 = Ipv6Addr::from_bits(network.to_bits() + u128::from(index));
                return Ok(Reserved { address, address6 });
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(NetworkError {
        cause: Cause::Resources,
        reason: format!(
            "all {usable} addresses of plugin.network_pool.ipv4 = \"{}\" are in use: end tasks with a network of their own, or set a larger range",
            pool.ipv4
        ),
    })
}

/// Ends the reservation of an address, if this start has it. One that does not exist is success.
pub fn release(state_dir: &Path, task_dir: &Path, address: Ipv4Addr) -> io::Result<()> {
    let directory = directory(state_dir);
    let reservation = directory.join(address.to_string());
    if fs::read_link(&reservation).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let _lock = lock(&directory)?;
    match fs::read_link(&reservation) {
        Ok(leaf) if Some(leaf.as_os_str()) == task_dir.file_name() => fs::remove_file(reservation),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the reservations of starts that have no task directory any more: they were interrupted before they had a launch spec.
pub fn remove_orphans(state_dir: &Path) -> io::Result<()> {
    let directory = directory(state_dir);
    if !directory.exists() {
        return Ok(());
    }
    let _lock = lock(&directory)?;
    fs::read_dir(directory)?.try_for_each(|entry| remove_orphan(state_dir, &entry?.path()))
}

/// The addresses that containers have or are about to have.
#[derive(Debug)]
pub struct InUse {
    /// The reserved ones, and those that a route of this host leads to.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// As long as this exists, no start reserves another one in the state directory.
    _lock: Option<Flock<File>>,
}

/// The addresses that are reserved in this state directory or in one of the `others`, and those of containers that are connected, whoever
/// made them. After an error nothing is certain.
pub fn in_use(state_dir: &Path, others: &BTreeSet<PathBuf>) -> io::Result<InUse> {
    let directory = directory(state_dir);
    let lock = match directory.exists() {
        true => Some(lock(&directory)?),
        false => None,
    };
    let text = fs::read_to_string(ROUTES)?;
    let routes = routes(&text).into_iter().map(|(route, _)| route);
    let mut addresses: BTreeSet<Ipv4Addr> = routes
        .filter(|route| route.prefix_len() == 32)
        .map(|route| route.addr())
        .collect();
    for state_dir in others.iter().map(PathBuf::as_path).chain([state_dir]) {
        addresses.extend(reserved(state_dir)?);
    }
    Ok(InUse {
        addresses,
        _lock: lock,
    })
}

/// The addresses that are reserved in a state directory.
fn reserved(state_dir: &Path) -> io::Result<Vec<Ipv4Addr>> {
    let entries = match fs::read_dir(directory(state_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let names: io::Result<Vec<_>> = names.collect();
    let names = names?.into_iter();
    Ok(names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect())
}

/// Removes a reservation, if its start has no task directory any more. A start has one before it reserves an address.
fn remove_orphan(state_dir: &Path, reservation: &Path) -> io::Result<()> {
    match fs::read_link(reservation) {
        Ok(leaf) if !state_dir.join(&leaf).exists() => fs::remove_file(reservation),
        _ => Ok(()),
    }
}

/// Locks the directory of the reservations, which is made if it is missing. Nothing is done under the lock but what is in this file.
fn lock(directory: &Path) -> io::Result<Flock<File>> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    Flock::lock(File::open(directory)?, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

/// How many addresses of a range containers can have: not the first and the last one, which are those of the network and of broadcasts.
pub fn usable(range: Ipv4Net) -> u32 {
    let size = 1u64 << (32 - u32::from(range.prefix_len()));
    u32::try_from(size.saturating_sub(2)).unwrap_or(u32::MAX)
}

/// The host's own range of unique local addresses (RFC 4193), the same after every boot.
fn local_range() -> Ipv6Addr {
    let id = fs::read("/etc/machine-id").unwrap_or_default();
    let hash = Sha256::new()
        .chain_update("nomad-driver-nspawn")
        .chain_update(id)
        .finalize();
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&hash[..5]);
    Ipv6Addr::from(octets)
}

/// A number that follows from a text and differs between texts.
fn number(text: &str) -> u32 {
    let hash = Sha256::digest(text);
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

/// The routes of the host in `/proc/net/route`, with their interfaces.
fn routes(text: &str) -> Vec<(Ipv4Net, &str)> {
    let lines = text.lines().skip(1);
    lines
        .filter_map(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            let number = |at: usize| {
                let number = u32::from_str_radix(fields.get(at)?, 16).ok()?;
                Some(Ipv4Addr::from(number.to_le_bytes()))
            };
            let route = Ipv4Net::with_netmask(number(1)?, number(7)?).ok()?;
            Some((route, *fields.first()?))
        })
        .collect()
}

/// A route to a part of the range. One to a larger range does not matter: those of containers are more specific. One to a single address is
/// that of a container, perhaps of another agent.
fn overlapping(range: Ipv4Net, routes: &[(Ipv4Net, &str)]) -> Option<String> {
    let is_part = |(route, _): &&(Ipv4Net, &str)| range.contains(route) && route.prefix_len() < 32;
    let (route, interface) = routes.iter().find(is_part)?;
    Some(format!("the route {route} of interface {interface}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    struct Scene {
        temp: tempfile::TempDir,
        pool: Pool,
    }

    impl Scene {
        fn new(range: &str) -> Self {
            let pool = Pool {
                ipv4: range.parse().unwrap(),
                ipv6: Some("fd00:1::/64".parse().unwrap()),
            };
            Self {
                temp: tempfile::tempdir().unwrap(),
                pool,
            }
        }

        fn start(&self, name: &str) -> PathBuf {
            let directory = self.temp.path().join(name);
            fs::create_dir(&directory).unwrap();
            directory
        }

        fn reserve(&self, task_dir: &Path, owner: &str) -> Result<Reserved, NetworkError> {
            reserve(&self.pool, self.temp.path(), task_dir, owner)
        }
    }

    #[test]
    fn every_start_has_addresses_of_its_own_until_none_are_left() {
        let scene = Scene::new("198.51.100.0/29");
        let mut all: Vec<_> = (0..6)
            .map(|number| {
                let task_dir = scene.start(&number.to_string());
                scene.reserve(&task_dir, &format!("a/{number}")).unwrap()
            })
            .collect();
        all.sort_by_key(|reserved| reserved.address);
        let want: Vec<_> = (1..7)
            .map(|last| Reserved {
                address: Ipv4Addr::new(198, 51, 100, last),
                address6: Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, last.into()),
            })
            .collect();
        assert_eq!(all, want);
        let error = scene.reserve(&scene.start("more"), "a/more").unwrap_err();
        assert_eq!(error.cause, Cause::Resources);
        for text in [
            "6 addresses",
            "plugin.network_pool.ipv4 = \"198.51.100.0/29\"",
        ] {
            assert!(error.reason.contains(text), "{error}");
        }
    }

    #[test]
    fn a_task_keeps_its_address_when_it_is_restarted() {
        let scene = Scene::new("198.51.100.0/24");
        let (first, second) = (scene.start("first"), scene.start("second"));
        let before = scene.reserve(&first, "a/t").unwrap();
        release(scene.temp.path(), &first, before.address).unwrap();
        release(scene.temp.path(), &first, before.address).unwrap();
        assert_eq!(scene.reserve(&second, "a/t").unwrap(), before);
        // It is another start's by now.
        release(scene.temp.path(), &first, before.address).unwrap();
        assert_ne!(scene.reserve(&first, "a/t").unwrap(), before);
    }

    #[test]
    fn reservations_of_starts_that_are_gone_are_removed() {
        let scene = Scene::new("198.51.100.0/30");
        remove_orphans(scene.temp.path()).unwrap();
        let (gone, alive) = (scene.start("gone"), scene.start("alive"));
        scene.reserve(&gone, "a/gone").unwrap();
        let kept = scene.reserve(&alive, "a/alive").unwrap();
        fs::remove_dir(&gone).unwrap();
        remove_orphans(scene.temp.path()).unwrap();
        assert_eq!(
            fs::read_dir(directory(scene.temp.path())).unwrap().count(),
            1
        );
        let next = scene.start("next");
        assert_ne!(
            scene.reserve(&next, "a/next").unwrap().address,
            kept.address
        );
        scene.reserve(&scene.start("none"), "a/none").unwrap_err();
        // Whoever asks next does not depend on the plugin having looked.
        fs::remove_dir(&next).unwrap();
        scene.reserve(&scene.start("last"), "a/last").unwrap();
    }

    const LISTED: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
tun0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
nd-0123456789ab\t0700D50A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
br0\t0001D50A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";

    #[rstest]
    #[case::larger_routes_and_containers("10.213.0.0/24", None)]
    #[case::a_part("10.213.0.0/16", Some("the route 10.213.1.0/24 of interface br0"))]
    #[case::the_same("10.213.1.0/24", Some("the route 10.213.1.0/24 of interface br0"))]
    fn a_range_that_the_host_uses_is_found(#[case] range: &str, #[case] want: Option<&str>) {
        let found = overlapping(range.parse().unwrap(), &routes(LISTED));
        assert_eq!(found.as_deref(), want);
    }

    #[test]
    fn the_range_of_a_host_is_one_of_unique_local_addresses() {
        let range = local_range();
        assert_eq!(range.octets()[0], 0xfd);
        assert_eq!(range.octets()[6..], [0; 10]);
        assert_eq!(range, local_range());
    }
}
