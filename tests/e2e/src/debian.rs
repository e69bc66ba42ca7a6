//! A Debian tree with systemd in it, built once by debootstrap and cached outside the work tree. Each test gets its own copy, because
//! systemd-nspawn locks a tree while it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

/// Where the tree is cached, unless `NOMAD_DRIVER_NSPAWN_E2E_CACHE` is set.
const CACHE: &str = "/var/cache/nomad-driver-nspawn-e2e";
const SUITE: &str = "bookworm";

/// The cached tree, built if it is missing.
pub fn tree() -> PathBuf {
    let cache = std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_CACHE");
    let cache = cache.map_or_else(|| CACHE.into(), PathBuf::from);
    fs::create_dir_all(&cache).expect("the cache directory");
    // Several test processes may need it at once; one of them builds it.
    let lock = fs::File::create(cache.join("lock")).expect("the lock of the cache");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("the lock of the cache");
    let tree = cache.join(SUITE);
    if !tree.is_dir() {
        let new = cache.join(format!("{SUITE}.new"));
        drop(fs::remove_dir_all(&new));
        make(&new);
        fs::rename(&new, &tree).expect("the finished tree");
    }
    tree
}

fn make(tree: &Path) {
    let made = Command::new("debootstrap")
        .args([
            "--variant=minbase",
            "--include=systemd,systemd-sysv,dbus",
            SUITE,
        ])
        .arg(tree)
        // Without a mirror debootstrap uses its own default.
        .args(std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_MIRROR"))
        .env("LC_ALL", "C")
        .output()
        .expect("debootstrap is not installed (Debian: debootstrap)");
    assert!(
        made.status.success(),
        "debootstrap: {}\n{}",
        made.status,
        String::from_utf8_lossy(&made.stdout)
    );
    for heavy in [
        "var/cache/apt",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ] {
        drop(fs::remove_dir_all(tree.join(heavy)));
    }
}

/// Copies the cached tree to `target` and adds this unit, started at boot as `e2e.service`.
pub fn copy(target: &Path, unit: &str) {
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto", "--"])
        .arg(tree())
        .arg(target)
        .status()
        .expect("cp");
    assert!(copied.success(), "cp: {copied}");
    let units = target.join("etc/systemd/system");
    fs::write(units.join("e2e.service"), unit).expect("the unit");
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants).expect("multi-user.target.wants");
    std::os::unix::fs::symlink("../e2e.service", wants.join("e2e.service")).expect("the link");
}
