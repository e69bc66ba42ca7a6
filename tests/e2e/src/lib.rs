//! Helpers shared by the end-to-end tests: the driver's binary, and trees that real containers run from. Everything here needs root and the
//! real systemd-nspawn; a selected test that can't run fails.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub mod agent;
pub mod debian;
pub mod leftovers;
pub mod stage;
pub mod udev;

pub use support::DEADLINE;

/// Polls until `look` finds something, for state that has no notification; the panic message contains `what`.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A short random word, valid in a host name.
pub fn unique() -> String {
    let mut bytes = [0; 4];
    std::io::Read::read_exact(
        &mut fs::File::open("/dev/urandom").expect("/dev/urandom"),
        &mut bytes,
    )
    .expect("random bytes");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The driver under test: `NOMAD_DRIVER_NSPAWN`, or the binary that cargo has built next to this test.
pub fn driver() -> PathBuf {
    if let Some(path) = std::env::var_os("NOMAD_DRIVER_NSPAWN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("the test's own path");
    let built = test
        .parent()
        .and_then(Path::parent)
        .expect("target/<profile>/deps")
        .join("nomad-driver-nspawn");
    assert!(
        built.is_file(),
        "{} is not built: run cargo build first",
        built.display()
    );
    built
}

/// The version of the installed systemd-nspawn.
pub fn nspawn_version() -> u32 {
    let output = std::process::Command::new("systemd-nspawn")
        .arg("--version")
        .output()
        .expect("systemd-nspawn --version");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let digits = |word: &str| word.parse().ok();
    text.split_whitespace().find_map(digits).expect("a version")
}

/// Real containers need root.
pub fn needs_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests start real containers and need root"
    );
}

const GETENT: &str = "#!/bin/sh
case $1 in
    initgroups) echo \"$2 1000\" ;;
    *) grep \"^$2:\" \"/etc/$1\" ;;
esac
";

/// Copies a program in a process of its own. While this process has a file open for writing, so has every process that another of its
/// threads forks at that moment, and the program can't be executed (`ETXTBSY`).
fn install(program: &Path, target: &Path) {
    let status = std::process::Command::new("cp")
        .args([program, target])
        .status();
    assert!(
        status.expect("cp").success(),
        "a copy of {}",
        program.display()
    );
}

/// Fills an empty directory with a small system around a static busybox.
pub fn busybox_tree(tree: &Path) {
    for directory in [
        "bin", "dev", "etc", "proc", "root", "run", "srv", "sys", "tmp", "usr/bin", "var",
    ] {
        fs::create_dir_all(tree.join(directory)).expect("a directory in the tree");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|path| Path::new(path).exists());
    let busybox = busybox.expect("busybox is not installed (Debian: busybox-static)");
    install(Path::new(busybox), &tree.join("bin/busybox"));
    let listed = std::process::Command::new(busybox)
        .arg("--list")
        .output()
        .expect("busybox --list");
    for applet in String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter(|applet| *applet != "busybox")
    {
        let _ = symlink("busybox", tree.join("bin").join(applet));
    }
    fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000:Bob:/srv:/bin/sh\n",
    )
    .expect("passwd");
    // systemd-nspawn runs this program of the image to look up users.
    let script = tree.join("etc/getent");
    fs::write(&script, GETENT).expect("getent");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("getent");
    install(&script, &tree.join("bin/getent"));
    fs::remove_file(script).expect("getent");
    fs::write(tree.join("etc/group"), "root:x:0:\nbob:x:1000:\n").expect("group");
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").expect("hosts");
    fs::write(tree.join("etc/resolv.conf"), "").expect("resolv.conf");
    fs::write(tree.join("etc/os-release"), "ID=test\nVERSION_ID=1\n").expect("os-release");
}
