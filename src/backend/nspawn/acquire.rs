//! Lists what a start will acquire on the host, derived from its container spec before anything is acquired.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::cgroup::{CgroupPath, Place};
use crate::container::{ContainerSpec, Root, Rootfs, Users, Volatile};
use crate::lease::{
    Cgroup, CgroupMirror, ControllerCgroups, EphemeralCopy, Network, NspawnMounts, Resource,
    Skeleton, TreeLock, UidRange,
};
use crate::network::NetworkPlan;
use crate::rootfs_path::copy_place;

/// The resources of a start with this cgroup, in the order of acquisition; they are released in the reverse order. `picked` is the range of
/// ids, if the driver has picked it; `used` is the root that systemd-nspawn gets, which may be a skeleton in place of the spec's root.
pub(super) fn resources(
    spec: &ContainerSpec,
    place: Option<&Place>,
    network: Option<NetworkPlan>,
    picked: Option<UidRange>,
    used: &Root,
) -> Vec<Resource> {
    let mut resources = Vec::new();
    if let Some(place) = place {
        resources.extend(cgroups(place));
    }
    resources.extend(network.map(|plan| Resource::Network(Network { plan })));
    let picks = matches!(&spec.users, Users::Private { range, .. } if range == "pick");
    let range = picked.or_else(|| picks.then(UidRange::default));
    resources.extend(range.map(Resource::UidRange));
    if *used != spec.rootfs.source {
        resources.push(Resource::Skeleton(Skeleton {}));
    }
    resources.push(image(&spec.rootfs, used));
    resources.push(Resource::NspawnMounts(NspawnMounts {}));
    resources
}

/// The cgroups that are made for a start, and not those of others that it joins.
fn cgroups(place: &Place) -> Vec<Resource> {
    let CgroupPath { group, mirror } = place.tracking.clone();
    let own = place.controllers.values();
    let own = own.filter(|controller| controller.file_name() == group.file_name());
    let groups: BTreeSet<PathBuf> = own.cloned().collect();
    let mut resources = vec![Resource::Cgroup(Cgroup { group })];
    resources.extend(mirror.map(|group| Resource::CgroupMirror(CgroupMirror { group })));
    if !groups.is_empty() {
        let groups = groups.into_iter().collect();
        resources.push(Resource::ControllerCgroups(ControllerCgroups { groups }));
    }
    resources
}

/// What a start holds of its image: a copy, or a lock.
fn image(rootfs: &Rootfs, used: &Root) -> Resource {
    let (Root::Directory(image) | Root::Image(image)) = &rootfs.source;
    if rootfs.ephemeral {
        return Resource::EphemeralCopy(EphemeralCopy::of(image, copy_place(image)));
    }
    let tree = image.clone();
    // A skeleton is used, and locked, by this container only.
    let shared = (rootfs.read_only || rootfs.volatile != Volatile::No) && *used == rootfs.source;
    Resource::TreeLock(TreeLock { tree, shared })
}
