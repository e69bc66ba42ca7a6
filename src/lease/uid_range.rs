//! The lock of the uid range that systemd-nspawn picks for a container. The file is named after the first uid of the range.

use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Context, Lease, nspawn_lock};

/// Where systemd-nspawn keeps these locks.
const LOCKS: &str = "/run/systemd/nspawn-uid";

/// A uid range picked by systemd-nspawn. It is known once the container has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UidRange {}

impl Lease for UidRange {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        if !context.killed {
            return Ok(());
        }
        match context.first_uid {
            Some(first) => {
                nspawn_lock::remove(context.task_dir, &Path::new(LOCKS).join(first.to_string()));
                Ok(())
            }
            None => remove_nameless(context.ordered_at, Path::new(LOCKS)),
        }
    }
}

/// Removes the lock of a systemd-nspawn that was killed before its range was known: a lock file created after the launch spec was
/// written, and held by no process, is a leftover.
fn remove_nameless(ordered_at: Option<SystemTime>, locks: &Path) -> io::Result<()> {
    let dead = nspawn_lock::dead(ordered_at, locks, |name| name.parse::<u32>().ok())?;
    for (_held, lock, _) in dead {
        let _ = fs::remove_file(lock);
    }
    Ok(())
}

/// The first host uid of a process's uid range, if it has a range of its own.
pub fn first_uid_of(leader: i32) -> Option<u32> {
    first_uid(&fs::read_to_string(format!("/proc/{leader}/uid_map")).ok()?)
}

fn first_uid(map: &str) -> Option<u32> {
    let first = map.lines().next()?.split_ascii_whitespace().nth(1)?;
    first.parse().ok().filter(|first| *first != 0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Start;
    use super::*;

    #[test]
    fn the_first_uid_outside_is_read_from_the_uid_map() {
        assert_eq!(
            first_uid("         0  403111936      65536\n"),
            Some(403_111_936)
        );
        assert_eq!(first_uid("         0          0 4294967295\n"), None);
        assert_eq!(first_uid(""), None);
        assert_eq!(first_uid_of(i32::MAX), None);
    }

    #[test]
    fn unrecorded_uid_locks_are_removed_if_unlocked_and_newer_than_the_launch_spec() {
        let start = Start::new();
        let locks = start.directory("locks");
        let make = |name: &str| {
            fs::write(locks.join(name), "").unwrap();
            locks.join(name)
        };
        let early = make("65536");
        let before = SystemTime::UNIX_EPOCH;
        let file = fs::File::options().write(true).open(&early).unwrap();
        file.set_modified(before).unwrap();
        let (dead, alive, other) = (make("131072"), make("196608"), make("131072.bak"));
        let held = nspawn_lock::take(&alive).unwrap();
        remove_nameless(start.ordered_at, &locks).unwrap();
        assert!(!dead.exists());
        assert!([&early, &alive, &other].iter().all(|lock| lock.exists()));
        drop(held);
        remove_nameless(start.ordered_at, &locks).unwrap();
        assert!(!alive.exists());
        remove_nameless(start.ordered_at, &locks.join("gone")).unwrap();
    }
}
