//! Validates a task's `config` block against what Nomad granted and what the operator allows. This is the one place
//! where a configuration becomes a `ContainerSpec`, and the last one that rejects anything because of its value.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};

use crate::container::{
    ContainerSpec, Identity, Mode, Network, NetworkNamespace, Payload, Resources, Root, Rootfs,
    Users, Volatile,
};
use crate::rootfs_path::{Entry, RootDir, copy_place};

use super::decode::quoted;
use super::environment::{self, STRING_MAX};
use super::options::{ImageDownload, TaskOptions};
use super::paths::{Allocation, inside};
use super::values::{self, one_of};
use super::{
    ConfigError, ImageSearchPath, PluginConfig, TaskContext, Validated, identity, mounts, network,
    rootfs,
};

const EPHEMERAL: &str = "config.ephemeral";
const IMAGE: &str = "config.image";
const OWNERSHIP: &str = "config.private_users_ownership";
const PIVOT_ROOT: &str = "config.pivot_root";
const PRIVATE_USERS: &str = "config.private_users";
const VOLATILE: &str = "config.volatile";

/// Returns the container, or the first error. Checks that need no look-up on the host come first. The function is
/// longer than a screen because it is one list: each line decides one field, and the order is the order in which
/// mistakes are reported.
pub(super) fn check(
    options: TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
    search_path: &ImageSearchPath,
) -> Result<Validated, ConfigError> {
    identity::check(context)?;
    let mode = mode(&options)?;
    let user = user(&options, context, mode)?;
    let console = one_of("config.console", &options.console, values::CONSOLE)?;
    let volatile = match &options.volatile {
        None => Volatile::No,
        Some(word) => one_of(VOLATILE, word, values::VOLATILE)?,
    };
    if let Some(word) = &options.resolv_conf {
        one_of("config.resolv_conf", word, values::RESOLV_CONF)?;
    }
    if let Some(path) = &options.working_directory {
        inside_as_written("config.working_directory", path)?;
    }
    let pivot = options.pivot_root.as_deref().map(pivot_root).transpose()?;
    let capabilities = values::capabilities(
        "config.capability",
        options.capability.as_deref().unwrap_or_default(),
    )?;
    let command = options.command.clone().unwrap_or_default();
    command_words(&command)?;
    let (namespace, mut notes) = network::network(&options, context)?;
    let users = users(&options, volatile, &namespace, &mut notes)?;
    let transport = match mode {
        Mode::Boot => environment::EnvTransport::Nspawn,
        Mode::ProcessTwo | Mode::Plain => environment::EnvTransport::Init,
    };
    let (environment, note) = environment::environment(
        &context.environment,
        network::variables(&namespace),
        options.environment.as_ref(),
        transport,
    )?;
    notes.extend(note);
    environment::check_total_size(&command, &environment)?;
    let stdout = stream("task.stdout_path", &context.stdout)?;
    let stderr = stream("task.stderr_path", &context.stderr)?;
    if let Some(path) = &context.cgroup {
        absolute("task.cgroup", path)?;
    }
    if let Some(download) = &options.image_download {
        return Err(download_error(download));
    }
    let allocation = Allocation::of(context)?;
    let root = root(&options.image, &allocation, search_path)?;
    if options.ephemeral {
        copied_from(&root)?;
    }
    if let Root::Directory(path) = &root {
        validate_root(path, &options, mode, volatile, &users, pivot.as_deref())?;
    }
    let spec = ContainerSpec {
        identity: Identity {
            id: context.id.clone(),
            alloc_dir: context.alloc_dir.clone(),
            machine: identity::machine(&context.task, &context.alloc_id),
        },
        mounts: mounts::mounts(&options, context, plugin_config, &allocation)?,
        rootfs: Rootfs {
            source: root,
            ephemeral: options.ephemeral,
            read_only: options.read_only,
            volatile,
            pivot_root: options.pivot_root,
        },
        payload: Payload {
            mode,
            command,
            environment,
            working_directory: options.working_directory,
            user,
            capabilities,
            console,
            stdout,
            stderr,
        },
        users,
        network: Network {
            namespace,
            resolv_conf: options.resolv_conf,
        },
        resources: Resources {
            cgroup: context.cgroup.clone(),
        },
    };
    Ok(Validated { spec, notes })
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

/// Checks `NEW[:OLD]` and returns `NEW`.
fn pivot_root(text: &str) -> Result<PathBuf, ConfigError> {
    let (new, old) = match text.split_once(':') {
        None => (text, None),
        Some((new, old)) => (new, Some(old)),
    };
    let new = inside(PIVOT_ROOT, new)?;
    if let Some(old) = old {
        // A further colon or a backslash has a different meaning wherever this value is parsed.
        if old.contains(':') || text.contains('\\') {
            let reason = format!("{} is not NEW or NEW:OLD", quoted(text));
            return Err(ConfigError::new(PIVOT_ROOT, reason));
        }
        if inside(PIVOT_ROOT, old)? == new {
            let reason = format!(
                "{} names the same path for the new and the old root",
                quoted(text)
            );
            return Err(ConfigError::new(PIVOT_ROOT, reason));
        }
    }
    Ok(new)
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

/// The user namespace, and how the image's files get the owners of its range.
fn users(
    options: &TaskOptions,
    volatile: Volatile,
    network: &NetworkNamespace,
    notes: &mut Vec<String>,
) -> Result<Users, ConfigError> {
    let range = options.private_users.as_deref();
    let ownership = options.private_users_ownership.as_deref();
    let is_word = |range| ["yes", "no", "pick", "identity", "managed"].contains(&range);
    if let Some(range) = range.filter(|range| !is_word(*range))
        && let Some(fault) = values::uid_range_error(range)
    {
        return Err(ConfigError::new(
            PRIVATE_USERS,
            format!("{} {fault}", quoted(range)),
        ));
    }
    if let Some(word) = ownership {
        one_of(OWNERSHIP, word, values::OWNERSHIP)?;
    }
    if !options.user_namespacing {
        for (option, set) in [(PRIVATE_USERS, range), (OWNERSHIP, ownership)] {
            if set.is_some_and(|word| word != "no") {
                notes.push(format!(
                    "{option} has no effect, because config.user_namespacing is false. Remove it, or set config.user_namespacing = true"
                ));
            }
        }
        return Ok(Users::Host);
    }
    let range = range.unwrap_or("pick");
    if range == "no" {
        return Ok(Users::Host);
    }
    if range == "managed" && !matches!(network, NetworkNamespace::Private { .. }) {
        let reason = "\"managed\" needs a private network: set config.network_veth, network_zone or network_bridge";
        return Err(ConfigError::new(PRIVATE_USERS, reason));
    }
    if ownership == Some("chown") {
        let other = match volatile {
            Volatile::No => options.read_only.then_some("config.read_only"),
            _ => Some(VOLATILE),
        };
        if let Some(other) = other {
            let reason = format!("\"chown\" can't be combined with {other}");
            return Err(ConfigError::new(OWNERSHIP, reason));
        }
    }
    // With the other ranges the files of the image already have their owners.
    let mapped = range == "pick" || range.starts_with(|first: char| first.is_ascii_digit());
    let ownership = ownership.or_else(|| mapped.then_some("auto"));
    if let (true, Volatile::Yes | Volatile::State, Some("auto" | "map")) =
        (mapped, volatile, ownership)
    {
        let word = quoted(options.volatile.as_deref().unwrap_or_default());
        let reason = format!(
            "{word} can't be combined with config.user_namespacing, which is true unless it is set to false: systemd-nspawn can't map the ids \
             of a root that is put together from several mounts; set config.user_namespacing = false or use \"overlay\""
        );
        return Err(ConfigError::new(VOLATILE, reason));
    }
    Ok(Users::Private {
        range: range.to_owned(),
        ownership: ownership.map(str::to_owned),
    })
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

/// Looks up the image.
fn root(
    image: &str,
    allocation: &Allocation,
    search_path: &ImageSearchPath,
) -> Result<Root, ConfigError> {
    let path = allocation.image(IMAGE, image, search_path)?;
    let kind = path
        .metadata()
        .map_err(|error| {
            let reason = format!("{} can't be examined: {error}", quoted(image));
            ConfigError::on_host(IMAGE, reason, &error)
        })?
        .file_type();
    if kind.is_dir() {
        Ok(Root::Directory(path))
    } else if kind.is_file() || kind.is_block_device() {
        Ok(Root::Image(path))
    } else {
        let reason = format!(
            "{} is neither a directory nor a disk image nor a block device",
            quoted(image)
        );
        Err(ConfigError::new(IMAGE, reason))
    }
}

/// Checks that the copy of an ephemeral root can be written where systemd-nspawn makes it.
fn copied_from(root: &Root) -> Result<(), ConfigError> {
    let (Root::Directory(path) | Root::Image(path)) = root;
    let place = copy_place(path);
    let is_read_only =
        |found: nix::sys::statvfs::Statvfs| found.flags().contains(FsFlags::ST_RDONLY);
    // If the file system can't be queried, leave it to systemd-nspawn to reject it.
    if !statvfs(&place).is_ok_and(is_read_only) {
        return Ok(());
    }
    let shown = |path: &Path| quoted(&path.to_string_lossy());
    let reason = format!(
        "true can't be used with the image {}: its copy is made in {}, which is mounted read-only; mount it writable, or set \
         config.volatile = \"overlay\" in place of config.ephemeral",
        shown(path),
        shown(&place)
    );
    Err(ConfigError::new(EPHEMERAL, reason))
}

/// Rejects a directory that systemd-nspawn would reject as the root.
fn validate_root(
    path: &Path,
    options: &TaskOptions,
    mode: Mode,
    volatile: Volatile,
    users: &Users,
    pivot: Option<&Path>,
) -> Result<(), ConfigError> {
    if path == Path::new("/") && !options.ephemeral {
        if !matches!(volatile, Volatile::Yes | Volatile::State) {
            let reason = "\"/\" needs config.ephemeral = true, or config.volatile yes or state";
            return Err(ConfigError::new(IMAGE, reason));
        }
        // A file system that the whole host uses can't get an id mapping.
        if *users != Users::Host {
            let reason =
                "\"/\" can't be used in a user namespace: set config.user_namespacing = false";
            return Err(ConfigError::new(IMAGE, reason));
        }
    }
    let unreadable = |error: io::Error| {
        let path = quoted(&path.to_string_lossy());
        ConfigError::on_host(IMAGE, format!("{path} can't be examined: {error}"), &error)
    };
    let tree = RootDir::open(path).map_err(unreadable)?;
    let pivoted = pivot.map(|new| pivoted(&tree, new)).transpose()?;
    let (shown, top) = match &pivoted {
        None => (path.to_owned(), &tree),
        Some((below, top)) => (path.join(below), top),
    };
    if let Some(missing) = rootfs::missing_os_files(top, mode).map_err(unreadable)? {
        let hint = match mode {
            Mode::Boot => "; to run a command instead of an init, set config.boot = false",
            Mode::ProcessTwo | Mode::Plain => "",
        };
        let reason = format!(
            "{} contains no operating system: it lacks {missing}{hint}",
            quoted(&shown.to_string_lossy())
        );
        return Err(ConfigError::new(IMAGE, reason));
    }
    let bin = tree.lookup(Path::new("bin")).map_err(unreadable)?;
    if volatile == Volatile::Yes && bin.is_some_and(|bin| bin.metadata().is_dir()) {
        let reason =
            "\"yes\" needs an image whose /bin is a symbolic link into /usr; use state or overlay";
        return Err(ConfigError::new(VOLATILE, reason));
    }
    Ok(())
}

/// The directory of the image that becomes the root, by its path below the image's.
fn pivoted(tree: &RootDir, new: &Path) -> Result<(PathBuf, RootDir), ConfigError> {
    let shown = quoted(&new.to_string_lossy());
    let found = tree.resolve(new).map_err(|error| {
        let reason = format!("{shown} can't be examined in the image: {error}");
        ConfigError::on_host(PIVOT_ROOT, reason, &error)
    })?;
    let directory = found.entry.and_then(Entry::into_root);
    directory.map(|root| (found.below, root)).ok_or_else(|| {
        let reason = format!("{shown} is not a directory of the image");
        ConfigError::new(PIVOT_ROOT, reason)
    })
}
