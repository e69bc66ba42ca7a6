//! The lock on the directory of one start, for several plugins in one state directory. A plugin that starts or finds a start takes
//! a shared lock on its directory and keeps it; who wants to clear away what nobody claims takes the exclusive one first, and waits
//! for a moment at most. The kernel drops the locks of a process that dies, so a claim can't be left behind. Decides nothing else.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::fcntl::OFlag;

use super::task_dir::TaskDir;

/// How often a new directory may be taken away by another process before it has been claimed.
const MAX_ATTEMPTS: usize = 100;

/// A lock on the directory of one start. Dropping it, or the death of the process, gives it up.
#[derive(Debug)]
pub struct TaskLock {
    _locked: File,
}

/// What came of taking a start that nobody claims.
#[derive(Debug)]
pub enum TryLock {
    /// It is taken.
    Acquired(TaskLock),
    /// Somebody claims it.
    Busy,
    /// It is not there, or not any more.
    Missing,
}

impl TaskLock {
    /// Makes the directory, which must not exist yet, and claims it.
    pub fn create(task_dir: &TaskDir) -> io::Result<Self> {
        for _ in 0..MAX_ATTEMPTS {
            task_dir.create()?;
            // Until it is claimed, it looks like a start that was never finished.
            if let Some(lock) = Self::lock_shared(task_dir)? {
                return Ok(lock);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Claims a start beside others that may claim it too. Waits while somebody clears it away; `None` if it is not there or not
    /// any more.
    pub fn lock_shared(task_dir: &TaskDir) -> io::Result<Option<Self>> {
        let Some(directory) = open(task_dir)? else {
            return Ok(None);
        };
        loop {
            match directory.lock_shared() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                locked => break locked?,
            }
        }
        Self::of(directory, task_dir)
    }

    /// Takes a start that nobody claims, so that nobody can as long as this is held. Never waits. A claim may be that of a
    /// process that is just being started: it holds what its starter had open until its own program runs.
    pub fn try_lock_exclusive(task_dir: &TaskDir) -> io::Result<TryLock> {
        let Some(directory) = open(task_dir)? else {
            return Ok(TryLock::Missing);
        };
        match directory.try_lock() {
            Ok(()) => {
                Ok(Self::of(directory, task_dir)?.map_or(TryLock::Missing, TryLock::Acquired))
            }
            Err(TryLockError::WouldBlock) => Ok(TryLock::Busy),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// What was locked is worth something only if it still lies in its place.
    fn of(directory: File, task_dir: &TaskDir) -> io::Result<Option<Self>> {
        let locked = directory.metadata()?;
        match task_dir.path().symlink_metadata() {
            Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => {
                Ok(Some(Self { _locked: directory }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn open(task_dir: &TaskDir) -> io::Result<Option<File>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(task_dir.path());
    match opened {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task_dir() -> (tempfile::TempDir, TaskDir) {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path().join("t.0123456789abcdef"));
        (temp, task_dir)
    }

    /// Other tests start processes, which for a moment hold a claim that was dropped.
    fn locked(task_dir: &TaskDir) -> TaskLock {
        loop {
            match TaskLock::try_lock_exclusive(task_dir).unwrap() {
                TryLock::Acquired(lock) => return lock,
                TryLock::Busy => std::thread::yield_now(),
                TryLock::Missing => panic!("it is gone"),
            }
        }
    }

    fn is_claimed(task_dir: &TaskDir) -> bool {
        matches!(
            TaskLock::try_lock_exclusive(task_dir).unwrap(),
            TryLock::Busy
        )
    }

    #[test]
    fn what_is_locked_can_not_be_seized_until_it_is_given_up() {
        let (_temp, task_dir) = task_dir();
        let first = TaskLock::create(&task_dir).unwrap();
        let second = TaskLock::lock_shared(&task_dir).unwrap().unwrap();
        assert!(is_claimed(&task_dir));
        drop(first);
        assert!(is_claimed(&task_dir));
        drop(second);
        locked(&task_dir);
    }

    #[test]
    fn a_lock_waits_for_whoever_clears_away_and_then_finds_nothing() {
        let (_temp, task_dir) = task_dir();
        task_dir.create().unwrap();
        let locked = locked(&task_dir);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| TaskLock::lock_shared(&task_dir).unwrap());
            task_dir.remove().unwrap();
            drop(locked);
            assert!(waiting.join().unwrap().is_none());
        });
    }

    #[test]
    fn what_is_not_there_or_is_a_link_is_not_locked() {
        let (temp, task_dir) = task_dir();
        assert!(TaskLock::lock_shared(&task_dir).unwrap().is_none());
        assert!(matches!(
            TaskLock::try_lock_exclusive(&task_dir).unwrap(),
            TryLock::Missing
        ));
        std::os::unix::fs::symlink(temp.path(), task_dir.path()).unwrap();
        TaskLock::lock_shared(&task_dir).unwrap_err();
        TaskLock::try_lock_exclusive(&task_dir).unwrap_err();
        TaskLock::create(&task_dir).unwrap_err();
    }

    #[test]
    fn a_successor_in_the_same_place_is_another_one() {
        let (_temp, task_dir) = task_dir();
        let old = TaskLock::create(&task_dir).unwrap();
        task_dir.remove().unwrap();
        let new = TaskLock::create(&task_dir).unwrap();
        drop(old);
        assert!(is_claimed(&task_dir));
        drop(new);
    }
}
