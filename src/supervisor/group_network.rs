//! Enters the network namespace of a group, and opens it to programs without privileges as docker and podman do: a container's user
//! namespace does not own it, so that even its root could bind no port below 1024 and send no ping there.

use std::collections::BTreeMap;
use std::path::Path;

use crate::container::Cause;
use crate::network::open_network;
use crate::state::task_dir::Refusal;
use crate::sys::netns::Netns;

/// Moves this process into the namespace at `path`. The settings in `sysctls` are the job's own and are left to be written later.
pub(super) fn enter(path: &Path, sysctls: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let entered = Netns::open(path).and_then(|namespace| namespace.enter());
    entered.map_err(|error| Refusal {
        // Nomad makes the namespace again, and the driver can't know when.
        cause: Cause::Resources,
        reason: format!(
            "can't enter the network namespace {}: {error}",
            path.display()
        ),
    })?;
    open_network(|name| sysctls.contains_key(name));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    #[test]
    fn a_path_that_is_no_namespace_is_named_and_may_be_tried_again() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("plain");
        fs::write(&file, "").unwrap();
        let refusal = enter(&file, &BTreeMap::new()).unwrap_err();
        assert!(refusal.cause.is_recoverable());
        let reason = refusal.reason;
        assert!(reason.contains(file.to_str().unwrap()), "{reason}");
        assert!(reason.contains("is not a network namespace"), "{reason}");
    }
}
