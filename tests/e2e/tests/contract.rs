//! The contract of the backend on the real systemd-nspawn.

use std::path::Path;
use std::process::Command;

use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::container::CgroupLayout;
use support::not_applicable;

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

/// Runs the scenarios of limits again as on a host with cgroup v1 alone: in a mount namespace in which cgroup v2 is unmounted. The driver and
/// systemd-nspawn are in it too, and it ends with them.
#[test]
fn limits_hold_with_cgroup_v1_alone() {
    const SCRIPT: &str = "umount \"$1\" && shift && exec \"$@\"";
    e2e::needs_root();
    let layout = Layout::of_this_host();
    let version_2 = layout
        .tracking
        .filter(|_| layout.kind == CgroupLayout::Hybrid);
    let Some(version_2) = version_2 else {
        return not_applicable("needs cgroup v2 beside the controllers of cgroup v1");
    };
    let output = Command::new("unshare")
        .args(["--mount", "--propagation=private", "sh", "-c", SCRIPT, "sh"])
        .arg(version_2)
        .arg(std::env::current_exe().unwrap())
        .arg("contract::limits::")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let ran = stdout.matches(" ... ok\n").count();
    assert!(output.status.success() && ran > 4, "{stdout}{stderr}");
    assert!(!stderr.contains("NOT APPLICABLE"), "{stderr}");
}
