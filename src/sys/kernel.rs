//! Facts about the running kernel: its version, the id of this boot, and what it supports.

use std::io;
use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities};

/// The version of the running kernel, as `(6, 1)`.
pub fn version() -> (u32, u32) {
    let release =
        nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned());
    parse_version(&release.unwrap_or_default())
}

/// Release and build of the running kernel.
pub fn build() -> io::Result<[String; 2]> {
    let names = nix::sys::utsname::uname()?;
    let [release, version] = [names.release(), names.version()];
    Ok([release, version].map(|text| text.to_string_lossy().into_owned()))
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

/// The first port that needs no privilege, in the network namespace of this thread.
pub fn first_unprivileged_port() -> u16 {
    /// Before Linux 4.11 it can't be changed.
    const FIXED: u16 = 1024;
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    text.map_or(FIXED, |text| text.trim().parse().unwrap_or(FIXED))
}

/// The processors that are online, in the kernel's list format: `0-3,7`.
pub fn online_cpus() -> io::Result<String> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    Ok(list.trim().to_owned())
}

/// The memory of the host, in bytes.
pub fn memory_bytes() -> io::Result<u64> {
    Ok(nix::sys::sysinfo::sysinfo()?.ram_total())
}

/// The highest limit of open files that the kernel accepts for a process.
pub fn max_open_files() -> io::Result<u64> {
    let number = std::fs::read_to_string("/proc/sys/fs/nr_open")?;
    let number = number.trim().parse();
    number.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Whether this process may mount file systems (CAP_SYS_ADMIN).
pub fn may_mount() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Whether this process may raise hard resource limits, also for the processes that it starts (CAP_SYS_RESOURCE).
pub fn may_raise_limits() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE))
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
