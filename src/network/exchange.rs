//! A request to the kernel over netlink, and its answer up to the end.

use std::io;

use netlink_packet_core::{
    NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// A socket for one request at a time.
#[derive(Debug)]
pub(super) struct Kernel(Socket);

impl Kernel {
    /// Connects to a family of `netlink_sys::protocols`.
    pub(super) fn connect(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends a request with these flags besides `NLM_F_REQUEST`, of which one has to ask for a dump or an acknowledgement, and returns what
    /// comes up to the end. Messages that can't be decoded are left out.
    pub(super) fn request<M>(&self, flags: u16, message: M) -> io::Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut request = vec![0; message.buffer_len()];
        message.serialize(&mut request);
        self.0.send(&request, 0)?;
        let mut messages = Vec::new();
        loop {
            let packet = match self.0.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?.0,
            };
            if read(&packet, &mut messages)? == Progress::Ended {
                return Ok(messages);
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    Ended,
}

/// Reads the messages of one packet.
fn read<M: NetlinkDeserializable>(
    mut packet: &[u8],
    messages: &mut Vec<M>,
) -> io::Result<Progress> {
    while let Some(length) = packet.first_chunk() {
        let length = usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX);
        let Some(message) = packet.get(..length).filter(|message| !message.is_empty()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match NetlinkMessage::<M>::deserialize(message).map(|message| message.payload) {
            Ok(NetlinkPayload::Done(_)) => return Ok(Progress::Ended),
            Ok(NetlinkPayload::Error(outcome)) if outcome.code.is_none() => {
                return Ok(Progress::Ended);
            }
            Ok(NetlinkPayload::Error(outcome)) => return Err(outcome.to_io()),
            Ok(NetlinkPayload::InnerMessage(message)) => messages.push(message),
            Ok(_) | Err(_) => {}
        }
        // Messages begin at multiples of four bytes.
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

#[cfg(test)]
mod tests {
    use netlink_packet_sock_diag::SockDiagMessage;

    use super::*;

    #[test]
    fn an_answer_that_makes_no_sense_is_an_error() {
        for packet in [&[0; 16][..], &[200, 0, 0, 0, 0, 0], &[255; 8]] {
            read::<SockDiagMessage>(packet, &mut Vec::new()).unwrap_err();
        }
        let progress = read::<SockDiagMessage>(&[], &mut Vec::new()).unwrap();
        assert_eq!(progress, Progress::More);
    }
}
