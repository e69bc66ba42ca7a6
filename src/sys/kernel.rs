//! Facts about the running kernel: its version, the id of this boot, and what it supports.

use std::io;
use std::path::Path;

/// The version of the running kernel, as `(6, 1)`.
pub fn version() -> (u32, u32) {
    let release =
        nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned());
    parse_version(&release.unwrap_or_default())
}

fn parse_version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The id of the current boot of the host.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Whether the kernel supports user namespaces: they are built in, and their limit is not zero.
pub fn has_user_namespaces() -> bool {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    Path::new("/proc/self/ns/user").exists() && limit.map_or(true, |text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(parse_version("6.18.44-fc-v669"), (6, 18));
        assert_eq!(parse_version("5.10"), (5, 10));
        assert_eq!(parse_version(""), (0, 0));
    }
}
