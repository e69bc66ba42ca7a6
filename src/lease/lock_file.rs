//! Lock files of systemd-nspawn whose names are not recorded. The kernel drops a lock with the process that held it, so a file
//! whose lock can be taken belongs to a process that is gone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::nspawn_lock;

/// The lock files in a directory that were created after the launch spec (`ordered_at`), that no process holds, and for whose name `meaning`
/// returns a value. Their locks are held as long as the returned files are open.
pub(super) fn dead<T>(
    ordered_at: Option<SystemTime>,
    directory: &Path,
    meaning: impl Fn(&str) -> Option<T>,
) -> io::Result<Vec<(fs::File, PathBuf, T)>> {
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
        let held = (made >= ordered_at).then(|| nspawn_lock::take(&entry.path()))??;
        Some((held, entry.path(), meaning))
    });
    Ok(dead.collect())
}
