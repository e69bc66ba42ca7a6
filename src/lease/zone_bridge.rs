//! The bridge of a zone. systemd-nspawn creates it for the first container of the zone and removes it with the last. After a
//! systemd-nspawn that was killed it is removed here, in the same way and under the same lock. Never removes a bridge that has an
//! interface, or any other link.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use serde::{Deserialize, Serialize};

use super::{Context, Lease, nspawn_lock};

/// `RTM_DELLINK` of `linux/rtnetlink.h`.
const DELETE_LINK: u16 = 17;
/// `IFLA_IFNAME` of `linux/if_link.h`.
const NAME: u16 = 3;
/// `NLMSG_ERROR`, which also reports success.
const OUTCOME: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 1 | 4;
/// The longest interface name, in bytes.
const MAX_INTERFACE_NAME: usize = 15;

/// How long the kernel may take to remove the interface of a container after its last process is gone.
const LINK_REMOVAL_TIMEOUT: Duration = Duration::from_secs(2);

/// The file that systemd-nspawn locks while it joins or removes the bridge of a zone.
const LOCK_PATH: &str = "/run/systemd/nspawn-network-zone";

/// How long systemd-nspawn may hold that lock. It needs a few milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the lock is tried. The kernel has no blocking call for it with a timeout.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// The bridge of a zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneBridge {
    /// The zone as it is passed to systemd-nspawn: without the prefix of the interface name.
    pub zone: String,
}

impl Lease for ZoneBridge {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        // After a reboot a bridge of this name is a different one.
        if !context.same_boot {
            return Ok(());
        }
        // A systemd-nspawn that exited by itself has removed its interface.
        let leaving = (!context.by_itself).then_some(context.machine);
        remove_if_empty(&self.zone, leaving)
    }
}

/// Removes the bridge of this zone in the network namespace of the calling process, if it has no interface. A bridge that does
/// not exist is success. If a machine is `leaving`, waits for its interface to be removed first, at most
/// [`LINK_REMOVAL_TIMEOUT`]. Waits at most [`LOCK_TIMEOUT`] for systemd-nspawn's lock; if it can't be taken, the bridge stays and
/// the error says so.
fn remove_if_empty(zone: &str, leaving: Option<&str>) -> io::Result<()> {
    let link = format!("vz-{zone}");
    if link.len() > MAX_INTERFACE_NAME || link.contains(['/', '\0', ':']) {
        return Ok(());
    }
    let bridge = Path::new("/sys/class/net").join(&link).join("brif");
    if let Some(machine) = leaving {
        let end = Instant::now() + LINK_REMOVAL_TIMEOUT;
        // The removal is polled, because it is not reported here.
        while ports(&bridge).is_some_and(|ports| ports.iter().any(|port| is_of(port, machine)))
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let is_empty = || ports(&bridge).is_some_and(|ports| ports.is_empty());
    if !is_empty() {
        return Ok(());
    }
    // A container that starts in this zone takes the lock before it looks for the bridge and holds it until its interface is in
    // the bridge.
    let _lock = ZoneLock::acquire(Path::new(LOCK_PATH), LOCK_TIMEOUT).map_err(|error| {
        let text = format!(
            "the bridge {link} of the task's zone is not removed, because {LOCK_PATH} can't be locked: {error}"
        );
        io::Error::new(error.kind(), text)
    })?;
    if !is_empty() {
        return Ok(());
    }
    match delete_link(&link) {
        // It was removed meanwhile.
        Err(error) if error.raw_os_error() == Some(nix::Error::ENODEV as i32) => Ok(()),
        deleted => deleted,
    }
}

/// systemd-nspawn's lock for zones: a write lock of the open file description (`F_OFD_SETLK`) on the whole file. Its holder
/// removes the file before releasing the lock, so a lock on an unlinked file does not count.
#[derive(Debug)]
struct ZoneLock {
    path: PathBuf,
    /// Closing it releases the lock.
    _file: File,
}

impl ZoneLock {
    /// Takes the lock; an error of kind `TimedOut` if another process holds it for `timeout`.
    fn acquire(path: &Path, timeout: Duration) -> io::Result<Self> {
        let end = Instant::now() + timeout;
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NOCTTY).bits())
                .open(path)?;
            while !try_lock(&file)? {
                if Instant::now() >= end {
                    let text = format!("another process held the lock for {timeout:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                std::thread::sleep(LOCK_INTERVAL);
            }
            if file.metadata()?.nlink() > 0 {
                let path = path.to_owned();
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for ZoneLock {
    fn drop(&mut self) {
        // While the lock is held, the path refers to this file.
        let _ = fs::remove_file(&self.path);
    }
}

/// Takes the lock; `false` if it is busy.
fn try_lock(file: &File) -> io::Result<bool> {
    match nspawn_lock::lock(file, nspawn_lock::EXCLUSIVE) {
        Ok(()) => Ok(true),
        Err(nix::Error::EAGAIN | nix::Error::EACCES | nix::Error::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The interfaces in a bridge, which the kernel shows as files; `None` if there is no such bridge.
fn ports(bridge: &Path) -> Option<Vec<String>> {
    let ports = fs::read_dir(bridge).ok()?.flatten();
    Some(
        ports
            .map(|port| port.file_name().to_string_lossy().into_owned())
            .collect(),
    )
}

/// Whether this may be the interface of a container. systemd-nspawn shortens a long name to its beginning and characters of a
/// hash.
fn is_of(port: &str, machine: &str) -> bool {
    const HASH: usize = 4;
    let name = format!("vb-{machine}");
    let beginning = name.get(..MAX_INTERFACE_NAME - HASH).unwrap_or(&name);
    port == name
        || (name.len() > MAX_INTERFACE_NAME
            && port.starts_with(beginning)
            && port.len() == MAX_INTERFACE_NAME)
}

fn delete_link(link: &str) -> io::Result<()> {
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    send(kernel.as_raw_fd(), &request(link), MsgFlags::empty())?;
    let mut answer = [0; 1024];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    outcome(answer.get(..length).unwrap_or_default())
}

/// The message that removes the link of this name: `struct nlmsghdr`, `struct ifinfomsg`, one attribute.
fn request(link: &str) -> Vec<u8> {
    /// Both structures have 16 bytes, and an attribute begins with 4.
    const HEAD: usize = 16;
    let attribute = 4 + link.len() + 1;
    let length = HEAD + HEAD + attribute.next_multiple_of(4);
    let mut message = Vec::with_capacity(length);
    // No interface name makes a length that does not fit.
    message.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    message.extend(DELETE_LINK.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    // Sequence number and port id, which are not needed; and a link that is identified by its name only.
    message.extend([0; 8 + HEAD]);
    message.extend(u16::try_from(attribute).unwrap_or_default().to_ne_bytes());
    message.extend(NAME.to_ne_bytes());
    message.extend(link.as_bytes());
    message.resize(length, 0);
    message
}

/// Parses the kernel's answer: `struct nlmsghdr`, then a negative errno, or 0.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok());
    let number = answer.get(16..20).and_then(|number| number.try_into().ok());
    match (kind.map(u16::from_ne_bytes), number.map(i32::from_ne_bytes)) {
        (Some(OUTCOME), Some(0)) => Ok(()),
        (Some(OUTCOME), Some(number)) => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_port_belongs_to_the_container_it_is_named_after() {
        let long = "averyveryverylongmachinename";
        for (port, machine) in [("vb-web", "web"), ("vb-averyvermBQ8", long)] {
            assert!(is_of(port, machine), "{port}");
        }
        for (port, machine) in [("vb-web2", "web"), ("vb-averyver", long), ("ve-web", "web")] {
            assert!(!is_of(port, machine), "{port}");
        }
        assert_eq!(ports(Path::new("/sys/class/net/lo/brif")), None);
    }

    #[test]
    fn a_missing_or_invalid_zone_is_released() {
        for zone in [
            "",
            "nobody-here",
            "../../x",
            "a-very-long-name-indeed",
            "a\0b",
        ] {
            remove_if_empty(zone, Some("machine")).unwrap();
        }
    }

    #[test]
    fn the_lock_is_refused_while_another_holds_it_and_leaves_no_file() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("zone");
        let held = ZoneLock::acquire(&path, Duration::ZERO).unwrap();
        let error = ZoneLock::acquire(&path, LOCK_INTERVAL).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        drop(held);
        assert!(!path.exists());
        ZoneLock::acquire(&path, Duration::ZERO).unwrap();
    }

    /// The next holder creates a new file; a lock on the old one would exclude no one.
    #[test]
    fn a_lock_on_an_unlinked_file_is_not_enough() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("zone");
        let held = ZoneLock::acquire(&path, Duration::ZERO).unwrap();
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || ZoneLock::acquire(&path, Duration::from_secs(60)).unwrap()
        });
        // Once this process has the old file open twice, the thread is waiting for its lock.
        let opened = || {
            let all = fs::read_dir("/proc/self/fd").unwrap().flatten();
            all.filter(|entry| fs::read_link(entry.path()).is_ok_and(|file| file == path))
                .count()
        };
        let end = Instant::now() + Duration::from_secs(60);
        while opened() < 2 {
            assert!(Instant::now() < end, "no process waits for the lock");
            std::thread::sleep(LOCK_INTERVAL);
        }
        drop(held);
        let taken = waiting.join().unwrap();
        assert!(path.exists(), "the lock is on another file");
        ZoneLock::acquire(&path, Duration::ZERO).unwrap_err();
        drop(taken);
    }

    /// The kernel understands the request: it answers that there is no such link, or that privileges are missing.
    #[test]
    fn a_netlink_error_is_reported() {
        let error = delete_link("vz-nobodyhere").unwrap_err();
        let want = [nix::Error::ENODEV, nix::Error::EPERM].map(|error| Some(error as i32));
        assert!(want.contains(&error.raw_os_error()), "{error}");
    }

    #[test]
    fn an_invalid_netlink_response_is_an_error() {
        for answer in [&[][..], &[0; 20], &[2; 7]] {
            assert_eq!(
                outcome(answer).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
    }
}
