//! The contract of the backend on the real systemd-nspawn.

use std::path::Path;

#[path = "../../contract/mod.rs"]
mod contract;

#[rstest::fixture]
fn world() -> contract::World {
    e2e::needs_root();
    contract::World::new(
        &e2e::driver(),
        |_| "/usr/bin/systemd-nspawn".into(),
        |tree: &Path| e2e::busybox_tree(tree),
    )
}
