//! Forwards the ports of a container and lets it reach others: the firewall, and what the kernel remembers of flows to its ports.

use std::io;

use super::{Attachment, NetworkError, NetworkPlan, conntrack, firewall};

/// Opens the host's firewall for the container. Returns what the user should know.
pub(super) fn open(plan: &NetworkPlan) -> Result<Vec<String>, NetworkError> {
    match firewall::open(plan) {
        // Without ports it only lacks connections to the outside, which a job may not need.
        Err(_) if plan.ports.is_empty() && !has_nft() => {
            return Ok(vec![
                "the container reaches only this host, because nft is not installed here (Debian: nftables)".to_owned(),
            ]);
        }
        opened => opened?,
    }
    conntrack::forget_udp(&plan.ports)
        .map_err(|error| NetworkError::new("forgetting flows to its ports", &error))?;
    if matches!(plan.attachment, Attachment::Bridge(_)) && plan.ports.is_empty() {
        return Ok(Vec::new());
    }
    let dropped_by = firewall::dropped_by();
    Ok(match dropped_by.as_slice() {
        [] => Vec::new(),
        chains => vec![format!(
            "packets that this host forwards are dropped unless a rule accepts them, by {}: let it accept what comes from and goes to the \
             interfaces nd-* and nz-*",
            chains.join(" and ")
        )],
    })
}

/// Opens it again, if others have removed something. Returns whether they have.
pub(super) fn restore(plan: &NetworkPlan) -> Result<bool, NetworkError> {
    // Then nothing was opened either.
    if !has_nft() {
        return Ok(false);
    }
    let is_restored = firewall::restore(plan)?;
    if is_restored {
        // A flow that began meanwhile would go on to miss the container.
        conntrack::forget_udp(&plan.ports)
            .map_err(|error| NetworkError::new("forgetting flows to its ports", &error))?;
    }
    Ok(is_restored)
}

/// Undoes it. May be repeated.
pub(super) fn close(plan: &NetworkPlan) -> io::Result<()> {
    match firewall::close(plan) {
        // Then it has not opened anything.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        closed => closed,
    }?;
    conntrack::forget_udp(&plan.ports)
}

fn has_nft() -> bool {
    !firewall::table_exists().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
