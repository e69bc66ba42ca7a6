//! The network that the driver makes for a container: its link, the forwarded ports, its addresses.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Context, Lease};
use crate::network::{self, NetworkPlan, pool};

/// The network of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// What was to be made.
    pub plan: NetworkPlan,
}

impl Lease for Network {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        // After a reboot nothing of it exists.
        if context.same_boot {
            network::backend().release(&self.plan)?;
        }
        // Last: whoever gets the address next must find nothing of this start.
        let state_dir = context.task_dir.parent().unwrap_or(context.task_dir);
        pool::release(state_dir, context.task_dir, self.plan.address)
    }

    fn is_own(&self, task_dir: &Path) -> bool {
        let leaf = task_dir.file_name().and_then(|name| name.to_str());
        leaf.is_some_and(|leaf| self.plan.link == network::link_name(leaf))
    }
}
