//! systemd-nspawn's own locks, which keep two containers from writing the same tree or image, or using the same uid range.
//! Containers that do not write the tree hold a shared lock. When one of them exits, systemd-nspawn tries to make its lock
//! exclusive, and removes the file if no other process holds it. During that moment another start finds the tree busy and fails.
//! So the supervisor of a start that shares its tree takes the locks itself before it starts systemd-nspawn, where waiting for
//! that moment to pass is harmless, and holds them until systemd-nspawn has its own. A start that writes its tree waits too: the
//! exit of the container before it is reported a moment before systemd-nspawn releases its locks.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::failpoint::{self, Failpoint};

/// Where systemd-nspawn keeps the locks that it names by inode.
const BY_INODE: &str = "/run/systemd/nspawn/locks";

/// How long a start waits before each new attempt to share a lock, or to find it free, in milliseconds. A container that is being
/// ended holds its lock for microseconds to milliseconds, longer on a loaded host. One that goes on holds it as long as it runs; the
/// start does not wait for that.
const PAUSES: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// A shared lock. The field is narrower than the constant on all platforms.
#[expect(clippy::cast_possible_truncation, reason = "the constant is 0")]
const SHARED: i16 = nix::libc::F_RDLCK as i16;

/// An exclusive lock.
#[expect(clippy::cast_possible_truncation, reason = "the constant is 1")]
pub(super) const EXCLUSIVE: i16 = nix::libc::F_WRLCK as i16;

/// No lock.
#[expect(clippy::cast_possible_truncation, reason = "the constant is 2")]
const UNLOCKED: i16 = nix::libc::F_UNLCK as i16;

/// Locks that are shared with other containers of the same tree. Dropping them releases them as systemd-nspawn does: the last
/// holder removes the files.
#[derive(Debug, Default)]
pub struct SharedLocks(Vec<(File, PathBuf)>);

impl SharedLocks {
    /// Shares the locks of a tree or image. Those that can't be taken are left to systemd-nspawn, which then reports why.
    pub fn take(task_dir: &Path, tree: &Path) -> Self {
        // Fails if the directory exists, and where systemd-nspawn has never run: then there is no container to share with.
        let _ = DirBuilder::new().mode(0o700).create(BY_INODE);
        let mut locks = Self::default();
        let mut pauses = PAUSES.iter();
        for path in paths_of(tree).into_iter().flatten() {
            loop {
                match share(&path) {
                    Ok(file) => {
                        locks.0.push((file, path));
                        break;
                    }
                    Err(Errno::EAGAIN | Errno::EACCES) => {
                        failpoint::hit(task_dir, Failpoint::TreeBusy);
                        let Some(pause) = pauses.next() else {
                            return locks;
                        };
                        std::thread::sleep(Duration::from_millis(*pause));
                    }
                    Err(_) => break,
                }
            }
        }
        locks
    }
}

/// Waits until no process holds a lock of a tree or image that the start is going to write. Takes no lock itself, which would be
/// in systemd-nspawn's way. If it is still held after all [`PAUSES`], systemd-nspawn is left to report that.
pub(super) fn wait_until_free(task_dir: &Path, tree: &Path) {
    let paths = paths_of(tree);
    let mut pauses = PAUSES.iter();
    while paths.iter().flatten().any(|path| is_held(path)) {
        failpoint::hit(task_dir, Failpoint::TreeBusy);
        let Some(pause) = pauses.next() else { return };
        std::thread::sleep(Duration::from_millis(*pause));
    }
}

/// Whether a process holds this lock. One that can't be examined is left to systemd-nspawn.
fn is_held(path: &Path) -> bool {
    let Ok(file) = open(path) else { return false };
    let mut found = whole_file(EXCLUSIVE);
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found)).is_ok() && found.l_type != UNLOCKED
}

impl SharedLocks {
    /// Shares one lock, and creates its file if necessary.
    pub(super) fn of_file(path: PathBuf) -> Result<Self, Errno> {
        Ok(Self(vec![(share(&path)?, path)]))
    }

    /// The same, if no process holds the lock.
    pub(super) fn of_free_file(path: PathBuf) -> Result<Self, Errno> {
        let file = acquire(&path, EXCLUSIVE)?;
        lock(&file, SHARED)?;
        Ok(Self(vec![(file, path)]))
    }
}

impl SharedLocks {
    /// Waits, at most a second, until no other process shares these locks, and then removes the files: two that only drop them at the same moment
    /// would each leave the files to the other.
    pub fn release_last(&self) {
        let mut pauses = PAUSES.iter();
        for (file, path) in &self.0 {
            while !remove_if_alone(file, path)
                && let Some(pause) = pauses.next()
            {
                std::thread::sleep(Duration::from_millis(*pause));
            }
        }
    }
}

/// Removes the file of a lock that is held here, unless another process shares it: then `false`.
fn remove_if_alone(file: &File, path: &Path) -> bool {
    let is_alone = lock(file, EXCLUSIVE).is_ok();
    // A file that is removed already has made place for that of another process.
    if is_alone && file.metadata().is_ok_and(|about| about.nlink() > 0) {
        let _ = fs::remove_file(path);
    }
    is_alone
}

impl Drop for SharedLocks {
    fn drop(&mut self) {
        for (file, path) in self.0.drain(..) {
            if !remove_if_alone(&file, &path) {
                // A process that is just being forked has the descriptor too, and would keep the lock.
                let _ = lock(&file, UNLOCKED);
            }
        }
    }
}

/// Shares one lock, and creates its file if necessary.
fn share(path: &Path) -> Result<File, Errno> {
    acquire(path, SHARED)
}

/// Takes one lock, and creates its file if necessary.
fn acquire(path: &Path, kind: i16) -> Result<File, Errno> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)
            .map_err(errno)?;
        lock(&file, kind)?;
        // If the file was removed before it was locked here, no other process will find this lock.
        if file.metadata().map_err(errno)?.nlink() > 0 {
            return Ok(file);
        }
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Locks a whole file, for its open file description (`F_OFD_SETLK`), as systemd-nspawn does. Fails with `EAGAIN` or `EACCES` if another
/// process holds a lock that excludes this one.
pub(super) fn lock(file: &File, kind: i16) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(kind))).map(drop)
}

/// A lock of this kind on a whole file.
fn whole_file(kind: i16) -> nix::libc::flock {
    nix::libc::flock {
        l_type: kind,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Opens a lock file that exists.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits())
        .open(path)
}

/// The two lock files of a tree or an image.
fn paths_of(tree: &Path) -> Option<[PathBuf; 2]> {
    let about = fs::metadata(tree).ok()?;
    let name = tree.file_name()?.to_str()?;
    let node = format!("inode-{}:{}", about.dev(), about.ino());
    Some([
        tree.with_file_name(format!(".#{name}.lck")),
        Path::new(BY_INODE).join(node),
    ])
}

/// Removes the lock files of a tree that a killed systemd-nspawn has left.
pub(super) fn remove_of_tree(task_dir: &Path, tree: &Path) {
    for path in paths_of(tree).into_iter().flatten() {
        remove(task_dir, &path);
    }
}

/// Removes a lock file that a killed systemd-nspawn has left, if no process holds it: the lock is taken first, so that another
/// container of the same tree keeps its own. systemd-nspawn notices when a file it has locked was removed, and tries again.
pub(super) fn remove(task_dir: &Path, path: &Path) {
    if let Some(_held) = take(path) {
        failpoint::hit(task_dir, Failpoint::TreeLocked);
        let _ = fs::remove_file(path);
    }
}

/// Takes one of systemd-nspawn's locks, if it exists and no process holds it.
pub(super) fn take(path: &Path) -> Option<File> {
    let file = open(path).ok()?;
    lock(&file, EXCLUSIVE).ok()?;
    // Its last holder may have removed it before this lock was granted; the file at this path may be another one's by now.
    (file.metadata().ok()?.nlink() > 0).then_some(file)
}

/// The lock files in a directory that were created after the launch spec (`ordered_at`), that no process holds, and for whose name `meaning`
/// returns a value. Their locks are held as long as the returned files are open. The kernel drops a lock with the process that held it, so
/// a file whose lock can be taken belongs to a process that is gone.
pub(super) fn dead<T>(
    ordered_at: Option<SystemTime>,
    directory: &Path,
    meaning: impl Fn(&str) -> Option<T>,
) -> io::Result<Vec<(File, PathBuf, T)>> {
    let entries = match fs::read_dir(directory) {
        // With the directory its lock files are gone too.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let ordered_at = ordered_at.ok_or_else(|| {
        let text = "the launch spec is gone, so its locks can't be distinguished from older ones";
        io::Error::new(io::ErrorKind::NotFound, text)
    })?;
    let dead = entries.flatten().filter_map(|entry| {
        let meaning = meaning(entry.file_name().to_str()?)?;
        let made = entry.metadata().and_then(|about| about.modified()).ok()?;
        let held = (made >= ordered_at).then(|| take(&entry.path()))??;
        Some((held, entry.path(), meaning))
    });
    Ok(dead.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree, the directory of a start on it, and one of the tree's lock files.
    fn places(temp: &tempfile::TempDir) -> [PathBuf; 3] {
        let places = ["tree", "state/start", ".#tree.lck"].map(|name| temp.path().join(name));
        fs::create_dir(&places[0]).unwrap();
        places
    }

    #[test]
    fn the_last_holder_of_a_shared_lock_removes_it() {
        let temp = tempfile::tempdir().unwrap();
        let [tree, task_dir, file] = places(&temp);
        let first = SharedLocks::take(&task_dir, &tree);
        let second = SharedLocks::take(&task_dir, &tree);
        assert!(take(&file).is_none());
        drop(first);
        assert!(file.exists());
        drop(second);
        assert!(!file.exists());
    }

    #[test]
    fn a_start_that_writes_waits_for_a_lock_without_taking_it() {
        let temp = tempfile::tempdir().unwrap();
        let [tree, task_dir, file] = places(&temp);
        wait_until_free(&task_dir, &tree);
        assert!(!file.exists());
        fs::write(&file, "").unwrap();
        let held = take(&file).unwrap();
        assert!(is_held(&file));
        let (going, waited) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_until_free(&task_dir, &tree);
                going.send(()).unwrap();
            });
            let early = waited.recv_timeout(Duration::from_millis(30));
            assert!(early.is_err(), "it does not wait");
            drop(held);
            waited.recv().unwrap();
        });
        assert!(take(&file).is_some());
    }

    #[test]
    fn a_holder_that_waits_for_the_other_removes_the_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("524288");
        let first = SharedLocks::of_free_file(path.clone()).unwrap();
        let second = SharedLocks::of_file(path.clone()).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.release_last());
            std::thread::sleep(Duration::from_millis(20));
            drop(first);
            waiting.join().unwrap();
        });
        assert!(!path.exists());
    }

    #[test]
    fn a_removed_file_is_not_taken_for_its_successor() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("524288");
        let first = SharedLocks::of_free_file(path.clone()).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = SharedLocks::of_free_file(path.clone()).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn an_exclusive_lock_is_not_shared() {
        let temp = tempfile::tempdir().unwrap();
        let [tree, task_dir, file] = places(&temp);
        fs::write(&file, "").unwrap();
        let held = take(&file).unwrap();
        assert!(SharedLocks::take(&task_dir, &tree).0.is_empty());
        drop(held);
        assert!(!SharedLocks::take(&task_dir, &tree).0.is_empty());
    }
}
