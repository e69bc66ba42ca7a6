//! The command line of systemd-nspawn as the real parser reads it: which version has which option, how long and short forms are matched,
//! and the checks that need nothing but the arguments (the environment only for `--setenv NAME`). Does not read the file system; `rootfs`
//! does. Error messages are those of the real tool, because callers show them to people.
//!
//! Longer than a file should be, because it is one table and its grammar.

use std::collections::HashSet;

use crate::values;

/// Refuses the whole call: one line on stderr, exit status 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    /// The line on stderr.
    pub(crate) message: String,
    /// The errno that is sent to the notification socket.
    pub(crate) errno: i32,
}

impl Refusal {
    /// An invalid argument.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            errno: 22,
        }
    }
}

/// The result of parsing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Parsed {
    Help,
    Version,
    /// `--console=help` and the like: the known values, one per line.
    Words(Vec<&'static str>),
    Run(Box<Options>),
}

/// What runs as PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub(crate) enum Mode {
    /// The command.
    #[default]
    Plain,
    /// A stub init; the command is PID 2.
    AsPid2,
    /// The tree's init.
    Boot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Volatile {
    #[default]
    No,
    Yes,
    State,
    Overlay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Users {
    #[default]
    No,
    Pick,
    Fixed,
    Identity,
    Managed,
}

/// A requested mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mount {
    Bind {
        source: String,
        destination: String,
        mapped: bool,
    },
    Tmpfs {
        destination: String,
    },
    Overlay {
        destination: String,
    },
    Inaccessible {
        destination: String,
    },
}

impl Mount {
    /// The mount point in the container.
    pub(crate) fn destination(&self) -> &str {
        match self {
            Self::Bind { destination, .. }
            | Self::Tmpfs { destination }
            | Self::Overlay { destination }
            | Self::Inaccessible { destination } => destination,
        }
    }
}

/// A call that starts a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Options {
    pub(crate) version: u32,
    pub(crate) directory: Option<String>,
    pub(crate) image: Option<String>,
    pub(crate) template: Option<String>,
    pub(crate) machine: Option<String>,
    pub(crate) mode: Mode,
    pub(crate) ephemeral: bool,
    pub(crate) read_only: bool,
    pub(crate) volatile: Volatile,
    pub(crate) pivot_root: Option<String>,
    pub(crate) chdir: Option<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) user: Option<String>,
    pub(crate) kill_signal: Option<i32>,
    pub(crate) notify_ready: bool,
    pub(crate) uuid: Option<String>,
    pub(crate) register: bool,
    pub(crate) keep_unit: bool,
    pub(crate) scope_settings: bool,
    pub(crate) users: Users,
    pub(crate) ownership: Option<String>,
    pub(crate) private_network: bool,
    pub(crate) network_namespace: Option<String>,
    pub(crate) bridge: Option<String>,
    pub(crate) zone: Option<String>,
    pub(crate) interfaces: Vec<String>,
    pub(crate) network_options: bool,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) quiet: bool,
    pub(crate) pipe: bool,
    pub(crate) command: Vec<String>,
    ports: HashSet<String>,
    retained: u64,
    dropped: u64,
    ambient: u64,
    bind_users: bool,
    link_journal: Option<String>,
    credentials: HashSet<String>,
    /// Files that credentials are read from.
    pub(crate) credential_files: Vec<String>,
    /// Lines for stderr that do not stop the call.
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    Optional,
}
use Takes::{Nothing, Optional, Value};

/// One row: long name, short letter, kind of argument, first version, last version.
struct Row(&'static str, Option<char>, Takes, u32, u32);

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

fn rows(version: u32) -> impl Iterator<Item = &'static Row> {
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

/// Parses the arguments after the program's name and makes the checks that need no file system.
///
/// `variable` looks up a variable of nspawn's own environment.
pub(crate) fn parse(
    version: u32,
    words: &[String],
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Parsed, Refusal> {
    let mut options = Options {
        version,
        register: true,
        retained: values::DEFAULT_CAPABILITIES,
        ..Options::default()
    };
    let mut rest = words.iter();
    while let Some(word) = rest.clone().next() {
        if word == "-" || !word.starts_with('-') {
            break;
        }
        rest.next();
        if word == "--" {
            break;
        }
        let mut found = Vec::new();
        if let Some(long) = word.strip_prefix("--") {
            found.push(long_option(version, long, &mut rest)?);
        } else {
            short_options(version, &word[1..], &mut rest, &mut found)?;
        }
        for (name, value) in found {
            match name {
                "help" => return Ok(Parsed::Help),
                "version" => return Ok(Parsed::Version),
                _ => {}
            }
            if let (Some("help"), Some(known)) = (value.as_deref(), values::listed(version, name)) {
                return Ok(Parsed::Words(known));
            }
            options.take(name, value.as_deref(), &variable)?;
        }
    }
    options.command = rest.cloned().collect();
    options.verify()?;
    Ok(Parsed::Run(Box::new(options)))
}

type Found = (&'static str, Option<String>);

fn long_option<'a>(
    version: u32,
    text: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Found, Refusal> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let matching: Vec<_> = rows(version)
        .filter(|row| row.0.starts_with(name))
        .collect();
    let Row(known, _, takes, ..) = match (matching.iter().find(|row| row.0 == name), &matching[..])
    {
        (Some(row), _) => row,
        (None, [row]) => row,
        (None, []) => return Err(getopt(format!("unrecognized option '--{text}'"))),
        (None, several) => {
            let names: Vec<_> = several.iter().map(|row| format!("'--{}'", row.0)).collect();
            let names = names.join(" ");
            return Err(getopt(format!(
                "option '--{text}' is ambiguous; possibilities: {names}"
            )));
        }
    };
    let value = match (takes, value) {
        (Nothing, Some(_)) => {
            return Err(getopt(format!(
                "option '--{known}' doesn't allow an argument"
            )));
        }
        (Value, None) => match rest.next() {
            Some(next) => Some(next.clone()),
            None => return Err(getopt(format!("option '--{known}' requires an argument"))),
        },
        (_, value) => value,
    };
    Ok((known, value))
}

fn short_options<'a>(
    version: u32,
    letters: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    found: &mut Vec<Found>,
) -> Result<(), Refusal> {
    let mut left = letters.chars();
    while let Some(letter) = left.next() {
        let Some(Row(name, _, takes, ..)) = rows(version).find(|row| row.1 == Some(letter)) else {
            return Err(getopt(format!("invalid option -- '{letter}'")));
        };
        if *takes == Nothing {
            found.push((name, None));
            continue;
        }
        let value = match left.as_str() {
            "" => rest.next().cloned(),
            glued => Some(glued.to_owned()),
        };
        let Some(value) = value else {
            return Err(getopt(format!("option requires an argument -- '{letter}'")));
        };
        found.push((name, Some(value)));
        break;
    }
    Ok(())
}

fn getopt(message: String) -> Refusal {
    Refusal::invalid(format!("systemd-nspawn: {message}"))
}

impl Options {
    /// One option. The name is from the table; `value` is present if the table requires one.
    fn take(
        &mut self,
        name: &str,
        value: Option<&str>,
        variable: &impl Fn(&str) -> Option<String>,
    ) -> Result<(), Refusal> {
        let version = self.version;
        let text = value.unwrap_or_default();
        let owned = || Some(text.to_owned());
        match name {
            "directory" => self.directory = owned(),
            "template" => self.template = owned(),
            "image" | "mstack" => self.image = owned(),
            "ephemeral" => self.ephemeral = true,
            "user" | "uid" => self.take_user(name, value),
            "as-pid2" | "boot" => self.take_mode(name)?,
            "uuid" => self.uuid = Some(values::uuid(text)?),
            "read-only" => self.read_only = true,
            "volatile" => self.volatile = values::volatile(value)?,
            "pivot-root" => self.pivot_root = Some(values::pivot_root(text)?),
            "chdir" => self.chdir = Some(values::chdir(version, text)?),
            "setenv" => self.take_variable(text, variable)?,
            "kill-signal" => self.kill_signal = Some(values::signal(text)?),
            "notify-ready" => {
                let word = "is not a valid notify mode. Valid modes are: yes, no, and ready.";
                self.notify_ready = values::boolean(text)
                    .ok_or_else(|| Refusal::invalid(format!("{text} {word}")))?;
            }
            "machine" => self.machine = values::host_name("machine name", text)?,
            "hostname" => drop(values::host_name("hostname", text)?),
            "slice" | "property" => self.scope_settings = true,
            "register" => {
                // 258 and later have a third state; the fake has no service to register with anyway.
                let auto = version >= 258 && text == "auto";
                self.register = !auto && values::named_boolean(name, text)?;
            }
            "keep-unit" => self.keep_unit = true,
            "private-users" => self.users = values::private_users(version, value)?,
            "private-users-ownership" => self.ownership = Some(values::ownership(text)?),
            "private-users-chown" => self.ownership = Some("chown".to_owned()),
            "\0U" => {
                self.users = Users::Pick;
                self.ownership = Some("auto".to_owned());
            }
            "private-network" => self.private_network = true,
            "network-namespace-path" => self.network_namespace = owned(),
            _ if name.starts_with("network-") => self.take_network(name, text)?,
            "port" => self.take_port(text)?,
            "capability" => self.retained |= values::capabilities(text)?,
            "drop-capability" => self.dropped |= values::capabilities(text)?,
            "ambient-capability" => self.ambient |= values::capabilities(text)?,
            "bind" | "bind-ro" | "tmpfs" | "overlay" | "overlay-ro" | "inaccessible" => {
                self.mounts.push(values::mount(version, name, text)?);
            }
            "bind-user" => self.bind_users = true,
            "link-journal" => self.link_journal = Some(values::link_journal(text)?),
            "\0j" => self.link_journal = Some("try-guest".to_owned()),
            "console" => self.pipe = values::console(version, text)? == "pipe",
            "pipe" => self.pipe = true,
            "quiet" => self.quiet = true,
            "share-system" => self.warnings.push(
                "Please do not use --share-system anymore, use $SYSTEMD_NSPAWN_SHARE_* instead."
                    .to_owned(),
            ),
            "set-credential" | "load-credential" => self.take_credential(name, text)?,
            _ => values::check(version, name, text)?,
        }
        Ok(())
    }

    fn take_user(&mut self, name: &str, value: Option<&str>) {
        if self.version >= 261 && name == "user" {
            let word = "--user=NAME is deprecated, use --uid=NAME instead.";
            self.warnings.extend(value.map(|_| word.to_owned()));
        }
        self.user = value.map(str::to_owned);
    }

    fn take_mode(&mut self, name: &str) -> Result<(), Refusal> {
        let (wanted, other) = if name == "boot" {
            (Mode::Boot, Mode::AsPid2)
        } else {
            (Mode::AsPid2, Mode::Boot)
        };
        if self.mode == other {
            return Err(Refusal::invalid(
                "--boot and --as-pid2 may not be combined.",
            ));
        }
        self.mode = wanted;
        Ok(())
    }

    fn take_variable(
        &mut self,
        text: &str,
        variable: &impl Fn(&str) -> Option<String>,
    ) -> Result<(), Refusal> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let value_is_taken = value
            .as_deref()
            .is_none_or(|value| values::variable_value(value, self.version));
        if !values::variable_name(name)
            || !value_is_taken
            || (value.is_none() && self.version < 250)
        {
            return Err(Refusal::invalid(if self.version < 250 {
                format!("Environment variable assignment '{text}' is not valid.")
            } else {
                format!("Cannot assign environment variable {text}: Invalid argument")
            }));
        }
        let value = value.unwrap_or_else(|| variable(name).unwrap_or_default());
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value));
        Ok(())
    }

    fn take_network(&mut self, name: &str, text: &str) -> Result<(), Refusal> {
        self.private_network = true;
        self.network_options = true;
        match name {
            "network-bridge" => self.bridge = Some(values::interface("Bridge interface", text)?),
            "network-zone" => {
                self.zone = Some(values::interface("Network zone", &format!("vz-{text}"))?)
            }
            "network-veth-extra" => values::veth_extra(text)?,
            "network-veth" => {}
            _ => self
                .interfaces
                .push(values::host_interface(self.version, text)?),
        }
        Ok(())
    }

    fn take_port(&mut self, text: &str) -> Result<(), Refusal> {
        let port = values::port(text)?;
        if !self.ports.insert(port.clone()) {
            return Err(Refusal {
                message: format!("Duplicate port specification: {text}"),
                errno: 17,
            });
        }
        Ok(())
    }

    fn take_credential(&mut self, name: &str, text: &str) -> Result<(), Refusal> {
        let id = values::credential(name, text, self.version)?;
        if name == "load-credential" {
            self.credential_files
                .extend(text.split_once(':').map(|(_, path)| path.to_owned()));
        }
        if !self.credentials.insert(id.clone()) {
            return Err(Refusal {
                message: format!("Duplicate credential '{id}', refusing."),
                errno: 17,
            });
        }
        Ok(())
    }

    /// Rejects invalid combinations, in the order of the real tool.
    fn verify(&mut self) -> Result<(), Refusal> {
        let refuse = |message: &str| Err(Refusal::invalid(message));
        if self.mode == Mode::Boot && self.kill_signal.is_none() {
            self.kill_signal = Some(crate::process::RTMIN + 3);
        }
        if self.ephemeral && self.template.is_some() && self.directory.is_none() {
            self.directory = self.template.take();
        }
        self.read_only |= self.volatile != Volatile::No;
        self.read_only |= self.mounts.iter().any(|mount| mount.destination() == "/");
        // Up to 257 the host's udev is checked first, and only then the options that `--image` excludes.
        if self.users == Users::Managed && !self.private_network {
            return refuse(
                "Managed user namespace operation requires private networking, as otherwise /sys/ may not be mounted.",
            );
        }
        if self.directory.is_some() && self.image.is_some() {
            return refuse("--directory= and --image= may not be combined.");
        }
        if self.template.is_some() && self.image.is_some() {
            return refuse("--template= and --image= may not be combined.");
        }
        if self.ephemeral && self.template.is_some() {
            return refuse("--ephemeral and --template= may not be combined.");
        }
        let journal = self.link_journal.as_deref().unwrap_or("auto");
        let tries = journal.starts_with("try-") && self.version > 247;
        if self.ephemeral && !["no", "auto"].contains(&journal) && !tries {
            return refuse("--ephemeral and --link-journal={host,guest} may not be combined.");
        }
        let chown = self.ownership.as_deref() == Some("chown")
            || (self.version < 249 && self.users == Users::Pick && self.ownership.is_some());
        if chown && self.read_only {
            return refuse(if self.version < 249 {
                "--read-only and --private-users-chown may not be combined."
            } else {
                "--read-only and --private-users-ownership=chown may not be combined."
            });
        }
        if self.network_namespace.is_some() && self.network_options {
            return refuse(
                "--network-namespace-path= cannot be combined with other network options.",
            );
        }
        if self.bridge.is_some() && self.zone.is_some() {
            return refuse("--network-bridge= and --network-zone= may not be combined.");
        }
        if !self.ports.is_empty() && !self.private_network {
            return refuse("Cannot use --port= without private networking.");
        }
        self.verify_ambient()?;
        if self.bind_users && self.users == Users::No {
            return refuse("--bind-user= requires --private-users");
        }
        Ok(())
    }

    fn verify_ambient(&self) -> Result<(), Refusal> {
        let refuse = |message: &str| Err(Refusal::invalid(message));
        let network = if self.private_network {
            values::NET_ADMIN
        } else {
            0
        };
        let retained = (self.retained | network) & !self.dropped;
        if self.ambient == 0 {
            return Ok(());
        }
        if self.ambient == u64::MAX {
            return refuse("AmbientCapability= does not support the value all.");
        }
        if self.ambient & retained != self.ambient {
            return refuse(
                "AmbientCapability= setting is not fully covered by Capability= setting.",
            );
        }
        if self.mode == Mode::Boot {
            return refuse("AmbientCapability= setting is not useful for boot mode.");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn read(version: u32, words: &[&str]) -> Result<Parsed, Refusal> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        parse(version, &words, |name| {
            (name == "SET").then(|| "from outside".to_owned())
        })
    }

    fn run(words: &[&str]) -> Options {
        match read(252, words) {
            Ok(Parsed::Run(options)) => *options,
            other => panic!("{other:?}"),
        }
    }

    fn refused(version: u32, words: &[&str]) -> String {
        read(version, words).expect_err("was taken").message
    }

    #[test]
    fn both_spellings_of_a_value_and_the_short_one_are_read() {
        for words in [
            &["--directory=/a"][..],
            &["--directory", "/a"],
            &["-D", "/a"],
            &["-D/a"],
            &["--dir=/a"],
        ] {
            assert_eq!(run(words).directory.as_deref(), Some("/a"), "{words:?}");
        }
    }

    #[test]
    fn reading_stops_at_the_first_word_that_is_no_option() {
        assert_eq!(
            run(&["-q", "echo", "--nope", "--", "-D"]).command,
            ["echo", "--nope", "--", "-D"]
        );
        assert_eq!(run(&["-q", "--", "--nope"]).command, ["--nope"]);
    }

    #[test]
    fn the_help_lists_what_the_version_has() {
        assert!(help(258).contains("--cleanup") && !help(257).contains("--cleanup"));
        assert!(help(250).contains("--suppress-sync=") && !help(249).contains("--suppress-sync"));
    }

    #[test]
    fn the_last_setting_of_a_variable_wins_and_a_bare_name_is_copied() {
        let options = run(&["-EA=1", "--setenv", "A=2=3", "-E", "SET", "-E", "UNSET"]);
        let wanted = [("A", "2=3"), ("SET", "from outside"), ("UNSET", "")];
        let wanted: Vec<_> = wanted
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect();
        assert_eq!(options.environment, wanted);
    }

    #[rstest]
    #[case(252, &["--x"], "systemd-nspawn: unrecognized option '--x'")]
    #[case(252, &["-Y"], "systemd-nspawn: invalid option -- 'Y'")]
    #[case(252, &["--directory"], "systemd-nspawn: option '--directory' requires an argument")]
    #[case(252, &["--read-only=yes"], "systemd-nspawn: option '--read-only' doesn't allow an argument")]
    #[case(
        252,
        &["--no"],
        "systemd-nspawn: option '--no' is ambiguous; possibilities: '--no-new-privileges' '--notify-ready' '--no-pager'"
    )]
    #[case(253, &["--image-policy=x"], "systemd-nspawn: unrecognized option '--image-policy=x'")]
    #[case(249, &["--suppress-sync=yes"], "systemd-nspawn: unrecognized option '--suppress-sync=yes'")]
    #[case(249, &["-E", "SET"], "Environment variable assignment 'SET' is not valid.")]
    #[case(252, &["-b", "-a"], "--boot and --as-pid2 may not be combined.")]
    #[case(252, &["--volatile", "--private-users-ownership=chown"],
        "--read-only and --private-users-ownership=chown may not be combined.")]
    #[case(252, &["-E", "1X="], "Cannot assign environment variable 1X=: Invalid argument")]
    #[case(252, &["-E", "X=\u{fffe}"], "Cannot assign environment variable X=\u{fffe}: Invalid argument")]
    #[case(247, &["-E", "X=\u{1b}"], "Environment variable assignment 'X=\u{1b}' is not valid.")]
    #[case(252, &["-p", "80"], "Cannot use --port= without private networking.")]
    #[case(252, &["-n", "-p80", "-p", "tcp:80"], "Duplicate port specification: tcp:80")]
    #[case(252, &["-D", "/a", "-i", "/b"], "--directory= and --image= may not be combined.")]
    #[case(252, &["--ambient-capability=CAP_NET_ADMIN"],
        "AmbientCapability= setting is not fully covered by Capability= setting.")]
    fn what_the_real_one_refuses_is_refused(
        #[case] version: u32,
        #[case] words: &[&str],
        #[case] message: &str,
    ) {
        assert_eq!(refused(version, words), message);
    }
}
