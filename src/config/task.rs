//! Validates a task's `config` block against what Nomad granted and what the operator allows. This is the one place
//! where a configuration becomes a `ContainerSpec`. What depends on the version of systemd-nspawn or on the host's addresses is
//! rejected later, when the start is prepared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::container::{ContainerSpec, Description, Mode, Network, Payload};
use crate::sys::kernel;

use super::decode::quoted;
use super::description::describe;
use super::environment::{self, STRING_MAX};
use super::options::{ImageDownload, TaskOptions};
use super::paths::Allocation;
use super::resources::ResourceOptions;
use super::rootfs::RootOptions;
use super::sources::Sources;
use super::system::System;
use super::users::users;
use super::values::{self, one_of};
use super::{
    ConfigError, ImageSearchPath, PluginConfig, TaskContext, Validated, credentials, dns, identity,
    low_ports, mounts, network,
};

/// Returns the container, or the first error. Checks that need no look-up on the host come first; their order is the order in
/// which mistakes are reported.
pub(super) fn check(
    options: TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
    search_path: &ImageSearchPath,
) -> Result<Validated, ConfigError> {
    let identity = identity::identity(context)?;
    let mode = mode(&options)?;
    let root_options = RootOptions::of(&options)?;
    let (network, mut notes) = network(&options, context, plugin_config)?;
    let users = users(
        &options,
        root_options.volatile,
        &network.namespace,
        &mut notes,
    )?;
    notes.extend(low_ports::note(
        &context.ports,
        &network.namespace,
        &users,
        kernel::first_unprivileged_port(),
    ));
    let payload = payload(&options, context, mode, &network, &mut notes)?;
    if let Some(path) = &context.cgroup {
        absolute("task.cgroup", path)?;
    }
    let resources = ResourceOptions::of(&options, context, plugin_config, &network.namespace)?;
    if let Some(download) = &options.image_download {
        return Err(download_error(download));
    }
    let allocation = Allocation::of(context)?;
    let sources = Sources::new(plugin_config, &allocation);
    let (mounts, tmpfs) = mounts::mounts(&options, context, sources, &resources)?;
    let credentials =
        credentials::credentials(options.credentials.as_ref(), sources, (&mounts, &tmpfs))?;
    let mut spec = ContainerSpec {
        identity,
        description: Description::default(),
        rootfs: root_options.find(&options, (mode, &users), &allocation, search_path)?,
        mounts,
        tmpfs,
        payload: Payload {
            credentials,
            ..payload
        },
        users,
        network,
        resources: resources.find(context)?,
    };
    let mut variables = context.environment.clone();
    for (name, value) in options.environment.iter().flatten() {
        // A value that the job's option overrides may have been substituted elsewhere.
        let overridden = variables.insert(name.clone(), value.clone());
        variables.extend(overridden.map(|value| (format!("{name} of task.env"), value)));
    }
    spec.description = describe(&spec, &variables);
    Ok(Validated { spec, notes })
}

fn network(
    options: &TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
) -> Result<(Network, Vec<String>), ConfigError> {
    if let Some(word) = &options.resolv_conf {
        one_of("config.resolv_conf", word, values::RESOLV_CONF)?;
    }
    let (namespace, mut notes) = network::network(options, context, plugin_config)?;
    let network = Network {
        namespace,
        resolv_conf: options.resolv_conf.clone(),
        dns: dns::dns(&context.dns)?,
        host_name: dns::host_name(options.hostname.as_deref(), &context.host_name)?,
        extra_hosts: dns::extra_hosts(options.extra_hosts.as_deref().unwrap_or_default())?,
    };
    if let (Some(word), false) = (&network.resolv_conf, network.dns.is_empty()) {
        notes.push(format!(
            "the dns block of the network is not applied, because config.resolv_conf is {word:?}. Remove config.resolv_conf to apply it"
        ));
    }
    Ok((network, notes))
}

/// What runs in the container. Adds to `notes` what it will not get.
fn payload(
    options: &TaskOptions,
    context: &TaskContext,
    mode: Mode,
    network: &Network,
    notes: &mut Vec<String>,
) -> Result<Payload, ConfigError> {
    if let Some(path) = &options.working_directory {
        inside_as_written("config.working_directory", path)?;
    }
    let command = options.command.clone().unwrap_or_default();
    command_words(&command)?;
    let capabilities = options.capability.as_deref().unwrap_or_default();
    let stdout = stream("task.stdout_path", &context.stdout)?;
    let stderr = stream("task.stderr_path", &context.stderr)?;
    let system = System::of(options, mode, stdout.is_some() || stderr.is_some())?;
    let environment = environment(options, context, mode, network, notes)?;
    environment::check_total_size(&command, &environment)?;
    Ok(Payload {
        mode,
        command,
        environment,
        // Looked for on the host, later.
        credentials: Vec::new(),
        working_directory: options.working_directory.clone(),
        user: user(options, context, mode)?,
        capabilities: values::capabilities("config.capability", capabilities)?,
        console: system.console,
        journal: system.journal,
        readiness: system.readiness,
        stdout,
        stderr,
    })
}

fn environment(
    options: &TaskOptions,
    context: &TaskContext,
    mode: Mode,
    network: &Network,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<String, String>, ConfigError> {
    let transport = match mode {
        Mode::Boot => environment::EnvTransport::Nspawn,
        Mode::ProcessTwo | Mode::Plain => environment::EnvTransport::Init,
    };
    let ports = network::variables(&network.namespace);
    let own = options.environment.as_ref();
    let (environment, note) =
        environment::environment(&context.environment, ports, own, transport)?;
    notes.extend(note);
    Ok(environment)
}

fn mode(options: &TaskOptions) -> Result<Mode, ConfigError> {
    match (options.boot, options.process_two) {
        (true, true) => Err(ConfigError::new(
            "config.process_two",
            "true can't be combined with config.boot, which is true by default: set config.boot = false",
        )),
        (true, false) => Ok(Mode::Boot),
        (false, true) => Ok(Mode::ProcessTwo),
        (false, false) => Ok(Mode::Plain),
    }
}

/// The user that the command runs as: the driver's option overrides the task's.
fn user(
    options: &TaskOptions,
    context: &TaskContext,
    mode: Mode,
) -> Result<Option<String>, ConfigError> {
    const NAME_MAX: usize = 256;
    let (option, name) = match &options.user {
        Some(name) => ("config.user", name),
        None if context.user.is_empty() => return Ok(None),
        None => ("task.user", &context.user),
    };
    let fault = if values::has_control(name) {
        "contains a control character"
    } else if name.starts_with('-') {
        "begins with -"
    } else if name.contains(':') {
        "contains a :, but a group can't be given; systemd-nspawn looks up the groups of the user"
    } else if name.len() > NAME_MAX {
        "is longer than 256 bytes"
    } else if mode == Mode::Boot {
        "can't be combined with config.boot, which is true by default: set config.boot = false"
    } else {
        return Ok(Some(name.clone()));
    };
    Err(ConfigError::new(
        option,
        format!("{} {fault}", quoted(name)),
    ))
}

fn inside_as_written(option: &str, path: &str) -> Result<(), ConfigError> {
    absolute(option, Path::new(path))?;
    super::paths::validate_path_text(option, path)
}

fn command_words(command: &[String]) -> Result<(), ConfigError> {
    match command.iter().position(|word| word.len() > STRING_MAX) {
        None => Ok(()),
        Some(index) => Err(ConfigError::new(
            format!("config.command[{index}]"),
            format!(
                "has {} bytes; at most {STRING_MAX} are allowed",
                command[index].len()
            ),
        )),
    }
}

fn stream(option: &str, path: &Path) -> Result<Option<PathBuf>, ConfigError> {
    if path.as_os_str().is_empty() || path == Path::new("/dev/null") {
        return Ok(None);
    }
    absolute(option, path)?;
    Ok(Some(path.to_owned()))
}

fn absolute(option: &str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() {
        return Ok(());
    }
    let reason = format!(
        "{} is not an absolute path",
        quoted(&path.to_string_lossy())
    );
    Err(ConfigError::new(option, reason))
}

/// The error for an `image_download` block: the first invalid value or, if the block is valid, that downloads are not
/// implemented.
fn download_error(download: &ImageDownload) -> ConfigError {
    let option = |name| format!("config.image_download.{name}");
    if let Err(error) = one_of(&option("type"), &download.kind, values::DOWNLOAD_TYPE) {
        return error;
    }
    if let Err(error) = one_of(&option("verify"), &download.verify, values::DOWNLOAD_VERIFY) {
        return error;
    }
    let web = ["http://", "https://"];
    if download.kind != "docker" && !web.iter().any(|scheme| download.url.starts_with(scheme)) {
        let reason = format!(
            "{} does not begin with http:// or https://",
            quoted(&download.url)
        );
        return ConfigError::new(option("url"), reason);
    }
    let again = if download.force { " again" } else { "" };
    let reason = format!(
        "downloading{again} is not implemented: use a directory or a disk image on the client, or fetch a disk image in one file with an artifact block"
    );
    ConfigError::new("config.image_download", reason)
}
