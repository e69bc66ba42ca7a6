//! How many processes of a container the kernel has killed because its memory was used up.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The counter of one cgroup, opened before the container runs: a cgroup that is removed meanwhile can still be read, or says so.
#[derive(Debug)]
pub struct OomCounter {
    file: File,
    /// In cgroup v1: becomes readable when the limit has been hit.
    notification: Option<EventFd>,
    /// The count at the start.
    base: u64,
}

impl OomCounter {
    /// The counter in this file: `memory.events` of cgroup v2 or `memory.oom_control` of cgroup v1.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let notification = match path.ends_with("memory.oom_control") {
            // Without it OOM kills are counted all the same, but reported only at the exit.
            true => notification(path, &file).ok(),
            false => None,
        };
        let base = kills(&file).unwrap_or(0);
        Ok(Self {
            file,
            notification,
            base,
        })
    }

    /// The number of processes killed since it was opened. Fails if the cgroup has been removed.
    pub fn kills(&self) -> io::Result<u64> {
        Ok(kills(&self.file)?.saturating_sub(self.base))
    }

    /// Takes note of the last notification, so that its descriptor is not ready until the next one.
    pub fn acknowledge(&self) {
        if let Some(notification) = &self.notification {
            let _ = notification.read();
        }
    }

    /// Whether [`as_fd`](AsFd::as_fd) becomes readable, rather than exceptional.
    pub fn is_readable(&self) -> bool {
        self.notification.is_some()
    }
}

impl AsFd for OomCounter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let notification = self.notification.as_ref();
        notification.map_or_else(|| self.file.as_fd(), AsFd::as_fd)
    }
}

fn notification(path: &Path, file: &File) -> io::Result<EventFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = EventFd::from_value_and_flags(0, flags)?;
    let control = path.with_file_name("cgroup.event_control");
    let mut control = OpenOptions::new().write(true).open(control)?;
    let line = format!("{} {}", event.as_fd().as_raw_fd(), file.as_raw_fd());
    control.write_all(line.as_bytes())?;
    Ok(event)
}

/// The line `oom_kill` of both files. Linux before 4.13 has none.
fn kills(file: &File) -> io::Result<u64> {
    let mut buffer = [0; 512];
    let length = file.read_at(&mut buffer, 0)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
    Ok(count.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn kills_since_the_start_are_counted() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("memory.events");
        let write = |kills: u64| {
            let text = format!("low 0\nhigh 0\nmax 9\noom 8\noom_kill {kills}\noom_group_kill 7\n");
            fs::write(&file, text).unwrap();
        };
        write(3);
        let counter = OomCounter::open(&file).unwrap();
        assert_eq!(counter.kills().unwrap(), 0);
        write(5);
        assert_eq!(counter.kills().unwrap(), 2);
        // The counter of a cgroup that was made again.
        write(1);
        assert_eq!(counter.kills().unwrap(), 0);
    }

    #[test]
    fn the_count_of_both_versions_is_read() {
        let temp = tempfile::tempdir().unwrap();
        for (text, kills) in [
            ("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n", 4),
            ("low 0\noom 3\noom_kill 2\noom_group_kill 1\n", 2),
            ("under_oom 0\n", 0),
            ("", 0),
        ] {
            let file = temp.path().join("file");
            fs::write(&file, text).unwrap();
            assert_eq!(super::kills(&File::open(&file).unwrap()).unwrap(), kills);
        }
    }
}
