//! The suite of both worlds on the real systemd-nspawn. The integration tests run it on the fake.

use e2e::stage::Stage;

#[path = "../../suite/mod.rs"]
mod scenarios;

#[rstest::fixture]
fn world() -> Stage {
    Stage::new()
}
