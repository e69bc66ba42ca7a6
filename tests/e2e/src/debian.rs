//! Debian trees, one with systemd in it, built once by debootstrap and cached outside the work tree. Each test gets its own copy, because
//! systemd-nspawn locks a tree while it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use crate::agent::{Agent, Allocation};
use crate::until;

/// Where the tree is cached, unless `NOMAD_DRIVER_NSPAWN_E2E_CACHE` is set.
const CACHE: &str = "/var/cache/nomad-driver-nspawn-e2e";
const SUITE: &str = "bookworm";

/// The cached tree of Debian 12, built if it is missing.
pub fn tree() -> PathBuf {
    tree_of(SUITE)
}

/// The cached tree of this release of Debian, built if it is missing.
pub fn tree_of(suite: &str) -> PathBuf {
    cached(suite, suite, "systemd,systemd-sysv,dbus")
}

/// Whether there is a tree of this release, or one is to be made (`NOMAD_DRIVER_NSPAWN_E2E_SID`), which takes about a minute.
pub fn has_tree_of(suite: &str) -> bool {
    cache().join(suite).is_dir() || std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_SID").is_some()
}

/// Another cached tree: that of the example with a database.
pub fn tree_with_redis() -> PathBuf {
    cached(&format!("{SUITE}-redis"), SUITE, "redis-server")
}

fn cache() -> PathBuf {
    let cache = std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_CACHE");
    cache.map_or_else(|| CACHE.into(), PathBuf::from)
}

/// The cached tree of this name, built of this release with these packages if it is missing.
fn cached(name: &str, suite: &str, packages: &str) -> PathBuf {
    let cache = cache();
    let tree = cache.join(name);
    // The finished tree gets its name at once.
    if tree.is_dir() {
        return tree;
    }
    fs::create_dir_all(&cache).expect("the cache directory");
    // Several test processes may need it at once; one of them builds it. Those that need another tree do not wait for that.
    let lock = fs::File::create(cache.join(format!("{name}.lock"))).expect("a lock in the cache");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("a lock in the cache");
    if !tree.is_dir() {
        let new = cache.join(format!("{name}.new"));
        drop(fs::remove_dir_all(&new));
        make(&new, suite, packages);
        fs::rename(&new, &tree).expect("the finished tree");
    }
    tree
}

fn make(tree: &Path, suite: &str, packages: &str) {
    let made = Command::new("debootstrap")
        .arg("--variant=minbase")
        .arg(format!("--include={packages}"))
        .arg(suite)
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

/// Copies a tree.
pub fn copy_tree(tree: &Path, target: &Path) {
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto", "--"])
        .arg(tree)
        .arg(target)
        .status()
        .expect("cp");
    assert!(copied.success(), "cp: {copied}");
}

/// Copies the cached tree to `target` and adds the unit of [`add_unit`].
pub fn copy(target: &Path, start: &str, stop: &str) {
    copy_tree(&tree(), target);
    add_unit(target, start, stop);
}

/// Adds the unit `e2e.service` to a tree, which runs one shell command when the system has started and one when it stops, neither with a single
/// quote in it.
pub fn add_unit(target: &Path, start: &str, stop: &str) {
    let units = target.join("etc/systemd/system");
    let unit = format!(
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n\
         ExecStart=/bin/sh -c '{start}'\nExecStop=/bin/sh -c '{stop}'\n"
    );
    fs::write(units.join("e2e.service"), unit).expect("the unit");
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants).expect("multi-user.target.wants");
    std::os::unix::fs::symlink("../e2e.service", wants.join("e2e.service")).expect("the link");
}

/// The job `boot`: a Debian system as a task of an agent. Its unit writes to a file when it is started and when it is stopped.
#[derive(Debug)]
pub struct Booted<'a> {
    /// The task.
    pub task: Allocation<'a>,
    said: PathBuf,
}

impl<'a> Booted<'a> {
    /// Starts one and waits until all its units are started.
    pub fn start(agent: &'a Agent) -> Self {
        let tree = agent.join("debian");
        let say = |what: &str| format!("echo {what} >> /alloc/data/said");
        copy(&tree, &say("started"), &say("stopped"));
        let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/boot.nomad.hcl");
        let image = tree.to_str().expect("a path in UTF-8");
        let task = agent.run(&job, &[("image", image)]);
        let said = task.dir().join("../alloc/data/said");
        let booted = Self { task, said };
        until("the unit's start", || {
            (booted.said() == "started\n").then_some(())
        });
        booted
    }

    /// What its unit has written.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}
