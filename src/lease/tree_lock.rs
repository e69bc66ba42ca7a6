//! The two lock files by which systemd-nspawn keeps others from using a tree or an image at the same time.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Context, Lease, nspawn_lock};

/// The lock of a tree or an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeLock {
    /// The tree or image.
    pub tree: PathBuf,
    /// Whether the lock is shared with other containers that do not write the tree.
    #[serde(default)]
    pub shared: bool,
}

impl Lease for TreeLock {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        if context.killed {
            nspawn_lock::remove_of_tree(context.task_dir, &self.tree);
        }
        Ok(())
    }
}
