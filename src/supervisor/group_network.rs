//! Enters the network namespace of a group, and opens it to programs without privileges as docker and podman do: a container's user
//! namespace does not own it, so that even its root could bind no port below 1024 and send no ping there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::container::Cause;
use crate::state::task_dir::Refusal;
use crate::sys::netns::Netns;

/// A setting, the kernel's default, and the values to write instead, the first one that the kernel accepts.
type Opened = (&'static str, &'static str, &'static [&'static str]);

/// A group id that does not exist in the agent's user namespace is refused.
const OPENED: &[Opened] = &[
    ("net.ipv4.ip_unprivileged_port_start", "1024", &["0"]),
    (
        "net.ipv4.ping_group_range",
        "1 0",
        &["0 2147483647", "0 65535"],
    ),
];

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
    for (name, default, values) in OPENED {
        if !sysctls.contains_key(*name) {
            open(
                &Path::new("/proc/sys").join(name.replace('.', "/")),
                default,
                values,
            );
        }
    }
    Ok(())
}

/// Writes a setting in the namespaces of this process. One that is not the default any more is that of another task of the group, or
/// of the network. A task starts without it where the kernel or a read-only `/proc/sys` does not let it be written.
fn open(file: &Path, default: &str, values: &[&str]) {
    let now = fs::read_to_string(file).unwrap_or_default();
    if now.split_ascii_whitespace().eq(default.split(' ')) {
        let _ = values.iter().any(|value| fs::write(file, value).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::default("1\t0\n", "0 2147483647")]
    #[case::of_another_task("100\t200\n", "100\t200\n")]
    fn only_a_default_is_changed(#[case] before: &str, #[case] after: &str) {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("setting");
        fs::write(&file, before).unwrap();
        let (_, default, values) = OPENED[1];
        open(&file, default, values);
        assert_eq!(fs::read_to_string(&file).unwrap(), after);
    }

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
