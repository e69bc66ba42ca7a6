//! The command line of systemd-nspawn as the real parser reads it: which version has which option, how long and short forms are matched,
//! and the checks that need nothing but the arguments (the environment only for `--setenv NAME`). Does not read the file system; `rootfs`
//! does. Error messages are those of the real tool, because callers show them to people.

use std::collections::HashSet;

use crate::values;

use getopt::{long_option, short_options};

pub(crate) use table::help;

mod combinations;
mod getopt;
mod table;
#[cfg(test)]
mod tests;

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

/// A resource limit of the container's processes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Rlimit {
    /// `NOFILE`.
    pub(crate) name: String,
    /// `u64::MAX` is unlimited.
    pub(crate) soft: u64,
    pub(crate) hard: u64,
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
    pub(crate) rlimits: Vec<Rlimit>,
    ports: HashSet<String>,
    retained: u64,
    dropped: u64,
    ambient: u64,
    bind_users: bool,
    link_journal: Option<String>,
    credentials: HashSet<String>,
    /// The files that credentials are read from, by name.
    pub(crate) credential_files: Vec<(String, String)>,
    /// Lines for stderr that do not stop the call.
    pub(crate) warnings: Vec<String>,
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
            "rlimit" => {
                let limit = values::rlimit(text)?;
                self.rlimits.retain(|known| known.name != limit.name);
                self.rlimits.push(limit);
            }
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
            let file = text.split_once(':').map(|(_, path)| path.to_owned());
            self.credential_files
                .extend(file.map(|file| (id.clone(), file)));
        }
        if !self.credentials.insert(id.clone()) {
            return Err(Refusal {
                message: format!("Duplicate credential '{id}', refusing."),
                errno: 17,
            });
        }
        Ok(())
    }
}
