//! Requests as bytes, and what is answered.

use dhcproto::{Decodable as _, Decoder};
use proptest::prelude::*;
use rstest::rstest;

use super::*;

const OWN: &str = "172.31.9.7";
const OTHER: &str = "172.31.9.8";
const ROUTER: &str = "169.254.1.1";
const EVERYBODY: &str = "255.255.255.255";
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn lease() -> Lease {
    Lease {
        address: OWN.parse().unwrap(),
        mac: MAC,
        router: ROUTER.parse().unwrap(),
        dns: vec!["192.0.2.53".parse().unwrap()],
        search: vec!["trial.example".to_owned(), "not a name..".to_owned()],
        host_name: Some("shop".to_owned()),
        mtu: Some(1400),
    }
}

fn request(kind: MessageType) -> Message {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(7, none, none, none, none, &MAC);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    message
}

fn frame(message: &Message, to: &str) -> Vec<u8> {
    let payload = message.to_vec().unwrap();
    let from = (MAC, Ipv4Addr::UNSPECIFIED);
    let mut frame = compose(from, ([0xff; 6], to.parse().unwrap()), &payload).unwrap();
    let udp = ETHERNET_HEADER + IP_HEADER;
    frame[udp..udp + 2].copy_from_slice(&CLIENT_PORT.to_be_bytes());
    frame[udp + 2..udp + 4].copy_from_slice(&SERVER_PORT.to_be_bytes());
    frame
}

/// The answer with its destination.
fn answered(frame: &[u8]) -> Option<([u8; 6], Ipv4Addr, Message)> {
    let mut reply = answer(&lease(), HOST_MAC, frame)?;
    assert_eq!(reply[6..12], HOST_MAC);
    assert_eq!(checksum(&[&reply[14..34]]), 0);
    let mac = *reply.first_chunk().unwrap();
    // It is parsed like a request.
    let port = ETHERNET_HEADER + IP_HEADER + 2;
    assert_eq!(reply[port..port + 2], CLIENT_PORT.to_be_bytes());
    reply[port..port + 2].copy_from_slice(&SERVER_PORT.to_be_bytes());
    let (to, payload) = payload(&reply).unwrap();
    let message = Message::decode(&mut Decoder::new(payload)).unwrap();
    assert_eq!((message.opcode(), message.xid()), (Opcode::BootReply, 7));
    assert_eq!(message.chaddr(), MAC);
    Some((mac, to, message))
}

/// The states of a client, RFC 2131, 4.3.2.
#[rstest]
#[case::discover(MessageType::Discover, "", "", "", Some((MessageType::Offer, OWN)))]
#[case::discover_another(MessageType::Discover, "", OTHER, "", Some((MessageType::Offer, OWN)))]
#[case::select(MessageType::Request, "", OWN, ROUTER, Some((MessageType::Ack, OWN)))]
#[case::select_another(MessageType::Request, "", OTHER, ROUTER, Some((MessageType::Nak, EVERYBODY)))]
#[case::select_another_server(MessageType::Request, "", OWN, OTHER, None)]
#[case::reboot(MessageType::Request, "", OWN, "", Some((MessageType::Ack, OWN)))]
#[case::reboot_with_an_old_address(MessageType::Request, "", OTHER, "", Some((MessageType::Nak, EVERYBODY)))]
#[case::renew(MessageType::Request, OWN, "", "", Some((MessageType::Ack, OWN)))]
#[case::renew_another(MessageType::Request, OTHER, "", "", Some((MessageType::Nak, EVERYBODY)))]
#[case::request_nothing(MessageType::Request, "", "", "", None)]
#[case::inform(MessageType::Inform, OWN, "", "", Some((MessageType::Ack, OWN)))]
#[case::inform_without_address(MessageType::Inform, "", "", "", Some((MessageType::Ack, EVERYBODY)))]
#[case::release(MessageType::Release, OWN, "", ROUTER, None)]
#[case::decline(MessageType::Decline, "", OWN, ROUTER, None)]
#[case::of_a_server(MessageType::Offer, "", "", "", None)]
#[case::unknown(MessageType::Unknown(99), "", "", "", None)]
fn a_client_is_answered_by_its_state(
    #[case] kind: MessageType,
    #[case] uses: &str,
    #[case] wants: &str,
    #[case] server: &str,
    #[case] expected: Option<(MessageType, &str)>,
) {
    let mut message = request(kind);
    if let Ok(uses) = uses.parse::<Ipv4Addr>() {
        message.set_ciaddr(uses);
    }
    let options = message.opts_mut();
    if let Ok(wants) = wants.parse() {
        options.insert(DhcpOption::RequestedIpAddress(wants));
    }
    if let Ok(server) = server.parse() {
        options.insert(DhcpOption::ServerIdentifier(server));
    }
    let found = answered(&frame(&message, EVERYBODY));
    let expected = expected.map(|(kind, to)| (kind, to.parse::<Ipv4Addr>().unwrap()));
    let seen = found.as_ref();
    let seen = seen.map(|(_, to, message)| (message.opts().msg_type().unwrap(), *to));
    assert_eq!(seen, expected);
    let Some((mac, to, message)) = found else {
        return;
    };
    assert_eq!(mac, if to.is_broadcast() { [0xff; 6] } else { MAC });
    let gives = message.opts().msg_type() != Some(MessageType::Nak) && kind != MessageType::Inform;
    let address = if gives { OWN } else { "0.0.0.0" };
    assert_eq!(message.yiaddr(), address.parse::<Ipv4Addr>().unwrap());
    assert_eq!(message.opts().contains(OptionCode::AddressLeaseTime), gives);
}

#[test]
fn a_client_that_asks_for_a_broadcast_gets_one() {
    let mut message = request(MessageType::Discover);
    message.set_flags(dhcproto::v4::Flags::default().set_broadcast());
    let (mac, to, reply) = answered(&frame(&message, EVERYBODY)).unwrap();
    assert_eq!((mac, to), ([0xff; 6], Ipv4Addr::BROADCAST));
    assert!(reply.flags().broadcast());
}

#[test]
fn the_lease_is_in_the_answer() {
    let mut message = request(MessageType::Discover);
    let client = DhcpOption::ClientIdentifier(vec![1, 2, 3]);
    message.opts_mut().insert(client.clone());
    let (_, _, reply) = answered(&frame(&message, EVERYBODY)).unwrap();
    let router: Ipv4Addr = ROUTER.parse().unwrap();
    let expected = [
        DhcpOption::MessageType(MessageType::Offer),
        DhcpOption::ServerIdentifier(router),
        DhcpOption::AddressLeaseTime(FOREVER),
        DhcpOption::SubnetMask(Ipv4Addr::BROADCAST),
        DhcpOption::Router(vec![router]),
        DhcpOption::ClasslessStaticRoute(vec![
            ("169.254.1.1/32".parse().unwrap(), Ipv4Addr::UNSPECIFIED),
            ("0.0.0.0/0".parse().unwrap(), router),
        ]),
        DhcpOption::DomainNameServer(lease().dns),
        DhcpOption::DomainName("trial.example".to_owned()),
        DhcpOption::DomainSearch(vec![Name::from_ascii("trial.example.").unwrap()]),
        DhcpOption::Hostname("shop".to_owned()),
        DhcpOption::InterfaceMtu(1400),
        client,
    ];
    for option in &expected {
        assert_eq!(reply.opts().get(OptionCode::from(option)), Some(option));
    }
    assert_eq!(reply.opts().len(), expected.len());
}

#[test]
fn what_the_lease_lacks_is_not_in_the_answer() {
    let lease = Lease {
        dns: Vec::new(),
        search: Vec::new(),
        host_name: None,
        mtu: None,
        ..lease()
    };
    let codes = parameters(&lease).into_iter();
    let codes: Vec<_> = codes.map(|option| OptionCode::from(&option)).collect();
    let needed = [
        OptionCode::SubnetMask,
        OptionCode::Router,
        OptionCode::ClasslessStaticRoute,
    ];
    assert_eq!(codes, needed);
}

/// A device that something in the container has made; a relay; a server elsewhere; no Ethernet.
#[test]
fn what_is_not_for_this_lease_is_not_answered() {
    let discover = || request(MessageType::Discover);
    let mut others = vec![frame(&discover(), OTHER)];
    let mut changed = |change: &dyn Fn(&mut Message)| {
        let mut message = discover();
        change(&mut message);
        others.push(frame(&message, EVERYBODY));
    };
    changed(&|message| {
        let _ = message.set_chaddr(&[2, 0, 0, 0, 0, 8]);
    });
    changed(&|message| {
        let _ = message.set_chaddr(&[2; 16]);
    });
    changed(&|message| {
        let _ = message.set_giaddr([10, 0, 0, 1]);
    });
    changed(&|message| {
        let _ = message.set_opcode(Opcode::BootReply);
    });
    changed(&|message| {
        let _ = message.set_htype(HType::Unknown(32));
    });
    changed(&|message| {
        let _ = message.opts_mut().remove(OptionCode::MessageType);
    });
    for (at, value) in [
        // Another protocol of Ethernet, IPv6, a header that is too short, a fragment, TCP, another port.
        (12, 0x86),
        (14, 0x65),
        (14, 0x44),
        (20, 0x20),
        (23, 6),
        (37, 69),
    ] {
        let mut frame = frame(&discover(), EVERYBODY);
        frame[at] = value;
        others.push(frame);
    }
    for frame in others {
        assert_eq!(answer(&lease(), HOST_MAC, &frame), None);
    }
    assert!(answered(&frame(&discover(), EVERYBODY)).is_some());
    assert!(answered(&frame(&discover(), ROUTER)).is_some());
}

/// A client may accept no more than 576 bytes.
#[rstest]
#[case::by_default(None, 576)]
#[case::less_than_allowed(Some(1), 576)]
#[case::more(Some(1200), 1200)]
#[case::more_than_fits(Some(u16::MAX), 1500)]
fn an_answer_is_as_long_as_the_client_accepts(#[case] size: Option<u16>, #[case] limit: usize) {
    let mut message = request(MessageType::Discover);
    if let Some(size) = size {
        message.opts_mut().insert(DhcpOption::MaxMessageSize(size));
    }
    let mut lease = lease();
    lease.search = (0..60).map(|n| format!("domain-{n}.number-{n}")).collect();
    lease.dns = vec![Ipv4Addr::LOCALHOST; 60];
    let reply = answer(&lease, HOST_MAC, &frame(&message, EVERYBODY)).unwrap();
    assert!(reply.len() - ETHERNET_HEADER <= limit, "{}", reply.len());
    lease.search.truncate(2);
    lease.dns.truncate(2);
    let reply = answer(&lease, HOST_MAC, &frame(&message, EVERYBODY)).unwrap();
    assert!(reply.windows(8).any(|bytes| bytes == b"domain-1"));
}

/// Frames that are nearly right, so that all of the code is reached.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let options = proptest::collection::vec(any::<u8>(), 0..400);
    let changes = proptest::collection::vec((0_usize..320, any::<u8>()), 0..6);
    let length = 0_usize..700;
    (options, changes, length).prop_map(|(options, changes, length)| {
        let mut message = request(MessageType::Discover).to_vec().unwrap();
        message.pop();
        message.extend(options);
        let to = ([0xff; 6], Ipv4Addr::BROADCAST);
        let mut frame = compose((MAC, Ipv4Addr::UNSPECIFIED), to, &message).unwrap();
        frame[36..38].copy_from_slice(&SERVER_PORT.to_be_bytes());
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(length.max(240));
        frame
    })
}

proptest! {
    #[test]
    fn any_bytes_are_survived(frame in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = answer(&lease(), HOST_MAC, &frame);
    }

    #[test]
    fn any_content_is_survived(content in proptest::collection::vec(any::<u8>(), 0..1400)) {
        let to = ([0xff; 6], Ipv4Addr::BROADCAST);
        let mut frame = compose((MAC, Ipv4Addr::UNSPECIFIED), to, &content).unwrap();
        frame[36..38].copy_from_slice(&SERVER_PORT.to_be_bytes());
        let _ = answer(&lease(), HOST_MAC, &frame);
    }

    #[test]
    fn any_change_of_a_request_is_survived(frame in nearly_right()) {
        let _ = answer(&lease(), HOST_MAC, &frame);
    }
}
