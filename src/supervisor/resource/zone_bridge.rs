//! The bridge of a zone, which systemd-nspawn makes for the first container of the zone and removes with the last.

use std::io;

use serde::{Deserialize, Serialize};

use super::super::zone;
use super::{Context, Lease};

/// The bridge of a zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneBridge {
    /// The zone, as systemd-nspawn is told it: without the prefix of the interface.
    pub zone: String,
}

impl Lease for ZoneBridge {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        // In another boot a bridge of this name is another one.
        if !context.same_boot {
            return Ok(());
        }
        // A systemd-nspawn that has ended by itself took its interface along.
        let leaving = (!context.by_itself).then_some(context.machine);
        zone::remove_if_empty(&self.zone, leaving)
    }
}
