//! Whether the init of an image can run on this host, as far as that is known before the start: otherwise the container ends with a code
//! that says nothing. The tree is not trusted.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::version;
use crate::container::CgroupLayout;
use crate::rootfs_path::{Entry, RootDir};

/// Where systemd-nspawn looks for the init to boot, in this order.
pub const INITS: [&str; 3] = [
    "usr/lib/systemd/systemd",
    "lib/systemd/systemd",
    "sbin/init",
];
/// Where distributions put systemd's own library, whose name has the version; also below the directories of `usr/lib` that are named after an
/// architecture.
const LIBRARY_DIRS: [&str; 4] = [
    "usr/lib/systemd",
    "lib/systemd",
    "usr/lib64/systemd",
    "lib64/systemd",
];
/// Programs for other architectures run if a handler for them is registered here.
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";

/// Why the init of this tree can't run on a host with this cgroup layout; `None` if nothing speaks against it.
pub fn refusal(root: &RootDir, cgroup: CgroupLayout) -> io::Result<Option<String>> {
    refusal_on(root, cgroup, has_binfmt_handlers(Path::new(BINFMT)))
}

fn refusal_on(
    root: &RootDir,
    cgroup: CgroupLayout,
    runs_others: bool,
) -> io::Result<Option<String>> {
    let mut first = None;
    for path in INITS {
        let init = root.entry(Path::new(path))?;
        let Some(init) = init.filter(|entry| entry.metadata().is_file()) else {
            continue;
        };
        match fault_of(path, &init, runs_others)? {
            Some(fault) => first = first.or(Some(fault)),
            None => return Ok(version_fault(root, path, cgroup)),
        }
    }
    Ok(first)
}

/// Why this program can't be executed. systemd-nspawn then tries the next one.
fn fault_of(path: &str, init: &Entry, runs_others: bool) -> io::Result<Option<String>> {
    if init.metadata().mode() & 0o111 == 0 {
        return Ok(Some(format!(
            "the image's init, /{path}, is not executable"
        )));
    }
    let machine = machine_of(init)?.filter(|machine| !runs_others && !runs(*machine));
    Ok(machine.map(|machine| {
        let (name, host) = (machine_name(machine), std::env::consts::ARCH);
        format!(
            "the image's init, /{path}, is a program for {name}, and this host runs {host} programs: use an image for {host}"
        )
    }))
}

/// Why the systemd of the image, if this init is that, can't boot.
fn version_fault(root: &RootDir, path: &str, cgroup: CgroupLayout) -> Option<String> {
    let version = systemd_version(root).filter(|_| path != INITS[2])?;
    version::unbootable(version, cgroup)
}

/// The architecture of an ELF program, as a number of `elf.h`. `None` for anything else, such as a script.
fn machine_of(init: &Entry) -> io::Result<Option<u16>> {
    let mut header = Vec::new();
    init.open_file()?.take(20).read_to_end(&mut header)?;
    let is_elf = header.len() == 20 && header.starts_with(b"\x7fELF");
    // Byte 5 is the order of bytes: 2 is big-endian.
    Ok(is_elf.then(|| match header[5] {
        2 => u16::from_be_bytes([header[18], header[19]]),
        _ => u16::from_le_bytes([header[18], header[19]]),
    }))
}

/// Numbers and names of architectures. The names are Rust's.
const MACHINES: [(u16, &str); 8] = [
    (3, "x86"),
    (8, "mips"),
    (20, "powerpc"),
    (21, "powerpc64"),
    (22, "s390x"),
    (40, "arm"),
    (62, "x86_64"),
    (183, "aarch64"),
];

fn machine_name(machine: u16) -> String {
    let known = MACHINES.iter().find(|(number, _)| *number == machine);
    known.map_or_else(
        || format!("architecture {machine} of elf.h"),
        |(_, name)| (*name).to_owned(),
    )
}

/// Whether this host may run programs for the architecture. Many 64-bit processors run those of their 32-bit predecessor.
fn runs(machine: u16) -> bool {
    match std::env::consts::ARCH {
        "x86_64" => [62, 3].contains(&machine),
        "aarch64" => [183, 40].contains(&machine),
        // Not known well enough to refuse anything.
        _ => true,
    }
}

fn has_binfmt_handlers(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    let mut names = entries.flatten().map(|entry| entry.file_name());
    names.any(|name| name != "register" && name != "status")
}

/// The version of systemd in a tree, from the name of its library.
fn systemd_version(root: &RootDir) -> Option<u32> {
    let lib = Path::new("usr/lib");
    let by_architecture = names(root, lib)
        .into_iter()
        .filter(|name| name.contains("-linux-"));
    let by_architecture = by_architecture.map(|name| lib.join(name).join("systemd"));
    let all = LIBRARY_DIRS
        .iter()
        .map(PathBuf::from)
        .chain(by_architecture);
    let versions = all.flat_map(|directory| names(root, &directory));
    versions.filter_map(|name| version_in(&name)).max()
}

/// The version in a name such as `libsystemd-shared-257.9-1.so`.
fn version_in(name: &str) -> Option<u32> {
    let rest = name
        .strip_prefix("libsystemd-shared-")?
        .strip_suffix(".so")?;
    let digits = rest.find(|letter: char| !letter.is_ascii_digit());
    rest[..digits.unwrap_or(rest.len())].parse().ok()
}

/// The names in a directory of the tree; none if it can't be read.
fn names(root: &RootDir, directory: &Path) -> Vec<String> {
    /// More than any distribution has there.
    const MAX: usize = 10_000;
    let listing = root
        .entry(directory)
        .ok()
        .flatten()
        .map(|entry| entry.names());
    let names = listing.and_then(Result::ok).into_iter().flatten().take(MAX);
    names
        .filter_map(|name| name.ok()?.into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rstest::rstest;

    use super::*;

    const X86_64: u16 = 62;
    const S390X: u16 = 22;

    fn elf(machine: u16) -> Vec<u8> {
        let mut header = b"\x7fELF\x02\x01\x01".to_vec();
        header.resize(18, 0);
        header.extend(machine.to_le_bytes());
        header
    }

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn with(self, path: &str, content: &[u8], mode: u32) -> Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            self
        }

        fn refusal(&self, cgroup: CgroupLayout, runs_others: bool) -> Option<String> {
            let root = RootDir::open(self.0.path()).unwrap();
            refusal_on(&root, cgroup, runs_others).unwrap()
        }
    }

    #[rstest]
    #[case(b"#!/bin/sh\n".to_vec())]
    #[case(Vec::new())]
    fn an_init_that_is_no_elf_program_is_not_judged(#[case] content: Vec<u8>) {
        let tree = Tree::new().with("sbin/init", &content, 0o755);
        assert_eq!(tree.refusal(CgroupLayout::V1, false), None);
        assert_eq!(Tree::new().refusal(CgroupLayout::V1, false), None);
    }

    #[test]
    fn an_init_of_another_architecture_is_refused() {
        if std::env::consts::ARCH == "x86_64" {
            let own = Tree::new().with("sbin/init", &elf(X86_64), 0o755);
            assert_eq!(own.refusal(CgroupLayout::V2, false), None);
        }
        let other = Tree::new().with("usr/lib/systemd/systemd", &elf(S390X), 0o755);
        let host = std::env::consts::ARCH;
        let expected = format!(
            "the image's init, /usr/lib/systemd/systemd, is a program for s390x, and this host runs {host} programs: use an image for {host}"
        );
        assert_eq!(other.refusal(CgroupLayout::V2, false), Some(expected));
        assert_eq!(other.refusal(CgroupLayout::V2, true), None);
    }

    #[test]
    fn one_init_that_can_run_is_enough() {
        let tree = Tree::new()
            .with("usr/lib/systemd/systemd", b"", 0o644)
            .with("sbin/init", b"#!/bin/sh\n", 0o755);
        assert_eq!(tree.refusal(CgroupLayout::V2, false), None);
    }

    #[test]
    fn an_init_that_is_not_executable_is_refused() {
        let tree = Tree::new().with("sbin/init", b"", 0o644);
        let expected = "the image's init, /sbin/init, is not executable";
        assert_eq!(
            tree.refusal(CgroupLayout::V2, false).as_deref(),
            Some(expected)
        );
    }

    #[rstest]
    #[case("usr/lib/systemd/libsystemd-shared-258.so")]
    #[case("usr/lib64/systemd/libsystemd-shared-262.1-1.fc44.so")]
    #[case("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-259~rc1.so")]
    fn a_systemd_that_needs_cgroup_2_alone_is_refused_elsewhere(#[case] library: &str) {
        let script = b"#!/bin/sh\n";
        let tree = Tree::new()
            .with("usr/lib/systemd/systemd", script, 0o755)
            .with(library, b"", 0o644);
        assert_eq!(tree.refusal(CgroupLayout::V2, false), None);
        for layout in [CgroupLayout::V1, CgroupLayout::Hybrid] {
            let reason = tree.refusal(layout, false).unwrap();
            assert!(reason.starts_with("the image has systemd 2"), "{reason}");
        }
        // Installed, and not what is booted.
        let tree = Tree::new()
            .with("sbin/init", script, 0o755)
            .with(library, b"", 0o644);
        assert_eq!(tree.refusal(CgroupLayout::V1, false), None);
    }

    #[rstest]
    #[case("libsystemd-shared-252.so", Some(252))]
    #[case("libsystemd-shared-257.9-1.so", Some(257))]
    #[case("libsystemd-shared-.so", None)]
    #[case("libsystemd-core-257.so", None)]
    #[case("libsystemd-shared-99999999999.so", None)]
    fn the_name_of_the_library_has_the_version(#[case] name: &str, #[case] expected: Option<u32>) {
        assert_eq!(version_in(name), expected);
    }

    #[test]
    fn a_link_leads_nowhere_outside_of_the_tree() {
        let tree = Tree::new();
        fs::create_dir_all(tree.0.path().join("sbin")).unwrap();
        symlink("/proc/self/exe", tree.0.path().join("sbin/init")).unwrap();
        assert_eq!(tree.refusal(CgroupLayout::V1, false), None);
    }

    #[test]
    fn only_handlers_count_as_handlers() {
        let scratch = tempfile::tempdir().unwrap();
        for (name, expected) in [("register", false), ("status", false), ("qemu-arm", true)] {
            fs::write(scratch.path().join(name), "").unwrap();
            assert_eq!(has_binfmt_handlers(scratch.path()), expected);
        }
        assert!(!has_binfmt_handlers(Path::new("/nowhere")));
    }
}
