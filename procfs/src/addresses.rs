//! The addresses of a network namespace, from the files in `/proc/<pid>/net` of a process in it: no process has to enter it. Addresses of
//! the loopback device are left out.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses in the texts of `fib_trie` and `if_inet6`, in order. Lines that can't be parsed are skipped.
pub fn parse_addresses(fib_trie: &str, if_inet6: &str) -> Vec<IpAddr> {
    let version_4 = parse_fib_trie(fib_trie).into_iter().map(IpAddr::from);
    let version_6 = if_inet6.lines().filter_map(version_6).map(IpAddr::from);
    let not_loopback = |address: &IpAddr| !address.is_loopback();
    version_4.chain(version_6).filter(not_loopback).collect()
}

/// An address of the namespace itself is a line `|-- ADDRESS`, followed by `/32 host LOCAL`. Each is in the table `Main` and in `Local`.
fn parse_fib_trie(text: &str) -> BTreeSet<Ipv4Addr> {
    let mut found = BTreeSet::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in text.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line == "/32 host LOCAL" {
            found.extend(last);
        }
    }
    found
}

/// 32 hexadecimal digits are the first of several words.
fn version_6(line: &str) -> Option<Ipv6Addr> {
    let digits = line.split_ascii_whitespace().next()?;
    let number = u128::from_str_radix(digits, 16).ok()?;
    (digits.len() == 32).then(|| number.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIB_TRIE: &str = "Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
     +-- 192.0.2.0/24 2 0 2
        |-- 192.0.2.0
           /24 link UNICAST
        |-- 192.0.2.7
           /32 host LOCAL
        |-- 192.0.2.255
           /32 link BROADCAST
Local:
        |-- 192.0.2.7
           /32 host LOCAL
";

    #[test]
    fn the_own_addresses_are_found_once() {
        let if_inet6 = "fd000000000000000000000000000002 04 40 00 82     eth0\n\
            00000000000000000000000000000001 01 80 10 80       lo\n\
            123 04 40 00 82 eth0\nnonsense\n";
        let found = parse_addresses(FIB_TRIE, if_inet6);
        let wanted = ["192.0.2.7", "fd00::2"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(found, wanted);
        assert_eq!(parse_addresses("", ""), Vec::<IpAddr>::new());
    }
}
