//! The directories of one `run`: its allocation, and below a short path the plugin's state and socket. Removed at the end, by the
//! plugin when `run` was killed.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

use super::say;

/// How their names begin.
const PREFIX: &str = "nomad-driver-nspawn-";

/// The directories of one run, removed when this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Makes them below `TMPDIR`, or `/tmp` without one, for this user alone.
    pub(super) fn create() -> Result<Self, String> {
        let template = std::env::temp_dir().join(format!("{PREFIX}XXXXXX"));
        let path =
            mkdtemp(&template).map_err(|errno| format!("{}: {errno}", template.display()))?;
        Ok(Self { path })
    }

    /// Where the allocation is made.
    pub(super) fn allocations(&self) -> &Path {
        &self.path
    }

    /// The plugin's state directory, which it makes itself.
    pub(super) fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    /// All of them.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.path.as_path())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The state directory is the plugin's, empty once every task is destroyed. The allocation is gone unless something is
        // mounted in it, and then nothing may be deleted.
        drop(fs::remove_dir(self.state()));
        if let Err(error) = fs::remove_dir(&self.path) {
            say::line(&format!(
                "warning: {} is left: {error}",
                self.path.display()
            ));
        }
    }
}

/// Removes the directories of a run that is gone, with the allocation in them. One in which something is mounted is left, and so
/// is what has another name.
pub fn remove_directories<'a>(paths: impl Iterator<Item = &'a Path>) {
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX)
            && let Err(error) = crate::host::allocation::remove_unmounted(path)
        {
            tracing::warn!(%error, path = %path.display(), "the directory of a run is left");
        }
    }
}
