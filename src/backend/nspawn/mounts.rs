//! Plans what a start mounts: what the exec shim mounts and with which ids, and what is left to systemd-nspawn.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::ids::{How, Ids, base_of, set_ownership_off};
use super::io_error;
use super::prepare::{Host, unsupported};
use crate::backend::BackendError;
use crate::container::{
    Cause, Changes, ContainerSpec, Mode, Mount, MountIds, Readiness, Root, Users, Volatile,
};
use crate::mounts::{self, IdRange, MountPlan, PICKED_IDS, Refused};
use crate::nspawn::argv::{Bind, READY_SOCKET};
use crate::nspawn::idmap;
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::TaskDir;

/// Creates the sources of mounts that the job wants to be created.
pub(super) fn create_sources(spec: &ContainerSpec) -> Result<(), BackendError> {
    let for_changes = |mount: &Mount| match &mount.overlay.as_ref()?.changes {
        Changes::Kept {
            directory,
            create: true,
        } => Some(directory.clone()),
        _ => None,
    };
    for mount in &spec.mounts {
        let source = mount.create.then(|| (mount.source.clone(), 0o755));
        // The task's root can leave programs there that give everybody else on the host its privileges.
        let for_changes = || for_changes(mount).map(|path| (path, 0o700));
        let Some((path, mode)) = source.or_else(for_changes) else {
            continue;
        };
        mounts::create_directory(&path, mode).map_err(|error| {
            let option = mount.option.as_deref().unwrap_or("a mount");
            let path = path.display();
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
        refuse_overlays(spec, ids.how, host)?;
        let range = match ids.how {
            How::Shim(range) => range,
            How::MappedByNspawn => None,
            How::Nspawn => {
                let mounts = of_root.into_iter().chain(spec.mounts.iter().cloned());
                return Ok(Self::by_nspawn(spec, root, mounts.collect(), own, host));
            }
        };
        let mut mounts = of_root;
        // Its files have their owners already.
        if range.is_some_and(|range| base_of(&spec.rootfs.source) == Some(range.first)) {
            mounts
                .iter_mut()
                .for_each(|mount| mount.ids = MountIds::Unmapped);
        }
        mounts.extend(spec.mounts.iter().cloned());
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
        let (by_nspawn, unmapped_by_nspawn) = match ids.how {
            How::MappedByNspawn => mapped_by_nspawn(spec, &mounts, host)?,
            _ => (vec![false; mounts.len()], Vec::new()),
        };
        let planned = mounts::plan(mounts, range, task_dir);
        let mut planned = planned.map_err(|error| refused(spec, &error))?;
        let tmpfs = spec.tmpfs.iter().map(|tmpfs| tmpfs.target.clone());
        planned.plan.add_tmpfs(tmpfs);
        let own_targets: Vec<_> = own.iter().map(|mount| mount.target.clone()).collect();
        let unmapped = planned.unmapped.iter();
        let unmapped = unmapped.filter(|(target, _)| !own_targets.contains(target));
        let mut notes =
            idmap::notes(unmapped.map(|(target, why)| (why.to_string(), target.as_path())));
        notes.extend(unmapped_by_nspawn);
        let (used, whole) = used_by_nspawn(spec, root, host);
        planned.plan.keep(used, whole);
        let root = match (range, root) {
            (Some(range), Root::Directory(tree)) if is_put_together(spec, ids) => {
                if needs_mapping(spec, tree, range)? {
                    let real = tree.canonicalize();
                    let real =
                        real.map_err(|error| io_error("examining the image", tree, error))?;
                    planned.plan.map_root(&real);
                }
                set_ownership_off(&mut ids.users);
                match planned.plan.maps_root() {
                    true => Root::Directory(mounts::root(task_dir)),
                    false => root.clone(),
                }
            }
            _ => root.clone(),
        };
        let binds = planned.mounts.into_iter().zip(by_nspawn);
        let binds = binds.map(|(mount, idmap)| Bind { mount, idmap });
        Ok(Self {
            plan: planned.plan,
            binds: binds.collect(),
            root,
            notes,
        })
    }

    /// The same with the socket on which a command says that it is ready. The supervisor makes it, in a directory that only root can enter,
    /// so systemd-nspawn may open it itself.
    pub(super) fn with_ready_socket(mut self, spec: &ContainerSpec, task_dir: &TaskDir) -> Self {
        let is_command = spec.payload.mode != Mode::Boot;
        if is_command && matches!(spec.payload.readiness, Readiness::Notify(_)) {
            let mount = Mount::new(task_dir.ready_socket(), READY_SOCKET).with_read_only(true);
            self.binds.push(Bind {
                mount,
                idmap: false,
            });
        }
        self
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

/// The first kernel that mounts an overlay of directories with mapped ids.
const OVERLAY_OF_MAPPED: (u32, u32) = (5, 19);

/// Refuses an overlay that can't be mounted here, or whose ids can't be mapped.
fn refuse_overlays(spec: &ContainerSpec, how: How, host: &Host) -> Result<(), BackendError> {
    let mut overlays = spec.mounts.iter().filter(|mount| mount.overlay.is_some());
    let has_mapped = |mount: &&Mount| mount.ids != MountIds::Unmapped;
    let (refused, why) = match how {
        How::Nspawn => (
            overlays.next(),
            "an overlay needs a plugin that may mount file systems (CAP_SYS_ADMIN)".to_owned(),
        ),
        How::MappedByNspawn => (
            overlays.find(has_mapped),
            "the ids of an overlay can't be mapped to a range that only systemd-nspawn knows: set config.private_users to \"pick\" or a number"
                .to_owned(),
        ),
        How::Shim(Some(_)) if host.kernel < OVERLAY_OF_MAPPED => {
            let ((major, minor), (since, since_minor)) = (host.kernel, OVERLAY_OF_MAPPED);
            let why = format!(
                "an overlay in a user namespace needs Linux {since}.{since_minor} or later, and this is {major}.{minor}: set \
                 config.user_namespacing = false, or use a newer kernel"
            );
            (overlays.find(has_mapped), why)
        }
        How::Shim(_) => return Ok(()),
    };
    match refused {
        None => Ok(()),
        Some(mount) => {
            let option = mount.option.as_deref().unwrap_or("a mount");
            Err(unsupported(spec, format!("{option}: {why}")))
        }
    }
}

/// Which of these mounts systemd-nspawn maps, and notes about the others. A mount that has to be mapped and can't be is refused.
fn mapped_by_nspawn(
    spec: &ContainerSpec,
    mounts: &[Mount],
    host: &Host,
) -> Result<(Vec<bool>, Vec<String>), BackendError> {
    let (binds, notes) = idmap::binds(mounts.to_vec(), &spec.users, host.version, host.kernel);
    let unmappable = binds
        .iter()
        .find(|bind| bind.mount.ids == MountIds::Mapped && !bind.idmap);
    if let Some(Bind { mount, .. }) = unmappable {
        let option = mount.option.as_deref().unwrap_or("a mount");
        let text = format!("{option}: {}", notes.join("; "));
        return Err(unsupported(spec, text));
    }
    let mapped = binds
        .iter()
        .map(|bind| bind.idmap && bind.mount.ids != MountIds::Unmapped);
    Ok((mapped.collect(), notes))
}

fn refused(spec: &ContainerSpec, error: &Refused) -> BackendError {
    match error.is_transient() {
        true => BackendError::Start {
            machine: spec.identity.machine.clone(),
            step: "planning the mounts",
            cause: Cause::Resources,
            reason: error.to_string(),
        },
        false => unsupported(spec, error.to_string()),
    }
}

/// The paths of the host, besides those of the system, that systemd-nspawn uses for this container; and those that it uses with everything that is
/// mounted below.
fn used_by_nspawn(spec: &ContainerSpec, root: &Root, host: &Host) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let (Root::Directory(image) | Root::Image(image)) = &spec.rootfs.source;
    let (Root::Directory(root) | Root::Image(root)) = root;
    let program = host.program.canonicalize();
    let mut used = vec![program.unwrap_or_else(|_| host.program.clone())];
    used.extend([image.clone(), root.clone()]);
    // The copy of an ephemeral root is made beside it.
    used.extend(image.parent().map(Path::to_owned));
    used.extend(Path::new("/etc/resolv.conf").canonicalize());
    let shown = match spec.rootfs.volatile {
        Volatile::Yes => "usr",
        _ => "",
    };
    (used, vec![image.join(shown), root.join(shown)])
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
    if spec.rootfs.ephemeral {
        let text = "config.ephemeral = true has no use with config.volatile = \"yes\" or \"state\", which do not change the image, and can't be \
                    combined with them in a user namespace: remove it";
        return Err(unsupported(spec, text.to_owned()));
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
    match mounts::unmappable(tree).first() {
        None => Ok(true),
        Some(why) => refused(why.to_string()),
    }
}
