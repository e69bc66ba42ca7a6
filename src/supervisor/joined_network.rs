//! Enters the network namespace of a group, or of another task, and opens it to programs without privileges as docker and podman do: a
//! container's user namespace does not own it, so that even its root could bind no port below 1024 and send no ping there.

use crate::container::Cause;
use crate::network::open_network;
use crate::state::task_dir::{LaunchSpec, Refusal};
use crate::sys::netns::{Netns, NetnsError};

/// Moves this process into the network namespace that the container is to join, if any. The job's own sysctls are left to be written later.
pub(super) fn enter(launch_spec: &LaunchSpec) -> Result<(), Refusal> {
    let (whose, opened) = match (&launch_spec.network_namespace, launch_spec.network_of) {
        (Some(path), _) => {
            let whose = format!("the network namespace {}", path.display());
            (whose, Netns::open(path))
        }
        (None, Some(leader)) => {
            let whose = format!("the network of the task with process {}", leader.pid);
            (whose, Netns::of_process(leader))
        }
        (None, None) => return Ok(()),
    };
    let entered = opened.and_then(|namespace| namespace.enter());
    entered.map_err(|error| Refusal {
        cause: match error {
            NetnsError::OfHost => Cause::Config,
            // Nomad makes the namespace, or starts the other task, again, and the driver can't know when.
            _ => Cause::Resources,
        },
        reason: format!("can't enter {whose}: {error}"),
    })?;
    open_network(|name| launch_spec.inside.sysctls.contains_key(name));
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
        let launch_spec = LaunchSpec {
            network_namespace: Some(file.clone()),
            ..crate::state::task_dir::tests::an_order("task")
        };
        let refusal = enter(&launch_spec).unwrap_err();
        assert!(refusal.cause.is_recoverable());
        let reason = refusal.reason;
        assert!(reason.contains(file.to_str().unwrap()), "{reason}");
        assert!(reason.contains("is not a network namespace"), "{reason}");
    }
}
