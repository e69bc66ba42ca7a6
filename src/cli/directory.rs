//! The directories of one `run`: its allocation, and below a short path the plugin's state and socket. Removed at the end, by the
//! plugin when `run` was killed.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

use super::say;
use crate::config::MAX_STATE_DIR_BYTES;

/// How their names begin.
const PREFIX: &str = "nomad-driver-nspawn-";

/// The directories of one run, removed when this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    allocations: PathBuf,
    /// The plugin's own, when it can't be the same.
    short: Option<PathBuf>,
}

impl Directory {
    /// Makes them below `TMPDIR`, or `/tmp` without one, for this user alone. The sockets of the plugin take no long path: where
    /// `TMPDIR` is one, they and the state go to a directory in `/tmp` or `/run`.
    pub(super) fn create() -> Result<Self, String> {
        let parent = std::env::temp_dir();
        let mut made = Self {
            allocations: make_in(&parent)?,
            short: None,
        };
        if made.state().as_os_str().len() > MAX_STATE_DIR_BYTES {
            let short = make_in(Path::new("/tmp")).or_else(|_| make_in(Path::new("/run")));
            made.short = Some(short.map_err(|error| {
                let beyond = made.state().as_os_str().len() - MAX_STATE_DIR_BYTES;
                format!(
                    "TMPDIR: {} is {beyond} bytes too long for sockets below it, and neither /tmp nor /run can be used instead: {error}",
                    parent.display()
                )
            })?);
        }
        Ok(made)
    }

    /// Where the allocation is made.
    pub(super) fn allocations(&self) -> &Path {
        &self.allocations
    }

    /// Where the plugin makes its socket.
    pub(super) fn sockets(&self) -> &Path {
        self.short.as_ref().unwrap_or(&self.allocations)
    }

    /// The plugin's state directory, which it makes itself.
    pub(super) fn state(&self) -> PathBuf {
        self.sockets().join("state")
    }

    /// All of them.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.allocations.as_path()).chain(self.short.as_deref())
    }
}

/// Makes a private directory of a new name.
fn make_in(parent: &Path) -> Result<PathBuf, String> {
    let template = parent.join(format!("{PREFIX}XXXXXX"));
    mkdtemp(&template).map_err(|errno| format!("{}: {errno}", template.display()))
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The state directory is the plugin's, empty once every task is destroyed. The allocation is gone unless something is
        // mounted in it, and then nothing may be deleted.
        drop(fs::remove_dir(self.state()));
        for path in self.paths() {
            if let Err(error) = fs::remove_dir(path) {
                say::line(&format!("warning: {} is left: {error}", path.display()));
            }
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
