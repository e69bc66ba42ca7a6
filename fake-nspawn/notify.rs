//! The notification socket, as the service manager's protocol has it: one datagram per message. A missing or bad
//! `NOTIFY_SOCKET` is silence, as it is for the real tool.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::Path;

/// Sends one message to this process's `NOTIFY_SOCKET`.
pub(crate) fn send(message: &str) {
    let Some(address) = std::env::var("NOTIFY_SOCKET")
        .ok()
        .and_then(|text| address(&text))
    else {
        return;
    };
    // A listener that is gone does not stop the real tool either.
    if let Ok(socket) = UnixDatagram::unbound() {
        socket.send_to_addr(message.as_bytes(), &address).ok();
    }
}

/// Tells a test that listens on this socket that its step is reached, and waits until it closes the connection.
pub(crate) fn hold(socket: Option<&Path>) {
    let Some(mut stream) = socket.and_then(|path| UnixStream::connect(path).ok()) else {
        return;
    };
    if writeln!(stream, "nspawn {}", std::process::id()).is_ok() {
        // Any answer and any error end the wait.
        stream.read_exact(&mut [0]).ok();
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).ok(),
        None if text.starts_with('/') => SocketAddr::from_pathname(text).ok(),
        None => None,
    }
}
