//! The skeleton that replaces a root that lacks mount points. It is in the task directory and is removed with it. To
//! systemd-nspawn it is a tree like any other, which it locks.

use std::io;

use serde::{Deserialize, Serialize};

use super::{Context, Lease, nspawn_lock};

/// The skeleton of the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skeleton {}

impl Lease for Skeleton {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        if context.killed {
            nspawn_lock::remove_of_tree(context.task_dir, context.skeleton);
        }
        Ok(())
    }
}
