//! Mounts what was planned. Runs in the exec shim, which then becomes systemd-nspawn: a process with one thread.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, statx};

use super::overlay::{self, OpenedOverlay};
use super::{
    IdRange, MountPlan, PlannedMount, directory, id_map, mount_point, namespace, place_of, root_of,
};
use crate::container::Propagation;
use crate::failpoint::{self, Failpoint};
use crate::sys::mount_tree::{Denied, MountTree, place, place_as_it_is};
use crate::sys::{IdMap, procfs};

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
    /// Where an overlay keeps its changes.
    #[error("{option}: {} is in use by another overlay: only one task at a time can have it", path.display())]
    InUse {
        /// The option that asks for it.
        option: String,
        /// The directory.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// An overlay.
    #[error(
        "{option}: the overlay can't be mounted: {}",
        explained_of_overlay(error)
    )]
    Overlay {
        /// The option that asks for it.
        option: String,
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
    /// What failed with a source, given the option that asks for it.
    pub(super) fn of_source(
        option: Option<&str>,
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let (option, path) = (option.map(str::to_owned), path.to_owned());
        move |error| Self::Source {
            option,
            what,
            path,
            error,
        }
    }

    pub(super) fn of_overlay(option: &str, error: io::Error) -> Self {
        let option = option.to_owned();
        Self::Overlay { option, error }
    }

    /// The error of the kernel.
    pub fn error(&self) -> &io::Error {
        let (Self::Source { error, .. }
        | Self::InUse { error, .. }
        | Self::Overlay { error, .. }
        | Self::Namespace { error, .. }) = self;
        error
    }
}

fn explained_of_overlay(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(nix::libc::ELOOP) => {
            "two of its directories are the same one, or one lies in another".to_owned()
        }
        Some(nix::libc::EINVAL) => {
            format!(
                "{error}: the kernel log says why, such as a file system that can't be used for it"
            )
        }
        _ => error.to_string(),
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

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> AttachError {
    move |error| AttachError::Namespace { what, error }
}

/// Moves this process into a mount namespace of its own, in which what was planned is mounted below the directory of the start.
pub fn attach(plan: &MountPlan, task_dir: &Path) -> Result<(), AttachError> {
    let mut mappings = Mappings::default();
    // Still in the host's namespace, so that a copy can follow later mounts of the original.
    let mounts = plan.mounts.iter();
    let opened = mounts.map(|mount| open(mount, plan.ids, &mut mappings));
    let opened: Vec<_> = opened.collect::<Result<_, _>>()?;
    let root = plan.root.as_deref();
    let root = root.map(|root| open_root(root, plan.ids, &mut mappings));
    let root = root.transpose()?;
    // The path may lead through links of the host; systemd-nspawn gets it as it is.
    let real = task_dir
        .canonicalize()
        .map_err(failed("examining the directory of the start"))?;
    let directory = &directory(&real);
    let made = DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(directory);
    made.map_err(failed("making the directory of the mounts"))?;
    enter_own(plan, &[task_dir, &real]).map_err(failed("entering a mount namespace"))?;
    for_mount_points(directory).map_err(failed("mounting a tmpfs for mount points"))?;
    let mut attached = Vec::new();
    for (index, (opened, planned)) in opened.into_iter().zip(&plan.mounts).enumerate() {
        let at = place_of(directory, index);
        attached.push(match opened {
            Opened::Tree(opened) => {
                let done = opened.attach(&at);
                done.map_err(failed("attaching a mount in its place"))?;
                opened.inside
            }
            Opened::Overlay(overlay) => {
                overlay.mount(&at, &directory.join(format!("layers-{index}")))?;
                Inside::of_overlay(&at, plan.ids.filter(|_| planned.mapped))
                    .map_err(failed("opening an overlay"))?
            }
        });
        if index == 0 {
            failpoint::hit(&real, Failpoint::Mounting);
        }
    }
    make_mount_points(plan, &attached)?;
    if let Some(root) = root {
        root.attach(&directory.join("root"))
            .map_err(failed("attaching the root in its place"))?;
    }
    Ok(())
}

fn enter_own(plan: &MountPlan, task_dirs: &[&Path]) -> io::Result<()> {
    let used: Vec<_> = plan.used.iter().map(PathBuf::as_path).collect();
    let whole: Vec<_> = plan.whole.iter().map(PathBuf::as_path).collect();
    namespace::enter_own(&[&used[..], task_dirs].concat(), &whole)
}

/// Mounts the file system that holds the mount points, which is gone with the namespace.
fn for_mount_points(directory: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let (source, kind, options) = ("nomad-driver-nspawn", "tmpfs", "mode=0700,size=1m");
    Ok(mount(
        Some(source),
        directory,
        Some(kind),
        flags,
        Some(options),
    )?)
}

/// A mount that has been opened.
enum Opened {
    Tree(OpenedTree),
    Overlay(OpenedOverlay),
}

/// A copy of what is mounted at a place.
struct OpenedTree {
    tree: MountTree,
    /// What is mounted below it, by the path from there, if the tree does not hold that.
    below: Vec<(PathBuf, MountTree)>,
    inside: Inside,
    /// The propagation that it gets where it is attached, if the kernel can't set it before.
    propagation: Option<MsFlags>,
}

/// What mount points are made in.
struct Inside {
    place: OwnedFd,
    is_directory: bool,
    /// The user and the group that are the container's root, if the ids are mapped.
    root: Option<(u32, u32)>,
}

impl Inside {
    /// An overlay shows the ids that its directories are mapped to.
    fn of_overlay(at: &Path, ids: Option<IdRange>) -> io::Result<Self> {
        Ok(Self {
            place: place(at)?,
            is_directory: true,
            root: ids.map(|ids| (ids.first, ids.first)),
        })
    }
}

impl OpenedTree {
    /// Attaches it at this path, where nothing is yet.
    fn attach(&self, at: &Path) -> io::Result<()> {
        match self.inside.is_directory {
            true => fs::create_dir(at)?,
            false => drop(File::create_new(at)?),
        }
        self.tree.attach(place(at)?.as_fd())?;
        for (path, tree) in &self.below {
            // A place that another mount covers is not seen in the original either.
            match place_as_it_is(&at.join(path)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                over => tree.attach(over?.as_fd())?,
            }
        }
        let Some(propagation) = self.propagation else {
            return Ok(());
        };
        const NONE: Option<&str> = None;
        Ok(mount(NONE, at, NONE, MsFlags::MS_REC | propagation, NONE)?)
    }
}

/// Lets a copy follow the later mounts of its original, or not. It must not share them: what is attached in it would be mounted on the host as well.
/// Kernels before 5.12 can do that only where it is attached: then that is returned.
fn propagate(tree: &MountTree, follow: bool) -> io::Result<Option<MsFlags>> {
    match tree.follow_later_mounts(follow) {
        Ok(()) => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOSYS) => Ok(Some(match follow {
            true => MsFlags::MS_SLAVE,
            false => MsFlags::MS_PRIVATE,
        })),
        Err(error) => Err(error),
    }
}

/// Makes what is missing of the mount points of mounts in mapped mounts.
fn make_mount_points(plan: &MountPlan, attached: &[Inside]) -> Result<(), AttachError> {
    let mounts = || plan.mounts.iter().zip(attached);
    let of_mounts = mounts().map(|(mount, inside)| {
        let option = mount.option.as_deref();
        (&mount.target, inside.is_directory, option)
    });
    let of_tmpfs = plan.tmpfs.iter().map(|target| (target, true, None));
    for (target, is_directory, option) in of_mounts.chain(of_tmpfs) {
        let is_above = |other: &PathBuf| target != other && target.starts_with(other);
        let depth = |path: &Path| path.components().count();
        let nearest = mounts()
            .filter(|(outer, _)| is_above(&outer.target))
            .max_by_key(|(outer, _)| depth(&outer.target));
        let Some((outer, of_outer)) = nearest.filter(|(outer, _)| !outer.read_only) else {
            continue;
        };
        let mut tmpfs = plan.tmpfs.iter();
        let is_nearer = |tmpfs: &PathBuf| is_above(tmpfs) && depth(tmpfs) > depth(&outer.target);
        if tmpfs.any(is_nearer) {
            continue;
        }
        let (Some(root), Ok(below)) = (of_outer.root, target.strip_prefix(&outer.target)) else {
            continue;
        };
        let made = mount_point::make(&of_outer.place, below, is_directory, root);
        let what = "can't make the mount point in";
        made.map_err(AttachError::of_source(option, what, &outer.source))?;
    }
    Ok(())
}

/// Opens a mount, and makes of it what was planned.
fn open(
    mount: &PlannedMount,
    ids: Option<IdRange>,
    mappings: &mut Mappings,
) -> Result<Opened, AttachError> {
    if let Some(overlay) = &mount.overlay {
        return overlay::open(mount, overlay, ids, mappings).map(Opened::Overlay);
    }
    let failed = |what| AttachError::of_source(mount.option.as_deref(), what, &mount.source);
    let opened = place(&mount.source).map_err(failed("can't open"))?;
    let about = about(&opened).map_err(failed("can't examine"))?;
    let ids = ids.filter(|_| mount.mapped);
    let map = ids.map(|ids| id_map(ids, about.stx_uid, about.stx_gid));
    let copied = copy(&mount.source, &opened, map, mappings);
    let (tree, below) = copied.map_err(failed("can't copy or map the mounts at"))?;
    let denied = mount.denied();
    let follow = mount.propagation == Propagation::HostToTask && !mount.follows;
    let propagation = propagate(&tree, follow).map_err(failed("can't set the propagation of"))?;
    if mount.follows {
        // What the supervisor attaches there later appears in the container.
        tree.share()
            .map_err(failed("can't set the propagation of"))?;
    }
    deny(&tree, denied).map_err(failed("can't restrict the mounts at"))?;
    for (_, tree) in &below {
        propagate(tree, follow).map_err(failed("can't set the propagation of"))?;
        deny(tree, denied).map_err(failed("can't restrict the mounts at"))?;
    }
    Ok(Opened::Tree(OpenedTree {
        tree,
        below,
        inside: Inside {
            is_directory: FileType::from_raw_mode(about.stx_mode.into()).is_dir(),
            root: ids.map(|ids| root_of(ids, about.stx_uid, about.stx_gid)),
            place: opened,
        },
        propagation,
    }))
}

/// Kernels before 5.12 can't do that. There systemd-nspawn makes a mount read-only, and everything else is refused.
fn deny(tree: &MountTree, denied: Denied) -> io::Result<()> {
    let by_nspawn = Denied {
        write: denied.write,
        ..Denied::default()
    };
    match tree.deny(denied) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOSYS) && denied == by_nspawn => {
            Ok(())
        }
        other => other,
    }
}

/// Copies what is mounted at a place and below it, with mapped ids: as one tree, or where a mount below can't be mapped, each for itself.
fn copy(
    source: &Path,
    opened: &OwnedFd,
    map: Option<IdMap>,
    mappings: &mut Mappings,
) -> io::Result<(MountTree, Vec<(PathBuf, MountTree)>)> {
    let whole = MountTree::copy(opened.as_fd())?;
    let Some(map) = map else {
        return Ok((whole, Vec::new()));
    };
    let Err(error) = mappings.apply(&map, &whole) else {
        return Ok((whole, Vec::new()));
    };
    drop(whole);
    let top = MountTree::copy_of_one(opened.as_fd())?;
    mappings.apply(&map, &top)?;
    let mut below: Vec<(PathBuf, MountTree)> = Vec::new();
    for mount in procfs::own_mounts()? {
        let path = mount.target.strip_prefix(source);
        let Some(path) = path.ok().filter(|path| !path.as_os_str().is_empty()) else {
            continue;
        };
        // Of several at one place, the last one covers the others.
        if below.iter().any(|(known, _)| known == path) {
            continue;
        }
        let place = place_as_it_is(&mount.target);
        let tree = place.and_then(|place| MountTree::copy_of_one(place.as_fd()));
        // It is covered, has been unmounted meanwhile, or must not be copied.
        let Ok(tree) = tree else { continue };
        // It was planned that this one may fail.
        let _ = mappings.apply(&map, &tree);
        below.push((path.to_owned(), tree));
    }
    below.sort_by_key(|(path, _)| path.components().count());
    match below.is_empty() {
        true => Err(error),
        false => Ok((top, below)),
    }
}

/// Kind and owner, as far as the kernel knows them: a file system that does not answer is not asked.
pub(super) fn about(opened: &OwnedFd) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::UID | StatxFlags::GID;
    Ok(statx(opened, c"", flags, wanted)?)
}

/// Opens the root, and maps its ids.
fn open_root(
    root: &Path,
    ids: Option<IdRange>,
    mappings: &mut Mappings,
) -> Result<OpenedTree, AttachError> {
    let failed = |what| AttachError::of_source(Some("config.image"), what, root);
    let opened = place(root).map_err(failed("can't open"))?;
    let map = ids.map(|ids| id_map(ids, 0, 0));
    let copied = copy(root, &opened, map, mappings);
    let (tree, below) = copied.map_err(failed("can't copy or map the mounts at"))?;
    let propagation = propagate(&tree, true).map_err(failed("can't set the propagation of"))?;
    for (_, tree) in &below {
        propagate(tree, true).map_err(failed("can't set the propagation of"))?;
    }
    Ok(OpenedTree {
        tree,
        below,
        inside: Inside {
            place: opened,
            is_directory: true,
            root: None,
        },
        propagation,
    })
}

/// The mappings that have been made for a start. Most mounts have the same one.
#[derive(Default)]
pub(super) struct Mappings(Vec<(IdMap, OwnedFd)>);

impl Mappings {
    pub(super) fn apply(&mut self, map: &IdMap, tree: &MountTree) -> io::Result<()> {
        if let Some((_, namespace)) = self.0.iter().find(|(known, _)| known == map) {
            return tree.map_ids(namespace.as_fd());
        }
        let namespace = map.user_namespace()?;
        let mapped = tree.map_ids(namespace.as_fd());
        self.0.push((map.clone(), namespace));
        mapped
    }
}
