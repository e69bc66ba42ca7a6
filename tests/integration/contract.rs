//! The contract of the backend on the fake. The end-to-end tests run the same suite against the real systemd-nspawn, and that is why the
//! fake can be trusted.

use std::fs;
use std::path::Path;

#[path = "../contract/mod.rs"]
mod suite;

/// A world whose systemd-nspawn is the fake.
#[rstest::fixture]
fn world() -> suite::World {
    suite::World::new(
        Path::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn")),
        |dir| {
            let link = dir.join("bin/systemd-nspawn");
            fs::create_dir(dir.join("bin")).unwrap();
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fake-nspawn"), &link).unwrap();
            link
        },
        |tree: &Path| super::harness::fill_tree(tree),
    )
}
