//! Builds the command line of systemd-nspawn for a container. Pure: reads no file and does not look at the host, whose
//! abilities are passed in as [`Target`]. Returns an error for what the installed version has no option for, rather
//! than starting something else.

use std::collections::BTreeMap;
use std::path::Path;

use super::env_filter::safe_for_nspawn_env;
use super::machine_id;
use super::version::Feature;
use crate::container::{
    CgroupLayout, Console, ContainerSpec, Credential, InterfaceMode, Mode, Mount, Network,
    NetworkNamespace, Payload, Readiness, Resources, Restrictions, Rlimit, Root, Rootfs, Tmpfs,
    Users, Volatile,
};

/// Where a command finds the socket on which it says that it is ready.
pub const READY_SOCKET: &str = "/run/nomad-notify";

/// The number of the descriptor from which systemd-nspawn reads a credential, given its index: behind those of the container init, and open
/// until systemd-nspawn closes what it does not pass on.
pub fn descriptor_of_credential(index: usize) -> usize {
    /// Those before are the standard streams.
    const FIRST_PASSED: usize = 3;
    FIRST_PASSED + nspawn_init::DESCRIPTORS as usize + index
}

/// The properties of the host that the command line depends on.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The systemd version of systemd-nspawn.
    pub version: u32,
    /// The cgroup layout of the host.
    pub cgroup: CgroupLayout,
}

/// A mount, and whether it gets the container's id mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Source and target of the mount.
    pub mount: Mount,
    /// Host id n is container id n, although the container's ids are shifted. Needs a file system that supports id
    /// mapping.
    pub idmap: bool,
}

/// What to start: arguments and the complete environment of the process, and the spec of the container init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// The arguments, without the program's name.
    pub arguments: Vec<String>,
    /// The environment. Values are secrets.
    pub environment: BTreeMap<String, String>,
    /// The spec of the driver's own container init. `None` in a booted container, which runs the image's init instead.
    pub init: Option<nspawn_init::InitSpec>,
}

/// What the installed systemd-nspawn can't do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// It has no option for a setting of the job.
    #[error("{option} needs systemd-nspawn {needs} or later, and this host has {has}")]
    Option {
        /// The option of the job.
        option: &'static str,
        /// The first version that has it.
        needs: u32,
        /// The installed version.
        has: u32,
    },
    /// This version can pass a variable only as an argument, which can't carry this value. systemd-nspawn would reject
    /// the argument and print the value.
    #[error(
        "the environment variable {name} of a booted container has to be passed as an argument to systemd-nspawn {version}, and its value {why}"
    )]
    Value {
        /// The name of the variable.
        name: String,
        /// The installed version.
        version: u32,
        /// What is wrong with the value, and what is allowed.
        why: String,
    },
}

/// The command line for this container, with `root` in place of the spec's root (it may have been prepared) and `binds`
/// in place of its mounts.
pub fn command_line(
    spec: &ContainerSpec,
    root: &Root,
    binds: &[Bind],
    host: Target,
) -> Result<CommandLine, Unsupported> {
    let mut builder = CommandBuilder::new(host);
    builder.fixed(&spec.resources);
    builder.flag("--machine", &spec.identity.machine);
    // An id that the image has takes precedence.
    builder.flag("--uuid", &machine_id::of(spec.identity.owner()));
    builder.root(root);
    builder.rootfs(&spec.rootfs);
    builder.users(&spec.users)?;
    builder.network(&spec.network);
    builder.rlimits(&spec.resources.rlimits);
    for bind in binds {
        builder.bind(bind);
    }
    for tmpfs in &spec.tmpfs {
        builder.tmpfs(tmpfs);
    }
    builder.payload(&spec.payload);
    builder.credentials(&spec.payload.credentials);
    let init = init(&spec.payload);
    if init.is_none() {
        builder.variables(&spec.payload.environment)?;
    }
    builder.arguments.push("--".to_owned());
    match &init {
        None => builder
            .arguments
            .extend(spec.payload.command.iter().cloned()),
        Some(_) => builder.arguments.push(nspawn_init::PROGRAM.to_owned()),
    }
    Ok(CommandLine {
        arguments: builder.arguments,
        environment: builder.environment,
        init,
    })
}

/// The spec of the driver's container init: the command and everything else that systemd-nspawn would show to the whole
/// host.
fn init(payload: &Payload) -> Option<nspawn_init::InitSpec> {
    let mode = match payload.mode {
        Mode::Boot => return None,
        Mode::ProcessTwo => nspawn_init::InitMode::Init,
        Mode::Plain => nspawn_init::InitMode::Launcher,
    };
    let mut environment = payload.environment.clone();
    if matches!(payload.readiness, Readiness::Notify(_)) {
        environment.insert("NOTIFY_SOCKET".to_owned(), READY_SOCKET.to_owned());
    }
    Some(nspawn_init::InitSpec {
        mode,
        command: payload.command.clone(),
        environment: environment.into_iter().collect(),
        directory: payload.working_directory.clone(),
        // With a terminal, systemd-nspawn copies the command's output from there.
        streams: matches!(payload.console, Console::Pipe | Console::Autopipe),
        filters: Vec::new(),
    })
}

struct CommandBuilder {
    host: Target,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
}

impl CommandBuilder {
    fn new(host: Target) -> Self {
        let mut environment = BTreeMap::from([
            (
                "PATH".to_owned(),
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            ),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("SYSTEMD_LOG_TARGET".to_owned(), "console".to_owned()),
            ("SYSTEMD_LOG_COLOR".to_owned(), "0".to_owned()),
        ]);
        if host.cgroup == CgroupLayout::V2 && !Feature::UnifiedOnly.is_in(host.version) {
            // Otherwise an image without systemd gets cgroup v1 mounts, which this host does not have.
            environment.insert(
                "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY".to_owned(),
                "1".to_owned(),
            );
        }
        Self {
            host,
            arguments: Vec::new(),
            environment,
        }
    }

    fn flag(&mut self, name: &str, value: &str) {
        self.arguments.push(format!("{name}={value}"));
    }

    fn switch(&mut self, name: &str, on: bool) {
        if on {
            self.arguments.push(name.to_owned());
        }
    }

    fn rootfs(&mut self, rootfs: &Rootfs) {
        self.switch("--ephemeral", rootfs.ephemeral);
        self.switch("--read-only", rootfs.read_only);
        match rootfs.volatile {
            Volatile::No => {}
            Volatile::Yes => self.flag("--volatile", "yes"),
            Volatile::State => self.flag("--volatile", "state"),
            Volatile::Overlay => self.flag("--volatile", "overlay"),
        }
        if let Some(roots) = &rootfs.pivot_root {
            self.flag("--pivot-root", roots);
        }
    }

    fn users(&mut self, users: &Users) -> Result<(), Unsupported> {
        let Users::Private { range, ownership } = users else {
            // Set explicitly, because a later version may change the default.
            self.flag("--private-users", "no");
            return Ok(());
        };
        match range.as_str() {
            "identity" => self.needs("private_users = \"identity\"", Feature::IdentityRange)?,
            "managed" => self.needs("private_users = \"managed\"", Feature::ManagedRange)?,
            _ => {}
        }
        self.flag("--private-users", range);
        match ownership.as_deref() {
            None => {}
            Some(how) if Feature::Ownership.is_in(self.host.version) => {
                self.flag("--private-users-ownership", how)
            }
            // Older versions only support chown, and do it by default for a picked range.
            Some("chown") => self.switch("--private-users-chown", true),
            Some("map") => self.needs("private_users_ownership = \"map\"", Feature::Ownership)?,
            Some(_) => {}
        }
        Ok(())
    }

    fn needs(&self, option: &'static str, feature: Feature) -> Result<(), Unsupported> {
        let has = self.host.version;
        match feature.is_in(has) {
            true => Ok(()),
            false => Err(Unsupported::Option {
                option,
                needs: feature.since(),
                has,
            }),
        }
    }

    /// What is the same for all containers.
    fn fixed(&mut self, resources: &Resources) {
        self.flag("--settings", "no");
        self.switch("--keep-unit", true);
        self.flag("--register", "no");
        self.flag("--link-journal", "no");
        // It has that value already, from the exec shim: in a user namespace systemd-nspawn (252) may not change it, and then only checks it.
        self.flag("--oom-score-adjust", &resources.oom_score_adj.to_string());
    }

    fn root(&mut self, root: &Root) {
        match root {
            Root::Directory(path) => self.flag("--directory", &text(path)),
            Root::Image(path) => self.flag("--image", &text(path)),
        }
    }

    fn network(&mut self, network: &Network) {
        // Otherwise it is the machine name.
        if let Some(host_name) = &network.host_name {
            self.flag("--hostname", &host_name.name);
        }
        if let Some(mode) = &network.resolv_conf {
            self.flag("--resolv-conf", mode);
        }
        // systemd-nspawn must not join the namespace: it rejects one together with a user namespace. It is started
        // inside the namespace and does not know about it.
        let NetworkNamespace::Private { interfaces, .. } = &network.namespace else {
            return;
        };
        // The driver makes the link and forwards the ports.
        self.switch("--private-network", true);
        for interface in interfaces {
            let option = match interface.mode {
                InterfaceMode::Macvlan => "--network-macvlan",
                InterfaceMode::Ipvlan => "--network-ipvlan",
                InterfaceMode::Moved => "--network-interface",
            };
            self.flag(option, &interface.name);
        }
    }

    /// Without these the payload gets the kernel's defaults, not those of the caller.
    fn rlimits(&mut self, rlimits: &[Rlimit]) {
        let text = |limit: Option<u64>| {
            limit.map_or_else(|| "infinity".to_owned(), |number| number.to_string())
        };
        for Rlimit { name, soft, hard } in rlimits {
            let limit = format!("RLIMIT_{name}={}:{}", text(*soft), text(*hard));
            self.flag("--rlimit", &limit);
        }
    }

    fn bind(&mut self, bind: &Bind) {
        let flag = if bind.mount.read_only {
            "--bind-ro"
        } else {
            "--bind"
        };
        let mapping = if bind.idmap { ":rbind,idmap" } else { "" };
        let paths = format!(
            "{}:{}",
            escape(&bind.mount.source),
            escape(&bind.mount.target)
        );
        self.flag(flag, &format!("{paths}{mapping}"));
    }

    /// In a user namespace systemd-nspawn adds the owner.
    fn tmpfs(&mut self, tmpfs: &Tmpfs) {
        let mut options = vec![format!("mode={:04o}", tmpfs.mode)];
        options.extend(tmpfs.size.map(|size| format!("size={size}")));
        let Restrictions {
            nosuid,
            nodev,
            noexec,
        } = tmpfs.restrictions;
        let words = [
            ("ro", tmpfs.read_only),
            ("nosuid", nosuid),
            ("nodev", nodev),
            ("noexec", noexec),
        ];
        let set = words.iter().filter(|(_, set)| *set);
        options.extend(set.map(|(word, _)| (*word).to_owned()));
        let value = format!("{}:{}", escape(&tmpfs.target), options.join(","));
        self.flag("--tmpfs", &value);
    }

    fn payload(&mut self, payload: &Payload) {
        if !payload.capabilities.is_empty() {
            self.flag("--capability", &payload.capabilities.join(","));
        }
        self.switch("--boot", payload.mode == Mode::Boot);
        let console = match payload.console {
            Console::Interactive => "interactive",
            Console::ReadOnly | Console::Relayed => "read-only",
            Console::Passive => "passive",
            Console::Pipe => "pipe",
            Console::Autopipe => "autopipe",
        };
        self.flag("--console", console);
        let awaits_system = matches!(payload.readiness, Readiness::Notify(_));
        if awaits_system && payload.mode == Mode::Boot {
            // Otherwise systemd-nspawn says READY=1 itself as soon as it has started PID 1.
            self.flag("--notify-ready", "yes");
        }
        if payload.console == Console::Relayed {
            // A login prompt in a log serves nobody. Known since systemd 250.
            self.flag("--setenv", "SYSTEMD_GETTY_AUTO=0");
        }
        self.switch("--quiet", true);
        if let (Mode::Boot, Some(directory)) = (payload.mode, &payload.working_directory) {
            self.flag("--chdir", directory);
        }
        if let Some(user) = &payload.user {
            // Not --user: the meaning of that option changed in 261.
            self.arguments.extend(["-u".to_owned(), user.clone()]);
        }
    }

    /// The files are not named: systemd-nspawn would follow links, and read whatever a task has put there.
    fn credentials(&mut self, credentials: &[Credential]) {
        for (index, credential) in credentials.iter().enumerate() {
            let descriptor = descriptor_of_credential(index);
            let name = credential.name.replace('\\', "\\\\");
            let value = format!("{name}:/proc/self/fd/{descriptor}");
            self.flag("--load-credential", &value);
        }
    }

    fn variables(&mut self, variables: &BTreeMap<String, String>) -> Result<(), Unsupported> {
        for (name, value) in variables {
            if Feature::HiddenValues.is_in(self.host.version) && safe_for_nspawn_env(name) {
                self.flag("--setenv", name);
                self.environment.insert(name.clone(), value.clone());
                continue;
            }
            let assignment = format!("{name}={value}");
            if let Some(why) = unfit_argument(&assignment, value, self.host.version) {
                return Err(Unsupported::Value {
                    name: name.clone(),
                    version: self.host.version,
                    why,
                });
            }
            self.flag("--setenv", &assignment);
        }
        Ok(())
    }
}

/// The longest single argument that the kernel passes to a program, without the terminating NUL.
const ARGUMENT_MAX: usize = 128 * 1024 - 1;

/// Why a variable can't be an argument of this version, which checks its arguments.
fn unfit_argument(assignment: &str, value: &str, version: u32) -> Option<String> {
    let length = "--setenv=".len() + assignment.len();
    if length > ARGUMENT_MAX {
        let most = ARGUMENT_MAX - "--setenv=".len();
        let has = assignment.len();
        return Some(format!(
            "has {has} bytes including its name; at most {most} are allowed"
        ));
    }
    if value.chars().any(is_noncharacter) {
        return Some(
            "contains a Unicode noncharacter (such as U+FFFE); all other characters are allowed"
                .to_owned(),
        );
    }
    let control = |char: char| char.is_ascii_control() && !matches!(char, '\t' | '\n');
    if !Feature::ControlCharacters.is_in(version) && value.chars().any(control) {
        let since = Feature::ControlCharacters.since();
        return Some(format!(
            "contains a control character; before systemd-nspawn {since} only tab and newline are allowed"
        ));
    }
    None
}

/// systemd does not accept these as text.
fn is_noncharacter(char: char) -> bool {
    let code = u32::from(char);
    (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
}

/// Escapes a path within a bind: systemd-nspawn splits at colons, and a backslash escapes the next character.
fn escape(path: &Path) -> String {
    text(path).replace('\\', "\\\\").replace(':', "\\:")
}

/// `config` rejects every path that is not UTF-8.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
#[path = "argv_tests.rs"]
mod tests;
