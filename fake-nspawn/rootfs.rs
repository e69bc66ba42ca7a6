//! The checks of the real tool that need the file system: whether there is a tree, whether every mount point can be created, who the user
//! is, where the command starts. Creates missing mount points in a writable tree, as the real tool does, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use crate::options::{Mode, Mount, Options, Refusal, Users, Volatile};
use crate::scenario::Scenario;

/// A call that can be started.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The tree; `None` for an image, which the fake can't read.
    pub(crate) root: Option<PathBuf>,
    /// The machine's name.
    pub(crate) machine: String,
    /// The environment of the payload, in the real tool's order.
    pub(crate) environment: Vec<(String, String)>,
    /// An identity that no other container has at the same time; empty if it is the tree's.
    pub(crate) own_uuid: String,
    /// The host's directory in which the payload starts, or the error: the real tool notices it only after it has announced the container.
    pub(crate) cwd: Result<PathBuf, String>,
}

/// Makes all checks, in the real tool's order.
pub(crate) fn prepare(options: &Options, scenario: &Scenario) -> Result<Prepared, Refusal> {
    if scenario.version >= 258 && scenario.legacy_cgroups {
        return Err(Refusal {
            message: "Unified cgroup hierarchy is required, refusing.".to_owned(),
            errno: 95,
        });
    }
    let mut files = options.credential_files.iter();
    if let Some((_, file)) = files.find(|(_, file)| !Path::new(file).exists()) {
        return Err(missing(format!("Failed to read credential '{file}'")));
    }
    let root = root(options)?;
    if let Some(root) = &root {
        check_root(options, root)?;
    }
    check_mounts(options, root.as_deref())?;
    if (options.register || !options.keep_unit) && !scenario.bus {
        return Err(missing("Failed to open system bus"));
    }
    check_network(options)?;
    let machine = machine_name(options, root.as_deref());
    let stored = stored_identity(root.as_deref());
    let random = || {
        fs::read_to_string("/proc/sys/kernel/random/uuid")
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let own_uuid = match &stored {
        None => options.uuid.clone().unwrap_or_else(random),
        Some(_) => String::new(),
    };
    let uuid = stored.unwrap_or_else(|| own_uuid.clone());
    let home = home(options, root.as_deref())?;
    let environment = environment(options, &uuid, &home);
    let cwd = cwd(options, root.as_deref());
    Ok(Prepared {
        root,
        machine,
        environment,
        own_uuid,
        cwd,
    })
}

fn missing(message: impl std::fmt::Display) -> Refusal {
    Refusal {
        message: format!("{message}: No such file or directory"),
        errno: 2,
    }
}

fn root(options: &Options) -> Result<Option<PathBuf>, Refusal> {
    if let Some(template) = options.template.as_deref() {
        let there = options
            .directory
            .as_deref()
            .is_some_and(|directory| Path::new(directory).exists());
        if !there && !Path::new(template).exists() {
            return Err(missing(format!("Failed to resolve path {template}")));
        }
        if there || options.directory.is_none() {
            let shown = options.directory.clone().unwrap_or_else(|| ".".to_owned());
            let shown = fs::canonicalize(&shown).unwrap_or_default();
            notice(&format!(
                "Directory {} already exists, not populating from template {template}.",
                shown.display()
            ));
        } else {
            // Nothing is copied here: the template itself serves as its copy.
            return Ok(fs::canonicalize(template).ok());
        }
    }
    if let Some(image) = &options.image {
        let found = fs::canonicalize(image);
        return found
            .map(|_| None)
            .map_err(|_| missing(format!("Failed to resolve path {image}")));
    }
    if let Some(directory) = &options.directory {
        let found = fs::canonicalize(directory)
            .map_err(|_| missing(format!("Failed to resolve path {directory}")))?;
        return Ok(Some(found));
    }
    if let Some(machine) = &options.machine {
        let places = [
            "/etc/machines",
            "/run/machines",
            "/var/lib/machines",
            "/var/lib/container",
            "/usr/lib/machines",
        ];
        let found = places
            .iter()
            .map(|place| Path::new(place).join(machine))
            .find(|path| path.is_dir());
        let raw = || {
            Path::new("/var/lib/machines")
                .join(format!("{machine}.raw"))
                .exists()
        };
        return match found {
            Some(found) => Ok(Some(found)),
            None if raw() => Ok(None),
            None => Err(Refusal {
                message: format!("No image for machine '{machine}'."),
                errno: 2,
            }),
        };
    }
    let current = std::env::current_dir();
    current
        .map(Some)
        .map_err(|_| missing("Failed to determine current directory"))
}

#[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
fn notice(words: &str) {
    eprintln!("{words}");
}

fn check_root(options: &Options, root: &Path) -> Result<(), Refusal> {
    let state = matches!(options.volatile, Volatile::Yes | Volatile::State);
    if root == Path::new("/") && !options.ephemeral && !state {
        return Err(Refusal::invalid(
            "Spawning container on root directory is not supported. Consider using --ephemeral, --volatile=yes or --volatile=state.",
        ));
    }
    let new_root = options
        .pivot_root
        .as_deref()
        .map_or_else(|| root.to_owned(), |path| inside(root, path));
    let shown = root.display();
    if options.mode == Mode::Boot {
        let unchecked = options.version >= 255
            && std::env::var("SYSTEMD_NSPAWN_CHECK_OS_RELEASE")
                .is_ok_and(|word| crate::values::boolean(&word) == Some(false));
        let known = ["etc/os-release", "usr/lib/os-release"]
            .iter()
            .any(|path| new_root.join(path).exists());
        if !known && !unchecked {
            return Err(Refusal::invalid(format!(
                "Directory {shown} doesn't look like an OS root directory (os-release file is missing). Refusing."
            )));
        }
    } else if !new_root.join("usr").exists() {
        return Err(Refusal::invalid(format!(
            "Directory {shown} doesn't look like it has an OS tree (/usr/ directory is missing). Refusing."
        )));
    }
    let split = |name: &&str| {
        root.join(name)
            .symlink_metadata()
            .is_ok_and(|found| !found.is_symlink())
    };
    if options.volatile == Volatile::Yes && ["bin", "sbin", "lib", "lib64"].iter().any(split) {
        return Err(Refusal::invalid(
            "Sorry, --volatile=yes mode is not supported with OS images that have not merged /bin/, /sbin/, /lib/, /lib64/ into /usr/. Please work with your distribution and help them adopt the merged /usr scheme.\nShort read while reading cgroup mode (0 bytes). The child is most likely dead.",
        ));
    }
    check_mapping(options)
}

/// A root that is composed of several mounts can't be id-mapped, which the real tool notices in its child. Observed with a picked range.
fn check_mapping(options: &Options) -> Result<(), Refusal> {
    let several = matches!(options.volatile, Volatile::Yes | Volatile::State);
    let mapped = matches!(options.ownership.as_deref(), Some("map" | "auto"));
    if several && options.users == Users::Pick && mapped && options.version >= 249 {
        return Err(Refusal {
            message: "Failed to set up ID mapped mounts: Device or resource busy\nShort read while reading cgroup mode (0 bytes). The child is most likely dead.".to_owned(),
            errno: 16,
        });
    }
    Ok(())
}

fn inside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn check_network(options: &Options) -> Result<(), Refusal> {
    if let Some(path) = &options.network_namespace {
        if !Path::new(path).exists() {
            let shown = std::path::absolute(path).unwrap_or_default();
            return Err(missing(format!("Cannot open file {}", shown.display())));
        }
        let namespace = fs::read_link(path)
            .is_ok_and(|target| target.to_string_lossy().starts_with("net:"))
            || nix::sys::statfs::statfs(path.as_str())
                .is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC);
        if !namespace {
            let message = format!("Path {path} doesn't refer to a network namespace, refusing.");
            return Err(Refusal::invalid(message));
        }
    }
    let there = |name: &str| Path::new("/sys/class/net").join(name).exists();
    if let Some(name) = options.interfaces.iter().find(|name| !there(name)) {
        return Err(Refusal {
            message: format!("Failed to get device {name}: No such device"),
            errno: 19,
        });
    }
    match &options.bridge {
        Some(bridge) if !there(bridge) => {
            let machine = options.machine.as_deref().unwrap_or("machine");
            let message =
                format!("Failed to add interface vb-{machine} to bridge {bridge}: No such device");
            Err(Refusal { message, errno: 19 })
        }
        _ => Ok(()),
    }
}

fn check_mounts(options: &Options, root: Option<&Path>) -> Result<(), Refusal> {
    for mount in &options.mounts {
        let Mount::Bind { source, .. } = mount else {
            continue;
        };
        let host = source
            .strip_prefix('+')
            .map(|path| root.map_or_else(|| path.into(), |root| inside(root, path)));
        let host = host.unwrap_or_else(|| PathBuf::from(source));
        if !source.is_empty() && !host.exists() {
            return Err(missing(format!("Failed to stat {}", host.display())));
        }
    }
    let Some(root) = root else { return Ok(()) };
    check_base(options, root)?;
    let mut mounts: Vec<_> = options.mounts.iter().collect();
    mounts.sort_by_key(|mount| mount.destination().to_owned());
    let mut covered: Vec<&str> = vec!["/tmp", "/run", "/dev", "/proc", "/sys"];
    if options.volatile == Volatile::State {
        covered.push("/var");
    }
    for mount in mounts {
        let destination = mount.destination();
        let below = |top: &&str| Path::new(destination).starts_with(top);
        if !covered.iter().any(below) {
            check_mount(options, root, mount)?;
        }
        covered.push(destination);
    }
    Ok(())
}

/// The directories that the real tool mounts over but can't create in a read-only tree.
fn check_base(options: &Options, root: &Path) -> Result<(), Refusal> {
    let needed: &[&str] = match options.volatile {
        Volatile::State => &["var", "sys", "dev", "run", "tmp", "proc"],
        Volatile::No if options.read_only => &["run", "tmp"],
        _ => &[],
    };
    match needed
        .iter()
        .map(|name| root.join(name))
        .find(|path| !path.exists())
    {
        Some(path) => Err(missing(format!(
            "Failed to mount tmpfs (type tmpfs) on {}",
            path.display()
        ))),
        None => Ok(()),
    }
}

fn check_mount(options: &Options, root: &Path, mount: &Mount) -> Result<(), Refusal> {
    let point = inside(root, mount.destination());
    let shown = point.display();
    let file = match mount {
        Mount::Bind { source, .. } => Path::new(source.trim_start_matches('+')).is_file(),
        _ => false,
    };
    if let Mount::Inaccessible { .. } = mount {
        let nodes = Path::new("/run/systemd/inaccessible");
        return if nodes.exists() && point.exists() {
            Ok(())
        } else {
            Err(missing(format!(
                "Failed to mount {}/reg (type n/a) on {shown} (MS_BIND \"\")",
                nodes.display()
            )))
        };
    }
    if point.exists() {
        let Mount::Bind { source, .. } = mount else {
            return Ok(());
        };
        if file && point.is_dir() {
            return Err(Refusal::invalid(format!(
                "Cannot bind mount file {source} on directory {shown}."
            )));
        }
        if !file && point.is_file() {
            return Err(Refusal::invalid(format!(
                "Cannot bind mount directory {source} on file {shown}."
            )));
        }
    } else if options.read_only && !matches!(options.volatile, Volatile::Yes | Volatile::Overlay) {
        let message = match mount {
            Mount::Tmpfs { .. } => {
                format!("Creating mount point for tmpfs {shown} failed: Read-only file system")
            }
            Mount::Overlay { .. } => {
                format!("Creating mount point for overlay {shown} failed: Read-only file system")
            }
            _ => format!("Failed to create mount point {shown}: Read-only file system"),
        };
        return Err(Refusal { message, errno: 30 });
    } else if !options.read_only && !options.ephemeral {
        create(&point, file).map_err(|error| Refusal {
            message: format!("Failed to create mount point {shown}: {error}"),
            errno: error.raw_os_error().unwrap_or(5),
        })?;
    }
    match mount {
        Mount::Bind { mapped: true, .. } if options.users == Users::No => {
            Err(Refusal::invalid(format!(
                "Failed to write UID map: Invalid argument\nFailed to map ids for bind mount {shown}: Invalid argument"
            )))
        }
        _ => Ok(()),
    }
}

fn create(point: &Path, file: bool) -> std::io::Result<()> {
    if !file {
        return fs::create_dir_all(point);
    }
    if let Some(parent) = point.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(point).map(drop)
}

fn machine_name(options: &Options, root: Option<&Path>) -> String {
    let last = || {
        let path = root.or_else(|| options.image.as_deref().map(Path::new));
        let name = path
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_default().replace(
            |letter: char| !letter.is_ascii_alphanumeric() && letter != '.',
            "-",
        )
    };
    options.machine.clone().unwrap_or_else(last)
}

/// The machine id of the tree, which takes precedence over `--uuid`.
fn stored_identity(root: Option<&Path>) -> Option<String> {
    let text = fs::read_to_string(root?.join("etc/machine-id")).ok()?;
    crate::values::uuid(text.trim()).ok()
}

/// Name and home directory of the user.
fn home(options: &Options, root: Option<&Path>) -> Result<(String, String), Refusal> {
    let wanted = match options.user.as_deref() {
        None | Some("root" | "0") => return Ok(("root".to_owned(), "/root".to_owned())),
        Some(user) => user,
    };
    let unknown = || {
        Refusal::invalid(format!(
            "Failed to resolve user {wanted}.\nChild died too early."
        ))
    };
    let root = root.ok_or_else(unknown)?;
    // The real tool runs the tree's own getent.
    if !["bin/getent", "usr/bin/getent"]
        .iter()
        .any(|path| root.join(path).exists())
    {
        return Err(unknown());
    }
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap_or_default();
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&wanted) || fields.get(2) == Some(&wanted))
        .and_then(|fields| Some(((*fields.first()?).to_owned(), (*fields.get(5)?).to_owned())))
        .ok_or_else(unknown)
}

fn environment(
    options: &Options,
    uuid: &str,
    (user, home): &(String, String),
) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut put = |name: &str, value: &str| all.push((name.to_owned(), value.to_owned()));
    put(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    put("container", "systemd-nspawn");
    if let Ok(term) = std::env::var("TERM") {
        put("TERM", &term);
    }
    put("HOME", home);
    put("USER", user);
    put("LOGNAME", user);
    put("container_uuid", uuid);
    if let Some(count) = passed_descriptors() {
        put("LISTEN_FDS", &count.to_string());
        put("LISTEN_PID", "1");
    }
    put("NOTIFY_SOCKET", "/run/host/notify");
    if options.mode != Mode::Boot {
        put("LANG", "C.UTF-8");
    }
    let release = ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok());
    let release = release.unwrap_or_default();
    for (field, name) in [
        ("BUILD_ID", "container_host_build_id"),
        ("VARIANT_ID", "container_host_variant_id"),
        ("VERSION_ID", "container_host_version_id"),
        ("ID", "container_host_id"),
    ] {
        let value = release
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix('='));
        if let Some(value) = value {
            put(name, value.trim_matches('"'));
        }
    }
    for (name, value) in &options.environment {
        all.retain(|(known, _)| known != name);
        all.push((name.clone(), value.clone()));
    }
    all
}

/// The number of descriptors from 3 on that nspawn was given to pass through.
pub(crate) fn passed_descriptors() -> Option<i32> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let count = number("LISTEN_FDS").filter(|count| *count > 0)?;
    (number("LISTEN_PID")? == std::process::id()).then(|| i32::try_from(count).ok())?
}

fn cwd(options: &Options, root: Option<&Path>) -> Result<PathBuf, String> {
    let slash = PathBuf::from("/");
    let (Some(wanted), Some(root)) = (options.chdir.as_deref(), root) else {
        return Ok(slash);
    };
    let bound = options.mounts.iter().filter_map(|mount| match mount {
        Mount::Bind {
            source,
            destination,
            ..
        } if Path::new(source).is_absolute() => {
            let below = Path::new(wanted).strip_prefix(destination).ok()?;
            Some((destination.len(), Path::new(source).join(below)))
        }
        Mount::Tmpfs { destination } => {
            (destination == wanted).then(|| (destination.len(), slash.clone()))
        }
        _ => None,
    });
    let deepest = bound
        .max_by_key(|(length, _)| *length)
        .map(|(_, path)| path);
    let made = ["/", "/tmp", "/run", "/dev", "/dev/shm", "/proc", "/sys"]
        .contains(&wanted.trim_end_matches('/'));
    let mapped = match deepest {
        Some(path) => path,
        None if made => slash,
        None => inside(root, wanted),
    };
    if mapped.is_dir() {
        return Ok(mapped);
    }
    Err(format!(
        "Failed to change to specified working directory {wanted}: No such file or directory"
    ))
}
