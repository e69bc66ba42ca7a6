//! The suite of both worlds on the fake. The end-to-end tests run it on the real systemd-nspawn.

use super::harness::Host;

#[path = "../suite/mod.rs"]
mod scenarios;

#[rstest::fixture]
fn world() -> Host {
    Host::new()
}
