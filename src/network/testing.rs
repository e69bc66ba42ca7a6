//! Values for the tests.

use super::Mapping;

/// A port of the host.
pub(super) fn port(label: &str, address: Option<&str>, host: u16, container: u16) -> Mapping {
    Mapping {
        label: label.to_owned(),
        address: address.map(|address| address.parse().unwrap()),
        host,
        container,
    }
}
