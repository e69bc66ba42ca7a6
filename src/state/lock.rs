//! The lock on a task directory, for several plugin processes in one state directory. A plugin that starts or recovers a task
//! takes a shared lock on its directory and keeps it. To clean up a start that no plugin uses, a plugin takes the exclusive lock
//! first, and gives up after a short time if others hold the lock. The kernel drops the locks of a process that dies, so a lock
//! can't be left behind. What is done with the start is decided elsewhere.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::fcntl::OFlag;

use super::task_dir::TaskDir;

/// How often another process may remove a new directory before it has been locked here.
const MAX_ATTEMPTS: usize = 100;

/// A lock on a task directory. It is released when it is dropped or the process dies.
#[derive(Debug)]
pub struct TaskLock {
    _locked: File,
}

/// The result of [`TaskLock::try_lock_exclusive`].
#[derive(Debug)]
pub enum TryLock {
    /// The lock was taken.
    Acquired(TaskLock),
    /// Another process holds a lock.
    Busy,
    /// The directory does not exist, or not any more.
    Missing,
}

impl TaskLock {
    /// Creates the directory, which must not exist yet, and takes a shared lock on it.
    pub fn create(task_dir: &TaskDir) -> io::Result<Self> {
        for _ in 0..MAX_ATTEMPTS {
            task_dir.create()?;
            // Until it is locked, another plugin takes it for a start that was never finished.
            if let Some(lock) = Self::lock_shared(task_dir)? {
                return Ok(lock);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Takes a shared lock, which several plugins can hold. Waits while another process cleans up the start; `None` if the
    /// directory does not exist, or not any more.
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

    /// Takes the exclusive lock, which keeps all others from locking the start. Never waits. `Busy` may be caused by a process
    /// that is just being forked: it keeps its parent's descriptors until it executes its own program.
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

    /// A lock counts only if the locked directory is still the one at that path.
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

    /// Other tests fork processes, which for a moment keep a lock that was dropped here.
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
    fn a_locked_directory_cannot_be_locked_exclusively_until_it_is_released() {
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
    fn a_lock_waits_for_a_removal_and_then_finds_nothing() {
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
    fn a_missing_directory_or_a_link_is_not_locked() {
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
    fn a_new_directory_at_the_same_path_is_another_one() {
        let (_temp, task_dir) = task_dir();
        let old = TaskLock::create(&task_dir).unwrap();
        task_dir.remove().unwrap();
        let new = TaskLock::create(&task_dir).unwrap();
        drop(old);
        assert!(is_claimed(&task_dir));
        drop(new);
    }
}
