//! Mounts what was planned. Runs in the exec shim, which then becomes systemd-nspawn: a process with one thread.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};

use super::{
    IdRange, MountPlan, PlannedMount, directory, id_map, mount_point, namespace, place_of, root_of,
};
use crate::container::Propagation;
use crate::sys::IdMap;
use crate::sys::mount_tree::{Denied, MountTree, place};

/// Why something could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The source of a mount.
    #[error("{}{what} {}: {}", option.as_deref().map(|option| format!("{option}: ")).unwrap_or_default(), path.display(), explained(error))]
    Source {
        /// The option that asks for it.
        option: Option<String>,
        /// What failed.
        what: &'static str,
        /// The source.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// The namespace that the mounts are in.
    #[error("{what}: {error}")]
    Namespace {
        /// What failed.
        what: &'static str,
        /// The reason.
        error: io::Error,
    },
}

impl AttachError {
    /// The error of the kernel.
    pub fn error(&self) -> &io::Error {
        let (Self::Source { error, .. } | Self::Namespace { error, .. }) = self;
        error
    }
}

fn explained(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(nix::libc::ELOOP) => {
            "a part of the path has become a symbolic link since it was checked".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Moves this process into a mount namespace of its own, in which what was planned is mounted below the directory of the start.
pub fn attach(plan: &MountPlan, task_dir: &Path) -> Result<(), AttachError> {
    let directory = &directory(task_dir);
    let mut mappings = Mappings::default();
    // Still in the host's namespace, so that a copy can follow later mounts of the original.
    let trees = plan
        .mounts
        .iter()
        .map(|mount| open(mount, plan.ids, &mut mappings));
    let trees: Vec<_> = trees.collect::<Result<_, _>>()?;
    make_mount_points(plan, &trees)?;
    let root = plan.root.as_deref();
    let root = root.map(|root| open_root(root, plan.ids, &mut mappings));
    let root = root.transpose()?;
    let failed = |what| move |error| AttachError::Namespace { what, error };
    let made = DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(directory);
    made.map_err(failed("making the directory of the mounts"))?;
    let used = plan.used.iter().map(PathBuf::as_path);
    let used: Vec<_> = used.chain([task_dir]).collect();
    namespace::enter_own(&used).map_err(failed("entering a mount namespace"))?;
    let options = Some("mode=0700,size=1m");
    mount(
        Some("nomad-driver-nspawn"),
        directory,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        options,
    )
    .map_err(|error| failed("mounting a tmpfs for mount points")(error.into()))?;
    for (index, tree) in trees.iter().enumerate() {
        let over = place_of(directory, index);
        tree.attach(&over)
            .map_err(failed("attaching a mount in its place"))?;
    }
    if let Some(root) = root {
        root.attach(&directory.join("root"))
            .map_err(failed("attaching the root in its place"))?;
    }
    Ok(())
}

/// A tree of mounts, and what it was made from.
struct Opened {
    place: OwnedFd,
    tree: MountTree,
    is_directory: bool,
    /// The user and the group that are the container's root, if the ids are mapped.
    root: Option<(u32, u32)>,
}

/// Makes what is missing of the mount points of mounts in mapped mounts.
fn make_mount_points(plan: &MountPlan, trees: &[Opened]) -> Result<(), AttachError> {
    let all = || plan.mounts.iter().zip(trees);
    for (mount, opened) in all() {
        let above = all().filter(|(other, _)| {
            mount.target != other.target && mount.target.starts_with(&other.target)
        });
        let nearest = above.max_by_key(|(other, _)| other.target.components().count());
        let Some((outer, of_outer)) = nearest.filter(|(outer, _)| !outer.read_only) else {
            continue;
        };
        let (Some(root), Ok(below)) = (of_outer.root, mount.target.strip_prefix(&outer.target))
        else {
            continue;
        };
        let made = mount_point::make(&of_outer.place, below, opened.is_directory, root);
        made.map_err(|error| AttachError::Source {
            option: mount.option.clone(),
            what: "can't make the mount point in",
            path: outer.source.clone(),
            error,
        })?;
    }
    Ok(())
}

impl Opened {
    /// Attaches the tree at this path, where nothing is yet.
    fn attach(&self, at: &Path) -> io::Result<()> {
        match self.is_directory {
            true => fs::create_dir(at)?,
            false => drop(File::create_new(at)?),
        }
        self.tree.attach(place(at)?.as_fd())
    }
}

/// Opens a mount, and makes of it what was planned.
fn open(
    mount: &PlannedMount,
    ids: Option<IdRange>,
    mappings: &mut Mappings,
) -> Result<Opened, AttachError> {
    let failed = |what| {
        move |error: io::Error| AttachError::Source {
            option: mount.option.clone(),
            what,
            path: mount.source.clone(),
            error,
        }
    };
    let opened = place(&mount.source).map_err(failed("can't open"))?;
    let about = about(&opened).map_err(failed("can't examine"))?;
    let tree = MountTree::copy(opened.as_fd()).map_err(failed("can't copy the mounts at"))?;
    if let Some(ids) = ids.filter(|_| mount.mapped) {
        let map = id_map(ids, about.stx_uid, about.stx_gid);
        mappings
            .apply(map, &tree)
            .map_err(failed("can't map the ids of the files of"))?;
    }
    let denied = Denied {
        write: mount.read_only,
        set_user_id: mount.restrictions.nosuid,
        devices: mount.restrictions.nodev,
        execution: mount.restrictions.noexec,
    };
    tree.deny(denied)
        .map_err(failed("can't restrict the mounts at"))?;
    tree.follow_later_mounts(mount.propagation == Propagation::HostToTask)
        .map_err(failed("can't set the propagation of"))?;
    let mapped = ids.filter(|_| mount.mapped);
    Ok(Opened {
        tree,
        is_directory: FileType::from_raw_mode(about.stx_mode.into()).is_dir(),
        root: mapped.map(|ids| root_of(ids, about.stx_uid, about.stx_gid)),
        place: opened,
    })
}

/// Kind and owner, as far as the kernel knows them: a file system that does not answer is not asked.
fn about(opened: &OwnedFd) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::UID | StatxFlags::GID;
    Ok(statx(opened, c"", flags, wanted)?)
}

/// Opens the root, and maps its ids.
fn open_root(
    root: &Path,
    ids: Option<IdRange>,
    mappings: &mut Mappings,
) -> Result<Opened, AttachError> {
    let failed = |what| {
        move |error: io::Error| AttachError::Source {
            option: Some("config.image".to_owned()),
            what,
            path: root.to_owned(),
            error,
        }
    };
    let opened = place(root).map_err(failed("can't open"))?;
    let tree = MountTree::copy(opened.as_fd()).map_err(failed("can't copy the mounts at"))?;
    if let Some(ids) = ids {
        mappings
            .apply(id_map(ids, 0, 0), &tree)
            .map_err(failed("can't map the ids of the files of"))?;
    }
    tree.follow_later_mounts(true)
        .map_err(failed("can't set the propagation of"))?;
    Ok(Opened {
        place: opened,
        tree,
        is_directory: true,
        root: None,
    })
}

/// The mappings that have been made for a start. Most mounts have the same one.
#[derive(Default)]
struct Mappings(Vec<(IdMap, OwnedFd)>);

impl Mappings {
    fn apply(&mut self, map: IdMap, tree: &MountTree) -> io::Result<()> {
        if let Some((_, namespace)) = self.0.iter().find(|(known, _)| *known == map) {
            return tree.map_ids(namespace.as_fd());
        }
        let namespace = map.user_namespace()?;
        tree.map_ids(namespace.as_fd())?;
        self.0.push((map, namespace));
        Ok(())
    }
}
