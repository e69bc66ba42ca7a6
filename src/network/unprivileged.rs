//! Opens a network namespace to programs without privileges, as docker and podman do: any user may listen on any port and send pings.
//! Where the container's user namespace does not own the network namespace, even its root could do neither.

use std::fs;
use std::path::Path;

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

/// Opens the network namespace of this thread. Settings that are `written_later` are left alone.
pub fn open_network(written_later: impl Fn(&str) -> bool) {
    for (name, default, values) in OPENED {
        if !written_later(name) {
            open(
                &Path::new("/proc/sys").join(name.replace('.', "/")),
                default,
                values,
            );
        }
    }
}

/// Writes a setting. One that is not the default any more is that of another task of the group, or of the network. A task starts without
/// it where the kernel or a read-only `/proc/sys` does not let it be written.
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
}
