//! The notification socket, in the protocol of the service manager: one datagram per message. Without a valid `NOTIFY_SOCKET` nothing is
//! sent, the same as in the real tool.

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
    // The real tool does not fail either if the receiver is gone.
    if let Ok(socket) = UnixDatagram::unbound() {
        socket.send_to_addr(message.as_bytes(), &address).ok();
    }
}

/// Reports to a test that listens on this socket that the process has reached this step, and waits until the test closes the connection.
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
