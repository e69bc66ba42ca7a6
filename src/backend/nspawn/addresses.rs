//! Finds the addresses of a container.

use std::fs;
use std::net::IpAddr;

use crate::container::Process;
use crate::sys::process::is_alive;
use crate::sys::procfs::parse_addresses;

/// The addresses in the network namespace of a container with this first process, without loopback ones. Empty in the host's network, and
/// once the process has exited.
pub(super) fn of_container(leader: Process) -> Vec<IpAddr> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let own = namespace(&leader.pid.to_string());
    if own.is_none() || own == namespace("self") {
        return Vec::new();
    }
    let text = |file: &str| {
        let path = format!("/proc/{}/net/{file}", leader.pid);
        fs::read_to_string(path).unwrap_or_default()
    };
    let found = parse_addresses(&text("fib_trie"), &text("if_inet6"));
    // Checked last: then everything before was read from this process and not from a later one with its pid.
    match is_alive(leader) {
        true => found,
        false => Vec::new(),
    }
}
