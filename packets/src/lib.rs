//! Packets between two processes of the driver, on a `SOCK_SEQPACKET` unix socket: one JSON value each, and file descriptors with it. The
//! control socket (plugin and supervisor) and the init channel (supervisor and container init) both use them. Knows no message. Nothing
//! here waits: a call that would have to fails with [`io::ErrorKind::WouldBlock`], whatever the flags of the socket.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, recv, recvmsg, sendmsg, socket_with, socketpair, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The driver never sends a longer packet. One of this length fits into a socket buffer of the kernel's default size.
pub const MAX_PACKET_BYTES: usize = 128 * 1024;

/// The driver never sends more descriptors with a packet: those of an exec session.
pub const MAX_DESCRIPTORS: usize = 5;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Two connected sockets, both close-on-exec and non-blocking.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        FLAGS,
        None,
    )?)
}

/// A socket that accepts connections at this path, which must not exist yet.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // The kernel lowers it to the limit of the host.
    rustix::net::listen(&socket, i32::MAX)?;
    Ok(socket)
}

/// The next connection to a socket of [`listen`].
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(accept_with(listener, FLAGS)?)
}

/// Connects to the socket at this path.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        FLAGS,
        None,
    )?)
}

/// Makes the kernel report the sender of every packet that is sent from now on, see [`Packet::sender`].
pub fn report_senders(socket: impl AsFd) -> io::Result<()> {
    Ok(sockopt::set_socket_passcred(socket, true)?)
}

/// Encodes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // The driver's messages consist of strings and numbers, which can always be encoded as JSON.
    serde_json::to_vec(message).unwrap_or_default()
}

/// Decodes a message. The error never contains any of it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    if bytes.len() > MAX_PACKET_BYTES {
        return Err(Malformed::TooLong);
    }
    Ok(serde_json::from_slice(bytes)?)
}

/// Sends an encoded message with these descriptors. Fails with `EMSGSIZE` if it is longer than [`MAX_PACKET_BYTES`], and with `EINVAL` if
/// there are more than [`MAX_DESCRIPTORS`]. Raises no SIGPIPE.
pub fn send(socket: impl AsFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.len() > MAX_PACKET_BYTES {
        return Err(Errno::MSGSIZE.into());
    }
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Errno::INVAL.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let slices = [IoSlice::new(message)];
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| sendmsg(&socket, &slices, &mut control, flags))?;
    Ok(())
}

/// Receives a packet into a buffer of its size, so that an idle process holds no buffer. Fails with
/// [`io::ErrorKind::UnexpectedEof`] once the peer has closed its end and everything that it sent has been received.
pub fn receive(socket: impl AsFd) -> io::Result<Packet> {
    let socket = socket.as_fd();
    let length = despite_reset(|| {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, length) = recv(socket, &mut [0; 0][..], flags)?;
        Ok(length)
    })?;
    // What is too long is rejected, so its content is not needed.
    let wanted = Some(length).filter(|length| *length <= MAX_PACKET_BYTES);
    let mut bytes = vec![0; wanted.unwrap_or_default()];
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = despite_reset(|| {
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut slices = [IoSliceMut::new(&mut bytes)];
        recvmsg(socket, &mut slices, &mut control, flags)
    })?;
    bytes.truncate(received.bytes);
    let mut packet = Packet {
        too_long: received.flags.contains(ReturnFlags::TRUNC),
        bytes,
        descriptors: Descriptors {
            received: Vec::new(),
            incomplete: received.flags.contains(ReturnFlags::CTRUNC),
        },
        sender: None,
    };
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(more) => packet.descriptors.received.extend(more),
            RecvAncillaryMessage::ScmCredentials(sender) => {
                packet.sender = Some(sender.pid.as_raw_nonzero().get()).filter(|pid| *pid > 0);
            }
            _ => {}
        }
    }
    if packet.bytes.is_empty() && !packet.too_long && is_closed_by_peer(socket)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(packet)
}

/// Repeats a call that failed because the peer closed its end with packets unread: the kernel reports that once, ahead of the packets that
/// the peer had sent before.
fn despite_reset<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    match retry_on_intr(&mut call) {
        Err(Errno::CONNRESET) => retry_on_intr(call),
        other => other,
    }
}

/// Whether nothing arrives any more. Without it an empty packet could not be distinguished from the end of the connection.
fn is_closed_by_peer(socket: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let mut descriptors = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let no_time = Timespec::default();
    retry_on_intr(|| poll(&mut descriptors, Some(&no_time)))?;
    Ok(!descriptors[0].revents().is_empty())
}

/// A received packet. Whatever is not taken from it is closed with it.
pub struct Packet {
    bytes: Vec<u8>,
    too_long: bool,
    /// The descriptors that came with it, close-on-exec.
    pub descriptors: Descriptors,
    /// The pid of the sender in this process's pid namespace, as reported by the kernel if [`report_senders`] was called.
    pub sender: Option<i32>,
}

impl Packet {
    /// Decodes the message.
    pub fn message<T: DeserializeOwned>(&self) -> Result<T, Malformed> {
        if self.too_long {
            return Err(Malformed::TooLong);
        }
        decode(&self.bytes)
    }
}

/// Leaves out the content, which may be secret.
impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("length", &self.bytes.len())
            .field("descriptors", &self.descriptors)
            .field("sender", &self.sender)
            .finish_non_exhaustive()
    }
}

/// The descriptors of one packet. Dropping it closes them.
#[derive(Debug, Default)]
pub struct Descriptors {
    received: Vec<OwnedFd>,
    /// Whether the kernel has dropped some, because there were too many or this process may not open more.
    incomplete: bool,
}

impl Descriptors {
    /// The descriptors, if there are exactly `N`. Otherwise they are closed.
    pub fn take<const N: usize>(self) -> Result<[OwnedFd; N], WrongDescriptors> {
        if self.incomplete {
            return Err(WrongDescriptors);
        }
        self.received.try_into().map_err(|_| WrongDescriptors)
    }
}

/// A packet did not have the descriptors that its message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongDescriptors;

impl fmt::Display for WrongDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the wrong number of file descriptors came with the message")
    }
}

impl std::error::Error for WrongDescriptors {}

/// The bytes are not a valid message. Gives the position and not the content, which may be secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Longer than [`MAX_PACKET_BYTES`].
    TooLong,
    /// Not JSON, or not the JSON of this message.
    Invalid {
        /// The line at which decoding failed.
        line: usize,
        /// The byte of this line.
        column: usize,
    },
}

impl From<serde_json::Error> for Malformed {
    fn from(error: serde_json::Error) -> Self {
        Self::Invalid {
            line: error.line(),
            column: error.column(),
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "longer than {MAX_PACKET_BYTES} bytes"),
            Self::Invalid { line, column } => {
                write!(f, "not a valid message: line {line}, byte {column}")
            }
        }
    }
}

impl std::error::Error for Malformed {}

#[cfg(test)]
mod tests;
