//! The form of the launch spec on disk. Besides the list of resources it contains, in separate fields, those that drivers from
//! before that list knew, so that an older driver still releases them after a downgrade. In launch specs of such drivers those
//! fields are read.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::task_dir::{LaunchSpec, Pid1};
use crate::cgroup::{CgroupPath, CgroupPlan};
use crate::container::{Credential, InsideSettings, Mode, Process, SystemOutput};
use crate::lease::{
    Cgroup, CgroupMirror, ControllerCgroups, EphemeralCopy, NspawnMounts, Resource, Skeleton,
    TreeLock, UidRange,
};
use crate::mounts::MountPlan;
use crate::seccomp;

#[derive(Serialize, Deserialize)]
pub(super) struct LaunchSpecRecord {
    id: String,
    #[serde(default)]
    alloc_dir: Option<PathBuf>,
    machine: String,
    mode: Mode,
    boot: String,
    program: PathBuf,
    arguments: Vec<String>,
    #[serde(default)]
    first: Pid1,
    stdout: Option<PathBuf>,
    stderr: Option<PathBuf>,
    network_namespace: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network_of: Option<Process>,
    #[serde(flatten)]
    older: Older,
    #[serde(default)]
    cgroups: Option<CgroupPlan>,
    #[serde(default)]
    oom_score_adj: i32,
    /// Missing in launch specs of drivers from before this field.
    #[serde(default)]
    resources: Option<Vec<Resource>>,
    #[serde(default, skip_serializing_if = "InsideSettings::is_empty")]
    inside: InsideSettings,
    #[serde(default, skip_serializing_if = "seccomp::Source::is_nspawn")]
    seccomp: seccomp::Source,
    #[serde(default, skip_serializing_if = "MountPlan::is_empty")]
    mounts: MountPlan,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    credentials: Vec<Credential>,
    #[serde(default, skip_serializing_if = "SystemOutput::is_empty")]
    output: SystemOutput,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ready_within: Option<Duration>,
    notes: Vec<String>,
}

/// The fields that drivers from before the list of resources know.
#[derive(Default, Serialize, Deserialize)]
struct Older {
    place: Option<CgroupPath>,
    locks: Option<PathBuf>,
    #[serde(default)]
    shares: bool,
    copies: Option<PathBuf>,
    #[serde(default)]
    picks: bool,
}

impl From<LaunchSpecRecord> for LaunchSpec {
    fn from(form: LaunchSpecRecord) -> Self {
        Self {
            id: form.id,
            alloc_dir: form.alloc_dir,
            machine: form.machine,
            mode: form.mode,
            boot: form.boot,
            program: form.program,
            arguments: form.arguments,
            first: form.first,
            stdout: form.stdout,
            stderr: form.stderr,
            network_namespace: form.network_namespace,
            network_of: form.network_of,
            cgroups: form.cgroups,
            oom_score_adj: form.oom_score_adj,
            resources: form.resources.unwrap_or_else(|| form.older.resources()),
            inside: form.inside,
            seccomp: form.seccomp,
            mounts: form.mounts,
            credentials: form.credentials,
            output: form.output,
            ready_within: form.ready_within,
            notes: form.notes,
        }
    }
}

impl From<LaunchSpec> for LaunchSpecRecord {
    fn from(launch_spec: LaunchSpec) -> Self {
        Self {
            older: Older::of(&launch_spec.resources),
            id: launch_spec.id,
            alloc_dir: launch_spec.alloc_dir,
            machine: launch_spec.machine,
            mode: launch_spec.mode,
            boot: launch_spec.boot,
            program: launch_spec.program,
            arguments: launch_spec.arguments,
            first: launch_spec.first,
            stdout: launch_spec.stdout,
            stderr: launch_spec.stderr,
            network_namespace: launch_spec.network_namespace,
            network_of: launch_spec.network_of,
            cgroups: launch_spec.cgroups,
            oom_score_adj: launch_spec.oom_score_adj,
            resources: Some(launch_spec.resources),
            inside: launch_spec.inside,
            seccomp: launch_spec.seccomp,
            mounts: launch_spec.mounts,
            credentials: launch_spec.credentials,
            output: launch_spec.output,
            ready_within: launch_spec.ready_within,
            notes: launch_spec.notes,
        }
    }
}

impl Older {
    /// As resources, in the order of acquisition. Such a launch spec does not say whether the root is replaced by a skeleton, so
    /// one is assumed.
    fn resources(self) -> Vec<Resource> {
        let (group, mirror) = match self.place {
            Some(CgroupPath { group, mirror }) => (Some(group), mirror),
            None => (None, None),
        };
        let shared = self.shares;
        let held = [
            group.map(|group| Resource::Cgroup(Cgroup { group })),
            mirror.map(|group| Resource::CgroupMirror(CgroupMirror { group })),
            self.picks.then(|| Resource::UidRange(UidRange::default())),
            Some(Resource::Skeleton(Skeleton {})),
            self.locks
                .map(|tree| Resource::TreeLock(TreeLock { tree, shared })),
            self.copies.map(|directory| {
                Resource::EphemeralCopy(EphemeralCopy {
                    directory,
                    tree: None,
                })
            }),
            Some(Resource::NspawnMounts(NspawnMounts {})),
        ];
        held.into_iter().flatten().collect()
    }

    fn of(resources: &[Resource]) -> Self {
        let mut older = Self::default();
        let mut mirror = None;
        for resource in resources.iter().cloned() {
            match resource {
                Resource::Cgroup(Cgroup { group }) => {
                    older.place = Some(CgroupPath {
                        group,
                        mirror: None,
                    });
                }
                Resource::CgroupMirror(CgroupMirror { group }) => mirror = Some(group),
                Resource::UidRange(UidRange { .. }) => older.picks = true,
                Resource::TreeLock(TreeLock { tree, shared }) => {
                    older.locks = Some(tree);
                    older.shares = shared;
                }
                Resource::EphemeralCopy(EphemeralCopy { directory, .. }) => {
                    older.copies = Some(directory)
                }
                // Older drivers release these without a field.
                Resource::Skeleton(Skeleton {}) | Resource::NspawnMounts(NspawnMounts {}) => {}
                // They have none.
                Resource::ControllerCgroups(ControllerCgroups { .. }) | Resource::Network(_) => {}
                Resource::Unknown(_) => {}
            }
        }
        if let Some(place) = &mut older.place {
            place.mirror = mirror;
        }
        older
    }
}
