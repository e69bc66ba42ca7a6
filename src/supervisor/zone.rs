//! The bridge of a zone, which systemd-nspawn makes for the first container of the zone and removes with the last: removed here as
//! systemd-nspawn does it, after one that was killed. Touches no bridge that has an interface, and no other link.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// `RTM_DELLINK` of `linux/rtnetlink.h`.
const DELETE_LINK: u16 = 17;
/// `IFLA_IFNAME` of `linux/if_link.h`.
const NAME: u16 = 3;
/// `NLMSG_ERROR`, which is also how success is told.
const OUTCOME: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 1 | 4;
/// The longest name of an interface, in bytes.
const LONGEST: usize = 15;

/// How long the kernel may take to remove the interface of a container whose last process has gone.
const GOING: Duration = Duration::from_secs(2);

/// Removes the bridge of this zone in the network of the calling process, if nobody is in it. Not there is fine. The interface of
/// a container `leaving` it is waited for.
pub(super) fn remove_if_empty(zone: &str, leaving: Option<&str>) -> io::Result<()> {
    let link = format!("vz-{zone}");
    if link.len() > LONGEST || link.contains(['/', '\0', ':']) {
        return Ok(());
    }
    let bridge = Path::new("/sys/class/net").join(&link).join("brif");
    if let Some(machine) = leaving {
        let end = Instant::now() + GOING;
        // Nobody tells when it has gone.
        while ports(&bridge).is_some_and(|ports| ports.iter().any(|port| is_of(port, machine)))
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    if ports(&bridge).is_none_or(|ports| !ports.is_empty()) {
        return Ok(());
    }
    match delete_link(&link) {
        // Somebody else was faster.
        Err(error) if error.raw_os_error() == Some(nix::Error::ENODEV as i32) => Ok(()),
        deleted => deleted,
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

/// Whether this may be the interface of a container. Of a long name systemd-nspawn takes the beginning, and characters of a hash.
fn is_of(port: &str, machine: &str) -> bool {
    const HASH: usize = 4;
    let name = format!("vb-{machine}");
    let beginning = name.get(..LONGEST - HASH).unwrap_or(&name);
    port == name || (name.len() > LONGEST && port.starts_with(beginning) && port.len() == LONGEST)
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
    // No name of an interface makes a length that does not fit.
    message.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    message.extend(DELETE_LINK.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    // A number for the request and one for the asker, which needs neither; and a link that is told by its name alone.
    message.extend([0; 8 + HEAD]);
    message.extend(u16::try_from(attribute).unwrap_or_default().to_ne_bytes());
    message.extend(NAME.to_ne_bytes());
    message.extend(link.as_bytes());
    message.resize(length, 0);
    message
}

/// What the kernel answers: `struct nlmsghdr`, then the negative number of an error, or 0.
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
    fn a_port_is_of_the_container_it_is_called_after() {
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
    fn a_zone_that_is_not_there_or_is_no_name_is_fine() {
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

    /// The kernel understands the question: it knows no such link, or asks for rights first.
    #[test]
    fn the_kernel_says_what_is_wrong() {
        let error = delete_link("vz-nobodyhere").unwrap_err();
        let want = [nix::Error::ENODEV, nix::Error::EPERM].map(|error| Some(error as i32));
        assert!(want.contains(&error.raw_os_error()), "{error}");
    }

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        for answer in [&[][..], &[0; 20], &[2; 7]] {
            assert_eq!(
                outcome(answer).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
    }
}
