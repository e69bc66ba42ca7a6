//! Validates the devices that a container may use: those of Nomad's device plugins and those that the job names. The nodes are looked up
//! last.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::container::Device;

use super::decode::{entry, quoted};
use super::options::{DeviceOptions, TaskOptions};
use super::paths::{inside, validate_path_text};
use super::{AllocatedDevice, ConfigError, PluginConfig, TaskContext};

const DEVICES: &str = "config.devices";
/// Names below `/dev` that systemd-nspawn makes in every container: nodes, links, and directories with a file system of their own.
const TAKEN: &[&str] = &[
    "console",
    "core",
    "fd",
    "full",
    "hugepages",
    "mqueue",
    "null",
    "ptmx",
    "pts",
    "random",
    "shm",
    "stderr",
    "stdin",
    "stdout",
    "tty",
    "urandom",
    "zero",
];

/// A device whose node is not looked up yet.
#[derive(Debug)]
pub(super) struct RequestedDevice {
    /// The option of its host path.
    option: String,
    /// `host` is the path as it was written.
    device: Device,
}

impl RequestedDevice {
    /// The option of its host path, and its path in the container.
    pub(super) fn target(&self) -> (&str, &Path) {
        (&self.option, &self.device.container)
    }
}

/// The devices of device plugins, then those of the job.
pub(super) fn devices(
    options: &TaskOptions,
    context: &TaskContext,
    plugin_config: &PluginConfig,
) -> Result<Vec<RequestedDevice>, ConfigError> {
    let named = options.devices.as_deref().unwrap_or_default();
    if !named.is_empty() && !plugin_config.devices {
        let reason = "devices of the host are disabled on this node (plugin.devices = false)";
        return Err(ConfigError::new(DEVICES, reason));
    }
    let mut devices: Vec<RequestedDevice> = Vec::new();
    let own = context.devices.iter().map(reserved);
    let named = named.iter().enumerate();
    for device in own.chain(named.map(|(index, device)| of_job(index, device))) {
        let device = device?;
        let target = &device.device.container;
        let twice = |earlier: &RequestedDevice| earlier.device.container == *target;
        if devices.iter().any(twice) {
            let target = quoted(&target.to_string_lossy());
            let reason = format!("{target} is already the path of another device of this task");
            return Err(ConfigError::new(device.option, reason));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn reserved(given: &AllocatedDevice) -> Result<RequestedDevice, ConfigError> {
    let option = entry("task.devices", &given.source.to_string_lossy());
    let target = match given.target.as_os_str().is_empty() {
        true => &given.source,
        false => &given.target,
    };
    let permissions = match given.permissions.as_str() {
        "" => "rwm",
        given => given,
    };
    requested([&option; 3], &given.source, target, permissions)
}

fn of_job(index: usize, given: &DeviceOptions) -> Result<RequestedDevice, ConfigError> {
    let option = |name| format!("{DEVICES}[{index}].{name}");
    let target = given.container_path.as_ref().unwrap_or(&given.host_path);
    requested(
        [
            &option("host_path"),
            &option("container_path"),
            &option("cgroup_permissions"),
        ],
        Path::new(&given.host_path),
        Path::new(target),
        &given.cgroup_permissions,
    )
}

fn requested(
    [source_option, target_option, permissions_option]: [&String; 3],
    source: &Path,
    target: &Path,
    permissions: &str,
) -> Result<RequestedDevice, ConfigError> {
    let text = source.to_string_lossy();
    validate_path_text(source_option, &text)?;
    if !source.is_absolute() {
        let reason = format!("{} is not an absolute path", quoted(&text));
        return Err(ConfigError::new(source_option, reason));
    }
    let [read, write, mknod] = access(permissions_option, permissions)?;
    Ok(RequestedDevice {
        option: source_option.clone(),
        device: Device {
            host: source.to_owned(),
            container: container_path(target_option, target)?,
            read,
            write,
            mknod,
        },
    })
}

fn container_path(option: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let text = path.to_string_lossy();
    let path = inside(option, &text)?;
    let fault = match path.strip_prefix("/dev").map(|rest| rest.iter().next()) {
        Ok(Some(first)) if TAKEN.iter().any(|taken| first == *taken) => {
            "is a path that every container has: use another one"
        }
        Ok(Some(_)) => return Ok(path),
        _ => "is not below /dev",
    };
    let reason = format!("{} {fault}", quoted(&text));
    Err(ConfigError::new(option, reason))
}

/// Whether reading, writing and making the node are allowed.
fn access(option: &str, letters: &str) -> Result<[bool; 3], ConfigError> {
    let access = ['r', 'w', 'm'].map(|letter| letters.contains(letter));
    let count = access.iter().filter(|allowed| **allowed).count();
    // Otherwise there is another letter, or one of them twice.
    if count > 0 && letters.chars().count() == count {
        return Ok(access);
    }
    let reason = format!(
        "{} is not one or more of the letters r, w and m, each at most once",
        quoted(letters)
    );
    Err(ConfigError::new(option, reason))
}

impl RequestedDevice {
    /// The device with its node, links followed. Fails if it is not a device.
    pub(super) fn find(self) -> Result<Device, ConfigError> {
        let Self { option, device } = self;
        let text = quoted(&device.host.to_string_lossy());
        let not_examined = |error: io::Error| {
            let reason = format!("{text} can't be examined: {error}");
            match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    ConfigError::new(&option, format!("{text} does not exist"))
                }
                _ => ConfigError::on_host(&option, reason, &error),
            }
        };
        let host = device.host.canonicalize().map_err(not_examined)?;
        // Not through the path as it was written, which could lead elsewhere by now.
        let kind = host.symlink_metadata().map_err(not_examined)?.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            validate_path_text(&option, &host.to_string_lossy())?;
            return Ok(Device { host, ..device });
        }
        let reason = match kind.is_dir() {
            true => format!("{text} is a directory: name each device in it"),
            false => format!("{text} is neither a character device nor a block device"),
        };
        Err(ConfigError::new(option, reason))
    }
}
