//! Parses the handshake line of a plugin: `CORE|APP|NETWORK|ADDRESS|PROTOCOL|CERTIFICATE`. Accepts and rejects the same
//! lines as Nomad's agent, except for TCP addresses; opens nothing.

use std::path::PathBuf;

/// The variable by which a plugin recognizes that a plugin host started it.
pub const COOKIE_KEY: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
/// Its value.
pub const COOKIE_VALUE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";

/// The variables that Nomad adds to the environment of a plugin.
pub(crate) const ENVIRONMENT: [(&str, &str); 4] = [
    (COOKIE_KEY, COOKIE_VALUE),
    ("PLUGIN_MIN_PORT", "10000"),
    ("PLUGIN_MAX_PORT", "25000"),
    ("PLUGIN_PROTOCOL_VERSIONS", "2"),
];

/// Parses the line and returns the path of the socket, or why Nomad would reject the line. A TCP address is rejected
/// too, because any user of the machine could control such a plugin.
pub fn read(line: &str) -> Result<PathBuf, String> {
    let fields: Vec<&str> = line.trim().split('|').collect();
    let [core, app, network, address, rest @ ..] = fields.as_slice() else {
        return Err(format!("{line:?} is not a handshake line"));
    };
    if *core != "1" {
        return Err(format!("core protocol version {core:?} is not 1"));
    }
    if *app != "2" {
        return Err(format!("application protocol version {app:?} is not 2"));
    }
    match rest.first() {
        Some(&"grpc") => {}
        Some(other) => return Err(format!("protocol {other:?} is not grpc")),
        None => return Err("the protocol is missing, which means netrpc".to_owned()),
    }
    if rest
        .get(1)
        .is_some_and(|certificate| !certificate.is_empty())
    {
        return Err("a certificate was sent although none was asked for".to_owned());
    }
    if rest.len() > 2 {
        return Err(format!("{line:?} has more than six fields"));
    }
    if *network != "unix" {
        return Err(format!("network {network:?} is not unix"));
    }
    let address = PathBuf::from(address);
    if !address.is_absolute() {
        return Err(format!("address {} is not absolute", address.display()));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("1|2|unix|/tmp/plugin1|grpc")]
    #[case("1|2|unix|/tmp/plugin1|grpc|")]
    #[case("  1|2|unix|/tmp/plugin1|grpc|\r\n")]
    fn lines_that_nomad_accepts_are_accepted(#[case] line: &str) {
        assert_eq!(read(line), Ok(PathBuf::from("/tmp/plugin1")));
    }

    #[rstest]
    #[case("", "not a handshake line")]
    #[case("hello", "not a handshake line")]
    #[case("2|2|unix|/s|grpc|", "core protocol")]
    #[case("1|3|unix|/s|grpc|", "application protocol")]
    #[case("1|2|unix|/s", "netrpc")]
    #[case("1|2|unix|/s|netrpc|", "not grpc")]
    #[case("1|2|tcp|127.0.0.1:1|grpc|", "not unix")]
    #[case("1|2|unix|s|grpc|", "not absolute")]
    #[case("1|2|unix|/s|grpc|abc", "certificate")]
    #[case("1|2|unix|/s|grpc||true", "more than six")]
    fn a_bad_line_is_refused_with_a_reason(#[case] line: &str, #[case] part: &str) {
        let reason = read(line).unwrap_err();
        assert!(reason.contains(part), "{reason}");
    }
}
