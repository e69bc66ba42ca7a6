//! Which version has which option.

/// Whether an option has an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Nothing,
    Value,
    Optional,
}
use Takes::{Nothing, Optional, Value};

/// One row: long name, short letter, kind of argument, first version, last version.
pub(super) struct Row(
    pub(super) &'static str,
    pub(super) Option<char>,
    pub(super) Takes,
    pub(super) u32,
    pub(super) u32,
);

/// In the real tool's order, which is visible if an abbreviated name is ambiguous.
const TABLE: &[Row] = &[
    Row("help", Some('h'), Nothing, 0, 999),
    Row("version", None, Nothing, 0, 999),
    Row("directory", Some('D'), Value, 0, 999),
    Row("template", None, Value, 0, 999),
    Row("ephemeral", Some('x'), Nothing, 0, 999),
    Row("user", Some('u'), Value, 0, 260),
    Row("uid", Some('u'), Value, 261, 999),
    Row("user", None, Optional, 261, 999),
    Row("system", None, Nothing, 261, 999),
    Row("private-network", None, Nothing, 0, 999),
    Row("as-pid2", Some('a'), Nothing, 0, 999),
    Row("boot", Some('b'), Nothing, 0, 999),
    Row("uuid", None, Value, 0, 999),
    Row("read-only", None, Nothing, 0, 999),
    Row("capability", None, Value, 0, 999),
    Row("ambient-capability", None, Value, 248, 999),
    Row("drop-capability", None, Value, 0, 999),
    Row("no-new-privileges", None, Value, 0, 999),
    Row("link-journal", None, Value, 0, 999),
    Row("bind", None, Value, 0, 999),
    Row("bind-ro", None, Value, 0, 999),
    Row("tmpfs", None, Value, 0, 999),
    Row("overlay", None, Value, 0, 999),
    Row("overlay-ro", None, Value, 0, 999),
    Row("inaccessible", None, Value, 0, 999),
    Row("machine", Some('M'), Value, 0, 999),
    Row("hostname", None, Value, 0, 999),
    Row("slice", Some('S'), Value, 0, 999),
    Row("setenv", Some('E'), Value, 0, 999),
    Row("selinux-context", Some('Z'), Value, 0, 999),
    Row("selinux-apifs-context", Some('L'), Value, 0, 999),
    Row("quiet", Some('q'), Nothing, 0, 999),
    Row("share-system", None, Nothing, 0, 257),
    Row("register", None, Value, 0, 999),
    Row("keep-unit", None, Nothing, 0, 999),
    Row("network-interface", None, Value, 0, 999),
    Row("network-macvlan", None, Value, 0, 999),
    Row("network-ipvlan", None, Value, 0, 999),
    Row("network-veth", Some('n'), Nothing, 0, 999),
    Row("network-veth-extra", None, Value, 0, 999),
    Row("network-bridge", None, Value, 0, 999),
    Row("network-zone", None, Value, 0, 999),
    Row("network-namespace-path", None, Value, 0, 999),
    Row("personality", None, Value, 0, 999),
    Row("image", Some('i'), Value, 0, 999),
    Row("volatile", None, Optional, 0, 999),
    Row("port", Some('p'), Value, 0, 999),
    Row("property", None, Value, 0, 999),
    Row("private-users", None, Optional, 0, 999),
    Row("private-users-chown", None, Optional, 0, 999),
    Row("private-users-ownership", None, Value, 249, 999),
    Row("private-users-delegate", None, Value, 260, 999),
    Row("kill-signal", None, Value, 0, 999),
    Row("settings", None, Value, 0, 999),
    Row("chdir", None, Value, 0, 999),
    Row("pivot-root", None, Value, 0, 999),
    Row("notify-ready", None, Value, 0, 999),
    Row("root-hash", None, Value, 0, 999),
    Row("root-hash-sig", None, Value, 246, 999),
    Row("verity-data", None, Value, 246, 999),
    Row("system-call-filter", None, Value, 0, 999),
    Row("rlimit", None, Value, 0, 999),
    Row("oom-score-adjust", None, Value, 0, 999),
    Row("cpu-affinity", None, Value, 0, 999),
    Row("resolv-conf", None, Value, 0, 999),
    Row("timezone", None, Value, 0, 999),
    Row("console", None, Value, 0, 999),
    Row("pipe", Some('P'), Nothing, 0, 999),
    Row("oci-bundle", None, Value, 0, 999),
    Row("no-pager", None, Nothing, 0, 999),
    Row("set-credential", None, Value, 247, 999),
    Row("load-credential", None, Value, 247, 999),
    Row("bind-user", None, Value, 249, 999),
    Row("bind-user-shell", None, Value, 258, 999),
    Row("bind-user-group", None, Value, 259, 999),
    Row("suppress-sync", None, Value, 250, 999),
    Row("image-policy", None, Value, 254, 999),
    Row("background", None, Value, 256, 999),
    Row("cleanup", None, Nothing, 258, 999),
    Row("no-ask-password", None, Nothing, 258, 999),
    Row("mstack", None, Value, 260, 999),
    Row("restrict-address-families", None, Value, 261, 999),
    Row("forward-journal", None, Value, 261, 999),
    Row("forward-journal-max-use", None, Value, 261, 999),
    Row("forward-journal-keep-free", None, Value, 261, 999),
    Row("forward-journal-max-file-size", None, Value, 261, 999),
    Row("forward-journal-max-files", None, Value, 261, 999),
    // Short only; the long names can't be typed.
    Row("\0U", Some('U'), Nothing, 0, 999),
    Row("\0j", Some('j'), Nothing, 0, 999),
];

/// The options of this version.
pub(super) fn rows(version: u32) -> impl Iterator<Item = &'static Row> {
    TABLE
        .iter()
        .filter(move |row| (row.3..=row.4).contains(&version))
}

/// The options that this version lists in its help.
pub(crate) fn help(version: u32) -> String {
    let mut text = String::from(
        "systemd-nspawn [OPTIONS...] [PATH] [ARGUMENTS...]\n\nSpawn a command or OS in a light-weight container.\n\n",
    );
    for Row(name, short, takes, ..) in rows(version).filter(|row| !row.0.starts_with('\0')) {
        let short = short.map_or_else(|| "  ".to_owned(), |letter| format!("-{letter}"));
        let value = match takes {
            Nothing => "",
            Value => "=VALUE",
            Optional => "[=VALUE]",
        };
        text.push_str(&format!("  {short} --{name}{value}\n"));
    }
    text.push_str("\nSee the systemd-nspawn(1) man page for details.\n");
    text
}
