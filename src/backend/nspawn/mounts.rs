//! Plans what a start mounts, and as which ids: picks the range of the container where the job leaves that open, and decides what is mounted by the
//! exec shim and what by systemd-nspawn.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::io_error;
use super::prepare::{Host, unsupported};
use crate::backend::BackendError;
use crate::container::{Cause, ContainerSpec, Mount, Root, Users, Volatile};
use crate::lease::{SharedLocks, UidRange};
use crate::mounts::{self, IdRange, MountPlan, PICKED_IDS};
use crate::nspawn::argv::Bind;
use crate::nspawn::idmap;
use crate::nspawn::refusal::cause_of_host_error;
use crate::nspawn::version::Feature;
use crate::sys::kernel;

/// The ids of a container, resolved as far as the driver can do that.
#[derive(Debug)]
pub(super) struct Ids {
    /// The user namespace as systemd-nspawn gets it.
    pub(super) users: Users,
    /// The range that was picked, and its lock.
    pub(super) picked: Option<(UidRange, SharedLocks)>,
    /// How mounts are made.
    how: How,
}

/// How the mounts of a container are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// By the exec shim, with these ids; `None` are those of the host.
    Shim(Option<IdRange>),
    /// By systemd-nspawn: only that knows the ids, or this process is not allowed to mount anything.
    Nspawn,
}

impl Ids {
    /// Resolves the ids of this container.
    pub(super) fn of(spec: &ContainerSpec, host: &Host) -> Result<Self, BackendError> {
        let users = spec.users.clone();
        let known = |users, how| {
            Ok(Self {
                users,
                picked: None,
                how,
            })
        };
        if !kernel::may_mount() {
            return known(users, How::Nspawn);
        }
        let Users::Private { range, ownership } = &users else {
            return known(users, How::Shim(None));
        };
        match range.as_str() {
            "pick" => Self::pick(spec, ownership.clone(), host),
            // They are those of the host.
            "identity" => known(users, How::Shim(None)),
            range => match numbers(range) {
                Some(IdRange { first: 0, .. }) => known(users, How::Shim(None)),
                Some(ids) => known(users, How::Shim(Some(ids))),
                None => known(users, How::Nspawn),
            },
        }
    }

    fn pick(
        spec: &ContainerSpec,
        ownership: Option<String>,
        host: &Host,
    ) -> Result<Self, BackendError> {
        let owner = match &spec.rootfs.source {
            Root::Directory(root) => fs::metadata(root).ok().map(|root| root.uid()),
            Root::Image(_) => None,
        };
        let machine = &spec.identity.machine;
        let picked = UidRange::pick(owner, machine).map_err(|error| BackendError::Start {
            machine: machine.clone(),
            step: "picking a range of user ids",
            cause: match error.kind() {
                std::io::ErrorKind::ResourceBusy => Cause::Busy,
                _ => cause_of_host_error(&error),
            },
            reason: error.to_string(),
        });
        let (first, lock) = picked?;
        // What `pick` means where nothing else is set.
        let usual = match Feature::Ownership.is_in(host.version) {
            true => "auto",
            false => "chown",
        };
        let ownership = ownership.filter(|how| how != "auto");
        let count = PICKED_IDS;
        let range = UidRange { first: Some(first) };
        Ok(Self {
            users: Users::Private {
                range: format!("{first}:{count}"),
                ownership: Some(ownership.unwrap_or_else(|| usual.to_owned())),
            },
            picked: Some((range, lock)),
            how: How::Shim(Some(IdRange { first, count })),
        })
    }
}

/// `FIRST[:COUNT]`
fn numbers(range: &str) -> Option<IdRange> {
    let (first, count) = match range.split_once(':') {
        None => (range, None),
        Some((first, count)) => (first, Some(count)),
    };
    Some(IdRange {
        first: first.parse().ok()?,
        count: count.map_or(Some(PICKED_IDS), |count| count.parse().ok())?,
    })
}

/// Creates the sources of mounts that the job wants to be created.
pub(super) fn create_sources(spec: &ContainerSpec) -> Result<(), BackendError> {
    for mount in spec.mounts.iter().filter(|mount| mount.create) {
        mounts::create_directory(&mount.source).map_err(|error| {
            let option = mount.option.as_deref().unwrap_or("a mount");
            let path = mount.source.display();
            BackendError::Start {
                machine: spec.identity.machine.clone(),
                step: "creating the source of a mount",
                cause: cause_of_host_error(&error),
                reason: format!("{option}: {path}: {error}"),
            }
        })?;
    }
    Ok(())
}

/// What is mounted at a start.
#[derive(Debug)]
pub(super) struct StartMounts {
    /// By the exec shim.
    pub(super) plan: MountPlan,
    /// By systemd-nspawn.
    pub(super) binds: Vec<Bind>,
    /// The root that systemd-nspawn gets.
    pub(super) root: Root,
    /// What the user should know.
    pub(super) notes: Vec<String>,
}

impl StartMounts {
    /// Plans the mounts of this root, those of the job, and files that the driver has written (`own`), which everybody may read.
    pub(super) fn plan(
        spec: &ContainerSpec,
        (root, of_root): (&Root, Vec<Mount>),
        own: &[Mount],
        ids: &mut Ids,
        (host, task_dir): (&Host, &Path),
    ) -> Result<Self, BackendError> {
        let mut mounts = of_root;
        mounts.extend(spec.mounts.iter().cloned());
        let How::Shim(range) = ids.how else {
            return Ok(Self::by_nspawn(spec, root, mounts, own, host));
        };
        let of_driver = own.iter().map(|mount| {
            let source = mount.source.canonicalize();
            let source =
                source.map_err(|error| io_error("examining the file", &mount.source, error))?;
            Ok::<_, BackendError>(Mount {
                source,
                ..mount.clone()
            })
        });
        let of_driver: Vec<_> = of_driver.collect::<Result<_, _>>()?;
        mounts.extend(of_driver);
        let planned = mounts::plan(mounts, range, task_dir);
        let mut planned = planned.map_err(|refused| unsupported(spec, refused.to_string()))?;
        let own_targets: Vec<_> = own.iter().map(|mount| mount.target.clone()).collect();
        let unmapped = planned.unmapped.iter();
        let unmapped = unmapped.filter(|(target, _)| !own_targets.contains(target));
        let notes = idmap::notes(unmapped.map(|(target, why)| (why.to_string(), target.as_path())));
        planned.plan.keep(used_by_nspawn(spec, root, host));
        let root = match (range, root) {
            (Some(range), Root::Directory(tree)) if is_put_together(spec, ids) => {
                if needs_mapping(spec, tree, range)? {
                    planned.plan.map_root(tree);
                }
                set_ownership_off(&mut ids.users);
                match planned.plan.maps_root() {
                    true => Root::Directory(mounts::root(task_dir)),
                    false => root.clone(),
                }
            }
            _ => root.clone(),
        };
        let binds = planned.mounts.into_iter().map(|mount| Bind {
            mount,
            idmap: false,
        });
        Ok(Self {
            plan: planned.plan,
            binds: binds.collect(),
            root,
            notes,
        })
    }

    fn by_nspawn(
        spec: &ContainerSpec,
        root: &Root,
        mounts: Vec<Mount>,
        own: &[Mount],
        host: &Host,
    ) -> Self {
        let (mut binds, notes) = idmap::binds(mounts, &spec.users, host.version, host.kernel);
        // Everybody may read them, so nothing is lost without the mapping.
        binds.extend(idmap::binds(own.to_vec(), &spec.users, host.version, host.kernel).0);
        Self {
            plan: MountPlan::default(),
            binds,
            root: root.clone(),
            notes,
        }
    }
}

/// The paths of the host, besides those of the system, that systemd-nspawn uses for this container.
fn used_by_nspawn(spec: &ContainerSpec, root: &Root, host: &Host) -> Vec<PathBuf> {
    let (Root::Directory(image) | Root::Image(image)) = &spec.rootfs.source;
    let (Root::Directory(root) | Root::Image(root)) = root;
    let program = host.program.canonicalize();
    let program = program.unwrap_or_else(|_| host.program.clone());
    let mut used = vec![image.clone(), root.clone(), program];
    // The copy of an ephemeral root is made beside it.
    used.extend(image.parent().map(Path::to_owned));
    used
}

/// Whether systemd-nspawn puts the root together from several mounts, whose ids it can't map, but should.
fn is_put_together(spec: &ContainerSpec, ids: &Ids) -> bool {
    let Users::Private { ownership, .. } = &ids.users else {
        return false;
    };
    let maps = matches!(ownership.as_deref(), Some("auto" | "map"));
    maps && matches!(spec.rootfs.volatile, Volatile::Yes | Volatile::State)
}

/// Whether the files of this root have to be mapped to the range, because they do not belong to it already. An error if they can't be.
fn needs_mapping(spec: &ContainerSpec, tree: &Path, range: IdRange) -> Result<bool, BackendError> {
    let about = fs::metadata(tree).map_err(|error| io_error("examining the image", tree, error))?;
    let base = about.uid() - about.uid() % PICKED_IDS;
    if base == range.first {
        return Ok(false);
    }
    let refused = |why: String| {
        let text = format!(
            "config.volatile = \"yes\" or \"state\" in a user namespace needs an image whose ids can be mapped, and {why}. Use \"overlay\", or set \
             config.user_namespacing = false"
        );
        Err(unsupported(spec, text))
    };
    if base != 0 {
        return refused(format!("its files belong to the ids from {base} on"));
    }
    match mounts::unmappable(tree) {
        None => Ok(true),
        Some(why) => refused(why.to_string()),
    }
}

fn set_ownership_off(users: &mut Users) {
    if let Users::Private { ownership, .. } = users {
        *ownership = Some("off".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_number_and_perhaps_a_count() {
        let range = |first, count| Some(IdRange { first, count });
        assert_eq!(numbers("1048576"), range(1_048_576, 65_536));
        assert_eq!(numbers("1048576:131072"), range(1_048_576, 131_072));
        for word in ["yes", "managed", "", "1:x"] {
            assert_eq!(numbers(word), None);
        }
    }
}
