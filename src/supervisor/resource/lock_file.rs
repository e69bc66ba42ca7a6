//! Lock files of systemd-nspawn whose names are not known. The kernel drops a lock with the process that held it, so a file whose
//! lock can be taken is a dead one's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::task_dir::TaskDir;
use super::super::tree_lock;

/// The locks in a directory that were made after the order and that nobody holds, of those names that mean something. They are
/// held as long as what is returned.
pub(super) fn dead<T>(
    task_dir: &TaskDir,
    directory: &Path,
    meaning: impl Fn(&str) -> Option<T>,
) -> io::Result<Vec<(fs::File, PathBuf, T)>> {
    let entries = match fs::read_dir(directory) {
        // Whoever removed the place has removed what lay in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let ordered = fs::symlink_metadata(task_dir.path().join("order"))?.modified()?;
    let dead = entries.flatten().filter_map(|entry| {
        let meaning = meaning(entry.file_name().to_str()?)?;
        let made = entry.metadata().and_then(|about| about.modified()).ok()?;
        let held = (made >= ordered).then(|| tree_lock::take(&entry.path()))??;
        Some((held, entry.path(), meaning))
    });
    Ok(dead.collect())
}
