//! The bridge of a zone. systemd-nspawn creates it for the first container of the zone and removes it with the last.

use std::io;

use serde::{Deserialize, Serialize};

use super::{Context, Lease, zone};

/// The bridge of a zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneBridge {
    /// The zone as it is passed to systemd-nspawn: without the prefix of the interface name.
    pub zone: String,
}

impl Lease for ZoneBridge {
    fn release(&self, context: &Context<'_>) -> io::Result<()> {
        // After a reboot a bridge of this name is a different one.
        if !context.same_boot {
            return Ok(());
        }
        // A systemd-nspawn that exited by itself has removed its interface.
        let leaving = (!context.by_itself).then_some(context.machine);
        zone::remove_if_empty(&self.zone, leaving)
    }
}
