//! Notices that others remove the driver's table from the host's firewall, as a reload with `nft flush ruleset` does. The kernel reports every
//! change of a firewall to the multicast group of nftables; nothing is read in between.

use std::io;
use std::os::fd::AsFd as _;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use tokio::net::UnixDatagram;

use super::firewall;

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// `NFT_MSG_DELTABLE` of `NFNL_SUBSYS_NFTABLES`.
const DELETED_TABLE: u16 = 10 << 8 | 2;

/// `NFPROTO_INET`.
const INET: u8 = 1;

/// `NFTA_TABLE_NAME`.
const NAME: u16 = 1;

/// The bits of an attribute's type that are not flags.
const TYPE_MASK: u16 = 0x3fff;

/// The length of the header of a message.
const HEADER: usize = 16;

/// The length of what nftables puts behind it, which begins with the family.
const FAMILY: usize = 4;

/// The length of the header of an attribute.
const ATTRIBUTE: usize = 4;

/// More than the kernel puts in one packet.
const PACKET: usize = 32 * 1024;

/// Listens to changes of the firewall from its creation on.
#[derive(Debug)]
pub struct Watch {
    /// A netlink socket. To the runtime all sockets for packets are the same.
    socket: UnixDatagram,
    packet: Vec<u8>,
}

impl Watch {
    /// Listens in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        let socket = socket.as_fd().try_clone_to_owned()?;
        Ok(Self {
            socket: UnixDatagram::from_std(socket.into())?,
            packet: vec![0; PACKET],
        })
    }

    /// Waits until the table was removed, or until so much has changed that it may have been among that.
    pub async fn lost(&mut self) -> io::Result<()> {
        loop {
            match self.socket.recv(&mut self.packet).await {
                Ok(length) if self.packet.get(..length).is_some_and(is_loss) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(nix::Error::ENOBUFS as i32) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether one of the messages in a packet says that the table was removed.
fn is_loss(mut packet: &[u8]) -> bool {
    while let Some(length) = number32(packet) {
        let Some(message) = packet.get(..length.max(HEADER)) else {
            break;
        };
        let kind = message.get(4..).and_then(number16);
        let body = message.get(HEADER..).unwrap_or_default();
        if kind == Some(DELETED_TABLE) && body.first() == Some(&INET) && names_table(body) {
            return true;
        }
        packet = packet
            .get(message.len().next_multiple_of(4)..)
            .unwrap_or_default();
    }
    false
}

fn names_table(body: &[u8]) -> bool {
    let mut rest = body.get(FAMILY..).unwrap_or_default();
    while let (Some(length), Some(kind)) = (number16(rest), rest.get(2..).and_then(number16)) {
        let length = usize::from(length).max(ATTRIBUTE);
        let value = rest.get(ATTRIBUTE..length).unwrap_or_default();
        if kind & TYPE_MASK == NAME {
            return value.strip_suffix(&[0]) == Some(firewall::TABLE.as_bytes());
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn number16(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn number32(bytes: &[u8]) -> Option<usize> {
    let bytes = bytes.first_chunk()?;
    usize::try_from(u32::from_ne_bytes(*bytes)).ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::network::firewall::{open, restore};
    use crate::network::testing::{Namespace, plan, port};

    /// How long a test waits for a message. Only a broken test ever waits this long.
    const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

    /// A message as the kernel sends it, with the table's use count behind its name.
    fn message(kind: u16, family: u8, name: &str) -> Vec<u8> {
        let mut attributes = Vec::new();
        for (kind, value) in [(1u16, [name.as_bytes(), &[0]].concat()), (3, vec![0; 4])] {
            let length = u16::try_from(4 + value.len()).unwrap();
            attributes.extend(length.to_ne_bytes());
            attributes.extend(kind.to_ne_bytes());
            attributes.extend(value);
            attributes.resize(attributes.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(20 + attributes.len()).unwrap();
        let mut message = Vec::from(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend([family, 0, 0, 0]);
        message.extend(attributes);
        message
    }

    #[rstest]
    #[case::removed(DELETED_TABLE, 1, "nomad_driver_nspawn", true)]
    #[case::made(10 << 8, 1, "nomad_driver_nspawn", false)]
    #[case::of_another_family(DELETED_TABLE, 2, "nomad_driver_nspawn", false)]
    #[case::of_others(DELETED_TABLE, 1, "nomad_driver_nspawn2", false)]
    #[case::of_others_with_a_short_name(DELETED_TABLE, 1, "nomad", false)]
    fn the_removal_of_the_table_is_recognized(
        #[case] kind: u16,
        #[case] family: u8,
        #[case] name: &str,
        #[case] want: bool,
    ) {
        let message = message(kind, family, name);
        assert_eq!(is_loss(&message), want);
        let others = [self::message(DELETED_TABLE, 1, "filter"), message.clone()].concat();
        assert_eq!(is_loss(&others), want);
        for length in 0..message.len() {
            is_loss(&message[..length]);
        }
    }

    #[rstest]
    #[case(&[0; 64])]
    #[case(&[255; 64])]
    fn a_packet_that_makes_no_sense_is_no_loss(#[case] packet: &[u8]) {
        assert!(!is_loss(packet));
    }

    #[test]
    fn a_flushed_ruleset_is_noticed() {
        let Some(host) = Namespace::new(&["nft"]) else {
            return;
        };
        let plan = plan(1, &[port("http", None, 8080, 80)]);
        let watched = plan.clone();
        let noticed = host.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut watch = Watch::open().unwrap();
                open(&watched).unwrap();
                assert!(!restore(&watched).unwrap(), "nothing is missing");
                nft(&["flush", "ruleset"]);
                tokio::time::timeout(DEADLINE, watch.lost()).await
            })
        });
        noticed.unwrap().unwrap();
        assert!(host.run(move || restore(&plan)).unwrap());
        assert!(host.call("nft list ruleset").contains("8080 comment"));
    }

    #[expect(clippy::disallowed_methods, reason = "nft is a program")]
    fn nft(words: &[&str]) {
        let status = std::process::Command::new("nft").args(words).status();
        assert!(status.unwrap().success());
    }
}
