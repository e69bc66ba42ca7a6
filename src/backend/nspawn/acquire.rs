//! Lists what a start will acquire on the host, derived from its container spec before anything is acquired.

use crate::cgroup::CgroupPath;
use crate::container::{ContainerSpec, Network, Root, Users, Volatile};
use crate::lease::{
    Cgroup, CgroupMirror, EphemeralCopy, NspawnMounts, Resource, Skeleton, TreeLock, UidRange,
    ZoneBridge,
};
use crate::rootfs_path::copy_place;

/// The resources of a start with this cgroup, in the order of acquisition; they are released in the reverse order. `used` is the
/// root that systemd-nspawn gets, which may be a skeleton in place of the spec's root.
pub(super) fn resources(
    spec: &ContainerSpec,
    place: Option<CgroupPath>,
    used: &Root,
) -> Vec<Resource> {
    let mut resources = Vec::new();
    if let Some(CgroupPath { group, mirror }) = place {
        resources.push(Resource::Cgroup(Cgroup { group }));
        resources.extend(mirror.map(|group| Resource::CgroupMirror(CgroupMirror { group })));
    }
    if let Network::Private {
        zone: Some(zone), ..
    } = &spec.network
    {
        let zone = zone.clone();
        resources.push(Resource::ZoneBridge(ZoneBridge { zone }));
    }
    if matches!(&spec.users, Users::Private { range, .. } if range == "pick") {
        resources.push(Resource::UidRange(UidRange {}));
    }
    if *used != spec.root {
        resources.push(Resource::Skeleton(Skeleton {}));
    }
    let (Root::Directory(image) | Root::Image(image)) = &spec.root;
    resources.push(match spec.ephemeral {
        true => Resource::EphemeralCopy(EphemeralCopy {
            directory: copy_place(image),
        }),
        false => Resource::TreeLock(TreeLock {
            tree: image.clone(),
            // A skeleton is used, and locked, by this container only.
            shared: (spec.read_only || spec.volatile != Volatile::No) && *used == spec.root,
        }),
    });
    resources.push(Resource::NspawnMounts(NspawnMounts {}));
    resources
}
