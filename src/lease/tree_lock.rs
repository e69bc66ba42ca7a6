//! The two lock files by which systemd-nspawn keeps others from using a tree or an image at the same time.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::nspawn_lock::{self, SharedLocks};
use super::{Context, Lease};

/// The lock of a tree or an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeLock {
    /// The tree or image.
    pub tree: PathBuf,
    /// Whether the lock is shared with other containers that do not write the tree.
    #[serde(default)]
    pub shared: bool,
}

impl TreeLock {
    /// Makes a start that finds the tree locked for a moment wait for it, instead of systemd-nspawn, which never waits. Returns the
    /// locks to hold until systemd-nspawn has its own.
    pub fn prepare(&self, task_dir: &Path) -> Option<SharedLocks> {
        if self.shared {
            return Some(SharedLocks::take(task_dir, &self.tree));
        }
        nspawn_lock::wait_until_free(task_dir, &self.tree);
        None
    }
}

impl Lease for TreeLock {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        if context.killed {
            nspawn_lock::remove_of_tree(context.task_dir, &self.tree);
        }
        Ok(())
    }
}
