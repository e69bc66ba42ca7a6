//! Probes what is installed: systemd-nspawn and its version, and whether machined is running. Changes nothing.
//! Errors name what is missing in terms that an operator can act on.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::rootfs_path::RootDir;

/// Directories searched in addition to `PATH`: an agent that is started by hand often lacks them.
const USUAL: &[&str] = &[
    "/usr/bin",
    "/bin",
    "/usr/local/bin",
    "/run/current-system/sw/bin",
];

/// Searches for a program along `search` (the value of `PATH`) and then in the usual directories.
pub fn find(program: &str, search: &OsStr) -> Result<PathBuf, String> {
    let usual = USUAL.iter().map(PathBuf::from);
    let places: Vec<PathBuf> = std::env::split_paths(search)
        .filter(|path| path.is_absolute())
        .chain(usual)
        .collect();
    let found = places
        .iter()
        .map(|place| place.join(program))
        .find(|path| is_executable(path));
    found.ok_or_else(|| {
        let mut seen: Vec<String> = Vec::new();
        for place in places.iter().map(|place| place.display().to_string()) {
            if !seen.contains(&place) {
                seen.push(place);
            }
        }
        format!("{program} is not installed (looked in {}); on Debian and Ubuntu it is in the package systemd-container", seen.join(", "))
    })
}

/// Whether a file exists and is executable.
pub fn is_executable(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// The version in the output of `systemd-nspawn --version`: `systemd 252 (252.39-1~deb12u2)`, or `systemd 257~rc2 …`.
pub fn parse_version(output: &str) -> Option<u32> {
    let digits = output.strip_prefix("systemd ")?;
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().ok()
}

/// Whether the kernel lets this process look into root trees, or why not. Tries it: a seccomp profile may deny what the kernel has.
pub fn openat2() -> Result<(), String> {
    let opened = RootDir::open(Path::new("/"));
    opened.map(drop).map_err(|error| {
        format!(
            "openat2(2), which looks into root trees, fails: {error}; it needs Linux 5.6 or later and, where the agent runs confined, a seccomp profile that allows it"
        )
    })
}

/// Whether systemd-machined can be reached: its bus name needs a system bus, its socket (257 and later) does not.
pub fn has_machined() -> bool {
    Path::new("/run/systemd/machine/io.systemd.Machine").exists()
        || (Path::new("/run/dbus/system_bus_socket").exists()
            && Path::new("/run/systemd/system").exists()
            && machined_installed())
}

fn machined_installed() -> bool {
    [
        "/usr/lib/systemd/systemd-machined",
        "/lib/systemd/systemd-machined",
    ]
    .iter()
    .any(|path| Path::new(path).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    use std::collections::BTreeMap;

    #[rstest]
    #[case("systemd 252 (252.39-1~deb12u2)\n+PAM +AUDIT\n", Some(252))]
    #[case("systemd 247 (247.3-7)", Some(247))]
    #[case("systemd 262~rc1 (x)", Some(262))]
    #[case("systemd", None)]
    #[case("bash 5", None)]
    fn versions_are_read(#[case] output: &str, #[case] version: Option<u32>) {
        assert_eq!(parse_version(output), version);
    }

    /// In a thread of its own, which ends with the filter. `ENOSYS` is what an old kernel returns, `EPERM` what a profile does that was
    /// made before the call.
    #[rstest]
    #[case::old_kernel(nix::libc::ENOSYS)]
    #[case::old_profile(nix::libc::EPERM)]
    fn a_refused_openat2_is_an_error_with_its_remedy(#[case] errno: i32) {
        openat2().unwrap();
        let refused = std::thread::spawn(move || {
            let denied = BTreeMap::from([(nix::libc::SYS_openat2, Vec::new())]);
            let refusal = SeccompAction::Errno(errno.cast_unsigned());
            let arch = std::env::consts::ARCH.try_into().unwrap();
            let filter = SeccompFilter::new(denied, SeccompAction::Allow, refusal, arch).unwrap();
            let program: BpfProgram = filter.try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
            openat2().unwrap_err()
        });
        let error = refused.join().unwrap();
        let reason = std::io::Error::from_raw_os_error(errno).to_string();
        assert!(
            error.contains(&reason) && error.contains("Linux 5.6"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_programs_error_lists_the_searched_directories() {
        let empty = tempfile::tempdir().unwrap();
        let error = find("no-such-tool", empty.path().as_os_str()).unwrap_err();
        assert!(
            error.contains(&empty.path().display().to_string()) && error.contains("/usr/bin"),
            "{error}"
        );
    }
}
