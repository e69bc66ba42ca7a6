//! The cgroups of one start and their settings: planned by the plugin, carried out by the supervisor, which also reports what the
//! kernel refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::SUBTREE;
use super::device_policy::DevicePolicy;
use super::devices::DeviceRules;
use super::group::{Group, retry_raced};
use super::layout::{Layout, Place};
use super::limits::{self, Limit, Setting, Unenforced};
use crate::container::Resources;

/// The controllers that a cgroup of a container gets in cgroup v2, where the host has them. `io` is for the systemd in a container.
const DELEGATED: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// What is done to the cgroups of a start, besides making the one in which its processes are tracked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// In cgroup v2: the cgroups above that of the start, from the top on, which have to pass `enable` on.
    #[serde(default)]
    above: Vec<PathBuf>,
    /// The controllers to enable.
    #[serde(default)]
    enable: Vec<String>,
    /// In cgroup v1: the cgroup of the start in the hierarchy of each controller.
    #[serde(default)]
    pub controllers: BTreeMap<String, PathBuf>,
    /// Written before systemd-nspawn is started.
    #[serde(default)]
    before: Vec<Setting>,
    /// Written when the container is up.
    #[serde(default)]
    up: Vec<Setting>,
    /// Which devices the container may use. None in a launch spec of an earlier driver.
    #[serde(default)]
    devices: Option<DevicePolicy>,
    /// The file that counts OOM kills.
    #[serde(default)]
    pub oom: Option<PathBuf>,
    /// Whether a limit that can't be enforced fails the start.
    #[serde(default)]
    pub required: bool,
}

impl CgroupPlan {
    /// The plan of a start in this place, and the limits for which this host has no controller.
    pub fn new(
        layout: &Layout,
        place: &Place,
        resources: &Resources,
        devices: &DeviceRules,
    ) -> (Self, Vec<Unenforced>) {
        let version_2 = layout.version_2_controllers();
        let enable = DELEGATED.iter().map(|name| (*name).to_owned());
        let enable: Vec<String> = enable.filter(|name| version_2.contains(name)).collect();
        let mut settings = limits::settings(place, &version_2, resources);
        let devices = DevicePolicy::new(place, devices)
            .map_err(|unenforced| settings.unenforced.push(unenforced))
            .ok();
        let above = match enable.is_empty() {
            true => Vec::new(),
            false => above(layout, &place.tracking.group),
        };
        let plan = Self {
            above,
            oom: oom_counter(place, &version_2),
            enable,
            controllers: place.controllers.clone(),
            before: settings.before,
            up: settings.up,
            devices,
            required: resources.required,
        };
        (plan, settings.unenforced)
    }

    /// Every cgroup of cgroup v1, once: two controllers may share a hierarchy.
    pub fn joined(&self) -> BTreeSet<&PathBuf> {
        self.controllers.values().collect()
    }

    /// Makes the cgroup in which the processes of the start are tracked, and those of the controllers, and writes the limits. Returns
    /// those that the kernel refuses.
    pub fn create(&self, tracking: &Path) -> io::Result<Vec<Unenforced>> {
        let refused = self.create_tracking(tracking)?;
        for group in self.joined() {
            if group.file_name() == tracking.file_name() {
                Group::new(group).create()?;
                make_visible(group)?;
                if self.controllers.get("cpuset") == Some(group) {
                    inherit_cores(group)?;
                }
            }
        }
        let mut refused = written(&self.before, &refused);
        refused.extend(self.devices.as_ref().and_then(|it| it.enforce().err()));
        Ok(refused)
    }

    /// Makes the cgroup, with controllers. Starts over if another start removes an empty parent in between, because the next parent
    /// of that name has no controllers.
    fn create_tracking(&self, tracking: &Path) -> io::Result<Vec<(String, String)>> {
        retry_raced(|| {
            if let Some(parent) = tracking.parent() {
                Group::new(parent).create()?;
            }
            let refused = self.enable_controllers();
            match fs::create_dir(tracking) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => make_visible(tracking)?,
            }
            Ok(refused)
        })
    }

    /// Passes the controllers on from the top to the cgroup of the start. Returns those that can't be, with the reason.
    fn enable_controllers(&self) -> Vec<(String, String)> {
        let mut refused = Vec::new();
        for group in &self.above {
            let file = group.join("cgroup.subtree_control");
            let enabled = fs::read_to_string(&file).unwrap_or_default();
            let enabled: BTreeSet<&str> = enabled.split_whitespace().collect();
            // One at a time: the kernel refuses all of a line for one that it can't enable.
            for controller in &self.enable {
                if enabled.contains(&**controller) {
                    continue;
                }
                if let Err(error) = write(&file, &format!("+{controller}")) {
                    let reason = format!(
                        "{controller} can't be enabled in {}: {error}",
                        file.display()
                    );
                    refused.push((controller.clone(), reason));
                }
            }
        }
        refused
    }

    /// Writes what holds for the container alone, once systemd-nspawn has made its cgroup. Returns what the kernel refuses.
    pub fn settle(&self) -> Vec<Unenforced> {
        let mut refused = written(&self.up, &[]);
        refused.extend(self.devices.as_ref().and_then(|it| it.settle().err()));
        refused
    }

    /// In cgroup v1: moves systemd-nspawn out of the cgroups whose limits are the container's alone. It would count as one of the
    /// container's processes, could become the victim of an OOM kill that the container has caused, and could lack the devices with which it
    /// releases a disk image.
    pub fn release_nspawn(&self, nspawn: i32) -> io::Result<()> {
        let lacks_devices = self.devices.as_ref().is_some_and(DevicePolicy::changes);
        let devices = lacks_devices.then_some("devices");
        for controller in ["memory", "pids"].into_iter().chain(devices) {
            if let Some(group) = self.controllers.get(controller)
                && let Some(parent) = group.parent()
            {
                write(&parent.join("cgroup.procs"), &nspawn.to_string())?;
            }
        }
        Ok(())
    }
}

/// The cgroups from the top of the hierarchy to the parent of this one.
fn above(layout: &Layout, group: &Path) -> Vec<PathBuf> {
    let Some(top) = &layout.tracking else {
        return Vec::new();
    };
    let above = group.ancestors().skip(1);
    let mut above: Vec<PathBuf> = above
        .take_while(|group| group.starts_with(top))
        .map(Path::to_owned)
        .collect();
    above.reverse();
    above
}

fn oom_counter(place: &Place, version_2: &BTreeSet<String>) -> Option<PathBuf> {
    match place.controllers.get("memory") {
        Some(group) => Some(group.join("memory.oom_control")),
        None if version_2.contains("memory") => Some(place.tracking.group.join("memory.events")),
        None => None,
    }
}

/// Gives a cgroup of the cpuset controller of cgroup v1 the cores and memory nodes of the one above: it accepts no process without.
fn inherit_cores(group: &Path) -> io::Result<()> {
    let parents = group.parent().into_iter().chain([group]);
    for group in parents {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = group.join(file);
            let inherited = group.parent().map(|above| above.join(file));
            if let (Ok(value), Some(inherited)) = (fs::read_to_string(&own), inherited)
                && value.trim().is_empty()
            {
                write(&own, fs::read_to_string(inherited)?.trim())?;
            }
        }
    }
    Ok(())
}

/// Lets the container see a cgroup, against the umask of the supervisor: root of a container with a user namespace is another user, who
/// mounts the hierarchy from its cgroup on and reads its limits there. For the mount the kernel looks up every directory on the way.
pub(super) fn make_visible(group: &Path) -> io::Result<()> {
    let subtree = group.parent().filter(|parent| parent.ends_with(SUBTREE));
    for directory in subtree.into_iter().chain([group]) {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Writes all of these; returns those that the kernel refuses. `disabled` are controllers that could not be enabled.
fn written(settings: &[Setting], disabled: &[(String, String)]) -> Vec<Unenforced> {
    let mut refused: Vec<Unenforced> = Vec::new();
    for setting in settings {
        let Err(error) = write(&setting.file, &setting.value) else {
            continue;
        };
        // Kernels without accounting of swap lack the file, and without swap there is nothing to limit.
        let needless =
            setting.limit == Limit::Swap && error.kind() == io::ErrorKind::NotFound && !has_swap();
        if needless || refused.iter().any(|known| known.limit == setting.limit) {
            continue;
        }
        let file = setting.file.file_name().unwrap_or_default();
        let controller = file.to_string_lossy();
        let controller = controller.split('.').next().unwrap_or_default();
        let disabled = disabled.iter().find(|(name, _)| name == controller);
        let reason = disabled.map_or_else(
            || {
                format!(
                    "{} can't be set to {}: {error}",
                    setting.file.display(),
                    setting.value
                )
            },
            |(_, reason)| reason.clone(),
        );
        let limit = setting.limit;
        refused.push(Unenforced { limit, reason });
    }
    refused
}

/// Whether this host has swap; `true` if that is not known.
fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |text| text.lines().count() > 1)
}

/// Writes to a file of a cgroup, which must exist: the kernel makes these files.
fn write(file: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    file.write_all(value.as_bytes())
}

/// What the user should know about limits that are not enforced, in one sentence.
pub fn unenforced_note(unenforced: &[Unenforced]) -> Option<String> {
    let texts: Vec<String> = unenforced
        .iter()
        .map(|one| format!("{} ({})", one.limit.as_str(), one.reason))
        .collect();
    (!texts.is_empty()).then(|| {
        format!(
            "these limits are not enforced on this node: {}",
            texts.join("; ")
        )
    })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
