//! Removes what starts that are gone have left of their networks. Their links are not among it: a link ends with its container.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::{firewall, pool};

/// Removes reservations of addresses in this state directory, and elements of the host's firewall. Returns the owners of those elements.
///
/// The table of the firewall is one for all state directories of the host. So an owner's elements are removed only if none of its addresses
/// is reserved, neither here nor in one of the `others`, and no route leads to one. `others` are the state directories of the supervisors that
/// live, because they make elements; it is called after the elements have been read, so none of their makers is missing.
pub fn remove(
    state_dir: &Path,
    others: impl FnOnce() -> BTreeSet<PathBuf>,
) -> io::Result<BTreeSet<String>> {
    pool::remove_orphans(state_dir)?;
    // Without root the driver makes no elements, and can't read them.
    if !nix::unistd::geteuid().is_root() {
        return Ok(BTreeSet::new());
    }
    firewall::retain(|| pool::in_use(state_dir, &others()))
}
