//! The uid range of a container, and its lock: a file that is named after the first uid, in the directory where systemd-nspawn keeps those of the
//! ranges that it picks itself, so that neither takes a range of the other. The driver picks the range where it can, because it maps mounts before
//! systemd-nspawn runs. The plugin holds the lock, shared, until the supervisor holds it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::SystemTime;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::nspawn_lock::{self, SharedLocks};
use super::{Context, Lease};

mod free;

/// Where these locks are.
const LOCKS: &str = "/run/systemd/nspawn-uid";

/// How many ids a range has.
const IDS: u32 = 1 << 16;

/// The first and the last uid at which systemd lets a range for a container begin (`CONTAINER_UID_BASE_MIN` and `_MAX`).
const FIRST: u32 = 0x0008_0000;
const LAST: u32 = 0x6FFF_0000;

/// The range of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UidRange {
    /// The first uid, if the driver has picked the range. Otherwise systemd-nspawn does, and it is known once the container has started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<u32>,
}

impl UidRange {
    /// Picks a range that no container has, and locks it: the one that the files of the root belong to, if `owner` is the user of one; otherwise
    /// one that is the same for this machine name whenever it is free. With `only_own`, no other range is picked than that of the files. Blocks.
    pub fn pick(
        owner: Option<u32>,
        only_own: bool,
        machine: &str,
    ) -> io::Result<(u32, SharedLocks)> {
        pick_in(Path::new(LOCKS), (owner, only_own), machine)
    }

    /// Removes the lock of a range that was picked for a start whose records do not name it: one that was created after the start began, and
    /// that no process holds.
    pub fn remove_unrecorded(begun_at: SystemTime) -> io::Result<()> {
        remove_nameless(Some(begun_at), Path::new(LOCKS))
    }

    /// Takes the lock of a range that the plugin has picked, for the life of the container. Fails if another process holds it alone.
    pub fn hold(&self) -> io::Result<Option<SharedLocks>> {
        let Some(first) = self.first else {
            return Ok(None);
        };
        let lock = Path::new(LOCKS).join(first.to_string());
        let held = SharedLocks::of_file(lock).map_err(|error| {
            let text = format!("the range of user ids from {first} can't be locked: {error}");
            io::Error::new(io::Error::from(error).kind(), text)
        })?;
        Ok(Some(held))
    }
}

fn pick_in(
    locks: &Path,
    (owner, only_own): (Option<u32>, bool),
    machine: &str,
) -> io::Result<(u32, SharedLocks)> {
    /// How many ranges to try. Of the 28,655 that there are, a host uses a few thousand at most.
    const ATTEMPTS: usize = 1000;
    // Fails if the directory exists.
    let _ = DirBuilder::new().mode(0o755).recursive(true).create(locks);
    let own = owner.map(|owner| owner - owner % IDS);
    let own = own.filter(|first| (FIRST..=LAST).contains(first));
    // An image's files may belong to a range that an administrator has given to somebody, but not to users: who can write the image could choose them.
    let is_of_users = |first: &u32| !free::TakenIds::of_accounts().is_free(*first, IDS);
    let own = match own.filter(is_of_users) {
        Some(first) if only_own => {
            let text = format!(
                "the files of the image belong to the user ids from {first} on, among which are users or groups of this host. If that is meant, set \
                 config.private_users = \"{first}:{IDS}\""
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Some(_) => None,
        None => own,
    };
    let taken = free::TakenIds::of_host();
    let named = free::candidates(machine).take(ATTEMPTS);
    let named = named.filter(|first| taken.is_free(*first, IDS));
    for first in own.into_iter().chain(named) {
        match SharedLocks::of_free_file(locks.join(first.to_string())) {
            Ok(lock) => return Ok((first, lock)),
            Err(Errno::EAGAIN | Errno::EACCES) if only_own && own == Some(first) => {
                let text = format!(
                    "the files of the image belong to the user ids from {first} on, which another container has"
                );
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let text = format!(
        "no range of user ids is free: {ATTEMPTS} of them are in use by containers, or belong to somebody according to /etc/passwd, /etc/group, \
         /etc/subuid or /etc/subgid"
    );
    Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
}

impl Lease for UidRange {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        // systemd-nspawn has released what it has picked.
        if !context.killed && self.first.is_none() {
            return Ok(());
        }
        match self.first.or(context.first_uid) {
            Some(first) => {
                nspawn_lock::remove(context.task_dir, &Path::new(LOCKS).join(first.to_string()));
                Ok(())
            }
            None => remove_nameless(context.ordered_at, Path::new(LOCKS)),
        }
    }

    fn is_own(&self, _task_dir: &Path) -> bool {
        let mut first = self.first.iter();
        first.all(|first| first % IDS == 0 && (FIRST..=LAST).contains(first))
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
    fn a_range_is_picked_by_the_name_and_no_two_containers_have_the_same() {
        let start = Start::new();
        let locks = start.directory("locks");
        let (first, held) = pick_in(&locks, (None, true), "web-1").unwrap();
        assert!(first % IDS == 0 && (FIRST..=LAST).contains(&first));
        let (second, _other) = pick_in(&locks, (None, true), "web-1").unwrap();
        assert_ne!(first, second);
        drop(held);
        assert!(!locks.join(first.to_string()).exists());
        assert_eq!(pick_in(&locks, (None, true), "web-1").unwrap().0, first);
    }

    #[test]
    fn the_range_of_the_root_is_picked_if_it_is_one_for_containers() {
        let start = Start::new();
        let locks = start.directory("locks");
        let first = FIRST + 7 * IDS;
        let (picked, _held) = pick_in(&locks, (Some(first + 33), true), "web-1").unwrap();
        assert_eq!(picked, first);
        let (picked, _held) = pick_in(&locks, (Some(first), false), "web-1").unwrap();
        assert_ne!(picked, first);
        let error = pick_in(&locks, (Some(first), true), "web-1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().contains(&first.to_string()), "{error}");
        for owner in [0, 1000, LAST + IDS] {
            let (picked, _held) = pick_in(&locks, (Some(owner), true), "web-1").unwrap();
            assert!((FIRST..=LAST).contains(&picked));
        }
    }

    #[test]
    fn a_thousand_containers_have_a_thousand_ranges() {
        let start = Start::new();
        let locks = start.directory("locks");
        let picked =
            (0..1000).map(|number| pick_in(&locks, (None, true), &format!("m-{number}")).unwrap());
        let picked: Vec<_> = picked.collect();
        let different: std::collections::BTreeSet<_> =
            picked.iter().map(|(first, _)| first).collect();
        assert_eq!(different.len(), 1000);
    }

    #[test]
    fn a_record_can_name_no_other_file() {
        for (first, own) in [
            (FIRST, true),
            (FIRST + 1, false),
            (0, false),
            (LAST + IDS, false),
        ] {
            let range = UidRange { first: Some(first) };
            assert_eq!(range.is_own(Path::new("/none")), own, "{first}");
        }
        assert!(UidRange { first: None }.is_own(Path::new("/none")));
    }

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
