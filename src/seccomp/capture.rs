//! Reads the filters that systemd-nspawn has installed in a container, before anything of the container's own runs in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nspawn_init::FILTERED;

use super::kind::{FileIdentity, Kind};
use super::store::Captured;
use crate::container::Process;
use crate::sys::process::{ProcessHandle, is_alive, seccomp_filter_count};
use crate::sys::procfs::status_field;

/// The library that builds filters. systemd-nspawn may load it in the process that becomes the container's first one.
const LIBRARY: &str = "libseccomp.so.2";

/// The bit of `CAP_SYS_ADMIN`.
const SYS_ADMIN: u64 = 1 << 21;

/// Reads the filters of a container of this kind, whose first process is the container init and waits. `None` if systemd-nspawn was built
/// without seccomp. Fails if anything is not as expected.
pub fn capture(
    kind: &Kind,
    nspawn: Process,
    leader: &ProcessHandle,
) -> io::Result<Option<Captured>> {
    let unexpected = |what: &str| io::Error::other(what.to_owned());
    let program = format!("/proc/{}/exe", nspawn.pid);
    let program = FileIdentity::through(Path::new(&program), &kind.program.path)?;
    let pid = leader.process().pid;
    if seccomp_filter_count(pid) == Some(0) {
        return Ok(None);
    }
    let libraries = libraries(nspawn.pid)?;
    if program != kind.program || !is_alive(nspawn) {
        return Err(unexpected("systemd-nspawn has been replaced"));
    }
    let filters = super::read(leader)?;
    let count = seccomp_filter_count(pid).and_then(|count| usize::try_from(count).ok());
    if count != Some(filters.len()) {
        return Err(unexpected("the kernel does not show all filters"));
    }
    if capabilities(pid, "CapEff")? & SYS_ADMIN == 0 {
        return Err(unexpected("the container init lacks CAP_SYS_ADMIN"));
    }
    let bounding = capabilities(pid, "CapBnd")?;
    let captured = Captured::new(kind.clone(), libraries, bounding, filters);
    Ok(Some(captured))
}

/// Checks that the first process of a container, the container init, has so many filters, and the capabilities for which they were captured.
pub fn verify(leader: &ProcessHandle, count: u32, bounding: u64) -> io::Result<()> {
    let pid = leader.process().pid;
    let held = capabilities(pid, "CapBnd");
    let found = seccomp_filter_count(pid);
    if leader.wait(Duration::ZERO) {
        // It has exited, so no command can run in it.
        return Ok(());
    }
    let held = held?;
    if (found, held) != (Some(count), bounding) {
        let text = format!(
            "the container has {found:?} seccomp filters and the capabilities {held:x}, expected are {count} and {bounding:x}"
        );
        return Err(io::Error::other(text));
    }
    Ok(())
}

/// A set of capabilities of a process.
fn capabilities(pid: i32, name: &str) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let set = status_field(&status, name).and_then(|text| u64::from_str_radix(text, 16).ok());
    set.ok_or_else(|| io::Error::other(format!("{name} can't be read")))
}

/// The files that a process has mapped, and the library that builds filters. Fails if one of them was replaced since.
fn libraries(pid: i32) -> io::Result<Vec<FileIdentity>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut found = BTreeMap::new();
    for (range, path) in maps.lines().filter_map(mapped_file) {
        if found.contains_key(path) {
            continue;
        }
        let link = format!("/proc/{pid}/map_files/{range}");
        let mapped = FileIdentity::through(Path::new(&link), Path::new(path))?;
        if !mapped.holds() {
            let text = format!("{path} has been replaced");
            return Err(io::Error::other(text));
        }
        found.insert(path, mapped);
    }
    let mut libraries: Vec<_> = found.into_values().collect();
    let is_it = |library: &FileIdentity| {
        let name = library.path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("libseccomp.so."))
    };
    if !libraries.iter().any(is_it) {
        libraries.push(beside(&libraries)?);
    }
    Ok(libraries)
}

/// The library that builds filters, in the directory of another.
fn beside(libraries: &[FileIdentity]) -> io::Result<FileIdentity> {
    let candidate = |library: &FileIdentity| -> Option<PathBuf> {
        let path = library.path.with_file_name(LIBRARY);
        path.exists().then_some(path)
    };
    let found = libraries.iter().find_map(candidate);
    let found = found.ok_or_else(|| io::Error::other("libseccomp is not found"))?;
    FileIdentity::of(&found)
}

/// Address range and path in a line of `/proc/<pid>/maps`, if a file is mapped there.
fn mapped_file(line: &str) -> Option<(&str, &str)> {
    let (range, _) = line.split_once(' ')?;
    let path = line.splitn(6, ' ').nth(5)?.trim_start();
    path.starts_with('/').then_some((range, path))
}

/// Whether the kernel shows filters to this process, or why not. Tries it with a process that has one: it runs the program of the container
/// init.
#[expect(clippy::disallowed_methods, reason = "a process to read from")]
pub fn is_supported(init: &OwnedFd) -> io::Result<()> {
    let mut child = Command::new(format!("/proc/self/fd/{}", init.as_raw_fd()))
        .arg(FILTERED)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let mut stdout = child.stdout.take();
    let installed = stdout
        .as_mut()
        .map_or(Ok(()), |stdout| stdout.read_exact(&mut [0]));
    let read = installed
        .and_then(|()| ProcessHandle::open(pid))
        .and_then(|handle| super::read(&handle));
    let counted = seccomp_filter_count(pid);
    let _ = child.kill();
    child.wait()?;
    match (read?.len(), counted) {
        (1, Some(1)) => Ok(()),
        (1, None) => Err(io::Error::other("it does not count them")),
        _ => Err(io::Error::other("this process has some itself")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container that was killed before its command should not make the driver start another.
    #[expect(clippy::disallowed_methods, reason = "a process to look at")]
    #[test]
    fn a_process_that_has_exited_needs_no_filters() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = ProcessHandle::open(i32::try_from(child.id()).unwrap()).unwrap();
        let others = u32::MAX;
        let refused = verify(&process, others, 0).unwrap_err().to_string();
        assert!(
            refused.ends_with("expected are 4294967295 and 0"),
            "{refused}"
        );
        drop(child.stdin.take());
        assert!(process.wait(Duration::from_secs(10)));
        verify(&process, others, 0).unwrap();
        child.wait().unwrap();
        verify(&process, others, 0).unwrap();
    }

    #[test]
    fn files_are_found_among_mappings() {
        let line = "7feb7be45000-7feb7be47000 r--p 00000000 fe:00 1234                       /usr/lib/a b.so";
        let found = mapped_file(line);
        assert_eq!(
            found,
            Some(("7feb7be45000-7feb7be47000", "/usr/lib/a b.so"))
        );
        for other in [
            "7ffd1-7ffd2 rw-p 00000000 00:00 0                          [stack]",
            "7ffd1-7ffd2 rw-p 00000000 00:00 0 ",
            "",
        ] {
            assert_eq!(mapped_file(other), None, "{other}");
        }
    }
}
