//! Ports and network interfaces.

use crate::options::Refusal;

/// A port mapping; returns the part that must be unique.
pub(crate) fn port(text: &str) -> Result<String, Refusal> {
    let (protocol, rest) = match text.split_once(':') {
        Some((word @ ("tcp" | "udp"), rest)) => (word, rest),
        _ => ("tcp", text),
    };
    let (host, container) = rest.split_once(':').unwrap_or((rest, rest));
    let number = |what: &str, shown: &str, part: &str| match part.parse::<u32>() {
        Ok(1..=65535) => Ok(()),
        Ok(65536..) => {
            let message =
                format!("Failed to parse {what} port {shown}: Numerical result out of range");
            Err(Refusal { message, errno: 34 })
        }
        _ => Err(Refusal::invalid(format!(
            "Failed to parse {what} port {shown}: Invalid argument"
        ))),
    };
    number("host", rest, host)?;
    number("container", container, container)?;
    Ok(format!("{protocol}:{host}"))
}

pub(crate) fn interface(what: &str, name: &str) -> Result<String, Refusal> {
    if good_interface(name) {
        return Ok(name.to_owned());
    }
    Err(Refusal::invalid(format!("{what} name not valid: {name}")))
}

fn good_interface(name: &str) -> bool {
    let shape =
        !name.is_empty() && name.len() <= 15 && ![".", "..", "all", "default"].contains(&name);
    let number = name.bytes().all(|byte| byte.is_ascii_digit());
    let letters = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && ![b'/', b':', b'%'].contains(&byte));
    shape && !number && letters
}

/// A host's interface, from 254 on with the name that it gets in the container.
pub(crate) fn host_interface(version: u32, text: &str) -> Result<String, Refusal> {
    let (host, inner) = match text.split_once(':') {
        Some((host, inner)) if version >= 254 => (host, inner),
        _ => (text, "host0"),
    };
    if good_interface(host) && good_interface(inner) {
        return Ok(host.to_owned());
    }
    Err(Refusal::invalid(format!(
        "Network interface, interface name not valid: {text}"
    )))
}

pub(crate) fn veth_extra(text: &str) -> Result<(), Refusal> {
    let parts: Vec<_> = text.split(':').collect();
    if parts.len() <= 2 && parts.iter().all(|part| good_interface(part)) {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse --network-veth-extra= parameter: {text}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("80", Ok("tcp:80"))]
    #[case("udp:80:53", Ok("udp:80"))]
    #[case("0", Err("Failed to parse host port 0: Invalid argument"))]
    #[case(
        "70000",
        Err("Failed to parse host port 70000: Numerical result out of range")
    )]
    #[case("80-90", Err("Failed to parse host port 80-90: Invalid argument"))]
    fn a_port_is_protocol_host_and_container(
        #[case] text: &str,
        #[case] wanted: Result<&str, &str>,
    ) {
        let found = port(text).map_err(|refusal| refusal.message);
        assert_eq!(found.as_deref().map_err(String::as_str), wanted);
    }
}
