//! Lists what a start will acquire on the host, derived from its container spec before anything is acquired.

use crate::cgroup::CgroupPath;
use crate::container::{ContainerSpec, NetworkNamespace, Root, Users, Volatile};
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
    if let NetworkNamespace::Private {
        zone: Some(zone), ..
    } = &spec.network.namespace
    {
        let zone = zone.clone();
        resources.push(Resource::ZoneBridge(ZoneBridge { zone }));
    }
    if matches!(&spec.users, Users::Private { range, .. } if range == "pick") {
        resources.push(Resource::UidRange(UidRange {}));
    }
    if *used != spec.rootfs.source {
        resources.push(Resource::Skeleton(Skeleton {}));
    }
    let (Root::Directory(image) | Root::Image(image)) = &spec.rootfs.source;
    resources.push(match spec.rootfs.ephemeral {
        true => Resource::EphemeralCopy(EphemeralCopy {
            directory: copy_place(image),
        }),
        false => Resource::TreeLock(TreeLock {
            tree: image.clone(),
            // A skeleton is used, and locked, by this container only.
            shared: (spec.rootfs.read_only || spec.rootfs.volatile != Volatile::No)
                && *used == spec.rootfs.source,
        }),
    });
    resources.push(Resource::NspawnMounts(NspawnMounts {}));
    resources
}
