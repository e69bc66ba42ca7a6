//! How the messages of a control connection are delimited. Each is one of the [`packets`], which may carry descriptors. Drivers that
//! have no packet socket use a stream socket with one message per line; the messages are the same. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use packets::Descriptors;
use rustix::net::{RecvFlags, SendFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{ProtocolError, decode_next, encode};

/// How the messages of one connection are delimited.
#[derive(Debug)]
pub enum Framing {
    /// A message is a packet.
    Packets,
    /// A message is a line. Holds the received bytes that have not been decoded yet.
    Lines(Vec<u8>),
}

/// A received message and what came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// Its descriptors.
    pub descriptors: Descriptors,
}

/// How much is read from a stream at once.
const CHUNK_BYTES: usize = 1024;

impl Framing {
    /// Sends a message. If this fails with anything but [`io::ErrorKind::WouldBlock`], the connection can't be used any more.
    pub fn send(&self, socket: impl AsFd, message: &impl Serialize) -> io::Result<()> {
        match self {
            Self::Packets => packets::send(socket, &packets::encode(message), &[]),
            Self::Lines(_) => {
                let line = encode(message);
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                match rustix::net::send(socket, &line, flags)? {
                    sent if sent == line.len() => Ok(()),
                    // The rest would have to wait.
                    _ => Err(io::ErrorKind::WriteZero.into()),
                }
            }
        }
    }

    /// The same with a descriptor. Fails with [`io::ErrorKind::Unsupported`] if messages are lines.
    pub fn send_with(
        &self,
        socket: impl AsFd,
        message: &impl Serialize,
        descriptor: BorrowedFd<'_>,
    ) -> io::Result<()> {
        match self {
            Self::Packets => packets::send(socket, &packets::encode(message), &[descriptor]),
            Self::Lines(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Receives the next message. Fails with [`io::ErrorKind::WouldBlock`] if there is none yet, and with
    /// [`io::ErrorKind::InvalidData`] if something else was received. After every other error the connection is closed.
    pub fn receive<T: DeserializeOwned>(&mut self, socket: impl AsFd) -> io::Result<Received<T>> {
        let (message, descriptors) = match self {
            Self::Packets => {
                let packet = packets::receive(socket)?;
                (
                    packet.message().map_err(|_| ProtocolError),
                    packet.descriptors,
                )
            }
            Self::Lines(received) => {
                let message = receive_line(socket, received)?;
                if received.is_empty() {
                    // An idle connection holds no buffer.
                    *received = Vec::new();
                }
                (message, Descriptors::default())
            }
        };
        match message {
            Ok(message) => Ok(Received {
                message,
                descriptors,
            }),
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    /// Whether a message has been received that the kernel does not report any more.
    pub fn has_buffered_message(&self) -> bool {
        matches!(self, Self::Lines(received) if received.contains(&b'\n'))
    }
}

/// Reads from a stream until a line is complete or too long.
fn receive_line<T: DeserializeOwned>(
    socket: impl AsFd,
    received: &mut Vec<u8>,
) -> io::Result<Result<T, ProtocolError>> {
    let mut chunk = [0; CHUNK_BYTES];
    loop {
        if let Some(message) = decode_next(received) {
            return Ok(message);
        }
        match rustix::net::recv(&socket, &mut chunk, RecvFlags::DONTWAIT)? {
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (length, _) => received.extend_from_slice(&chunk[..length]),
        }
    }
}
