//! Mounts that the host makes below a source while the container runs. Propagation by the kernel would show them as the host has them; so the
//! supervisor compares the mount tables and attaches changed copies below the place of the mount, in the namespace of systemd-nspawn, from which
//! the kernel propagates them to the container. What the host has unmounted it detaches there. Nothing in the namespace of the container is
//! looked up, and what is left of all this ends with systemd-nspawn.

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use super::attach::{Mappings, about};
use super::plan::{OF_THE_KERNEL, is_of_a_mount};
use super::{IdRange, MountPlan, Unmappable, directory, id_map, place_of};
use crate::sys::IdMap;
use crate::sys::mount_namespace::MountNamespace;
use crate::sys::mount_tree::{Denied, MountTree, detach, mount_id, place, place_as_it_is};
use crate::sys::procfs::{self, Forbidden, Mount};

/// A mount of the container whose source is followed.
#[derive(Debug, Clone)]
struct Followed {
    option: String,
    source: PathBuf,
    /// Where its copy is in the namespace of systemd-nspawn.
    place: PathBuf,
    /// How the ids of files are mapped, if they are: as on the source when the container was started. The container may change its owner.
    ids: Option<IdMap>,
    denied: Denied,
}

/// A mount of the host that the container can't get.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Missing {
    source: PathBuf,
    mount: Mount,
    /// For the user.
    note: String,
}

/// How often a change is tried to be made, unless the kernel reports another one: what has been replaced while it was copied may look the same as
/// before, and what is covered can't be copied at all.
const ATTEMPTS: u8 = 3;

/// What the host has mounted below the sources that are followed, as it was seen last.
#[derive(Debug)]
pub struct LaterMounts {
    followed: Vec<Followed>,
    nspawn: i32,
    /// `None` before the first look.
    seen: Option<Vec<Mount>>,
    missing: Vec<Missing>,
    /// Whether the container has all that was seen, but for what is missing.
    is_done: bool,
    attempts_left: u8,
}

/// What has become of a change.
#[derive(Debug)]
pub struct Outcome {
    /// What the host had mounted when it was made. Only what was copied then is known for certain to look different from what follows.
    host: Vec<Mount>,
    /// What the container can't get, other than what was known.
    missing: Vec<Missing>,
    /// Whether nothing was gone or covered when it was to be copied.
    is_done: bool,
}

impl LaterMounts {
    /// Those of a start, whose systemd-nspawn has this pid. `None` if it follows no source.
    pub fn of(plan: &MountPlan, task_dir: &Path, nspawn: i32) -> io::Result<Option<Self>> {
        if !plan.mounts.iter().any(|mount| mount.follows) {
            return Ok(None);
        }
        let directory = directory(&task_dir.canonicalize()?);
        let mounts = plan.mounts.iter().enumerate();
        let followed = mounts
            .filter(|(_, mount)| mount.follows)
            .map(|(index, mount)| {
                let ids = plan.ids.filter(|_| mount.mapped);
                Ok(Followed {
                    option: mount.option.clone().unwrap_or_default(),
                    source: mount.source.clone(),
                    place: place_of(&directory, index),
                    ids: ids.map(|ids| map_of(ids, &mount.source)).transpose()?,
                    denied: mount.denied(),
                })
            });
        Ok(Some(Self {
            followed: followed.collect::<io::Result<_>>()?,
            nspawn,
            seen: None,
            missing: Vec::new(),
            is_done: false,
            attempts_left: 0,
        }))
    }

    /// Looks whether the host has changed something below a source, and returns what is to be done then. Reads nothing but mount tables.
    /// `is_reported` is whether the kernel has reported a change of the table since the last look.
    pub fn look(&mut self, is_reported: bool) -> io::Result<Option<Work>> {
        let host = on_host(&self.followed)?;
        if self.seen.as_ref() != Some(&host) || (is_reported && !self.is_done) {
            self.attempts_left = ATTEMPTS;
        }
        if self.attempts_left == 0 {
            return Ok(None);
        }
        self.missing.retain(|missing| host.contains(&missing.mount));
        let differs = self.differs(&host)?;
        self.seen = Some(host);
        if !differs {
            (self.is_done, self.attempts_left) = (true, 0);
            return Ok(None);
        }
        self.attempts_left -= 1;
        Ok(Some(Work {
            followed: self.followed.clone(),
            nspawn: self.nspawn,
            namespace: MountNamespace::of_process(self.nspawn)?,
            missing: self.missing.clone(),
            is_last: self.attempts_left == 0,
        }))
    }

    fn differs(&self, host: &[Mount]) -> io::Result<bool> {
        let inside = in_namespace_of(self.nspawn, &self.followed)?;
        Ok(self.followed.iter().any(|followed| {
            let tables = Tables::of(followed, host, &inside);
            let is_missing = |mount: &&Mount| {
                let mut missing = self.missing.iter();
                missing.any(|missing| missing.hides(followed, mount, host))
            };
            !tables.gone().is_empty() || !tables.added().iter().all(is_missing)
        }))
    }

    /// Remembers what has become of a change, so that nothing is tried again in vain.
    pub fn remember(&mut self, outcome: io::Result<Outcome>) {
        match outcome {
            Ok(outcome) => {
                self.missing.extend(outcome.missing);
                self.seen = Some(outcome.host);
                self.is_done = outcome.is_done;
            }
            Err(_) => self.is_done = false,
        }
        if self.is_done {
            self.attempts_left = 0;
        }
    }
}

impl Outcome {
    /// What the user should know.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.missing.iter().map(|missing| missing.note.clone())
    }
}

/// A change that is to be made in the namespace of systemd-nspawn.
#[derive(Debug)]
pub struct Work {
    followed: Vec<Followed>,
    nspawn: i32,
    namespace: MountNamespace,
    missing: Vec<Missing>,
    /// Whether it is not tried again.
    is_last: bool,
}

impl Work {
    /// Makes the change. A mount that is gone meanwhile is ignored: that is another change. Blocks on the file systems that have been mounted.
    pub fn run(self) -> io::Result<Outcome> {
        let host = on_host(&self.followed)?;
        let inside = in_namespace_of(self.nspawn, &self.followed)?;
        self.namespace.run(|| {
            let followed = self.followed.iter();
            for tables in followed.map(|followed| Tables::of(followed, &host, &inside)) {
                for gone in tables.gone().iter().rev() {
                    remove(gone, &tables.inside)?;
                }
            }
            Ok(())
        })?;
        // Mounts that lay on one that is gone have been removed with it.
        let inside = in_namespace_of(self.nspawn, &self.followed)?;
        let all = self.followed.iter();
        let mut all = all.map(|followed| Tables::of(followed, &host, &inside));
        // What is left was renamed meanwhile, also by the container, or is covered.
        let (mut copies, mut is_done) = (Vec::new(), all.all(|tables| tables.gone().is_empty()));
        let mut missing = self.missing.clone();
        let mut mappings = Mappings::default();
        for followed in &self.followed {
            for mount in Tables::of(followed, &host, &inside).added() {
                if missing
                    .iter()
                    .any(|known| known.hides(followed, mount, &host))
                {
                    continue;
                }
                match copy(followed, mount, &mut mappings) {
                    Ok(Some(tree)) => copies.push((followed, mount, tree)),
                    Ok(None) => is_done = false,
                    Err(why) if why.may_pass() && !self.is_last => is_done = false,
                    Err(why) => missing.push(Missing::new(followed, mount, &why)),
                }
            }
        }
        let attached = self.namespace.run(|| {
            for (followed, mount, tree) in copies {
                if missing
                    .iter()
                    .any(|known| known.hides(followed, mount, &host))
                {
                    continue;
                }
                match attach(followed, mount, &tree) {
                    Ok(is_attached) => is_done &= is_attached,
                    Err(_) if !self.is_last => is_done = false,
                    Err(error) => missing.push(Missing::new(followed, mount, &Why::Failed(error))),
                }
            }
            Ok(())
        });
        attached.map(|()| Outcome {
            missing: missing.split_off(self.missing.len()),
            host,
            is_done,
        })
    }
}

/// Why the container can't get a mount.
enum Why {
    Unmappable(Unmappable),
    Failed(io::Error),
}

impl Why {
    /// Whether another attempt may succeed with nothing changed.
    fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Failed(_) | Self::Unmappable(Unmappable::Failed(_))
        )
    }
}

impl Missing {
    fn new(followed: &Followed, mount: &Mount, why: &Why) -> Self {
        let what = format!(
            "{}: what the host has mounted at {} does not appear in the task",
            followed.option,
            mount.target.display()
        );
        let note = match why {
            Why::Unmappable(why) => format!(
                "{what}: the ids of its files can't be mapped to those of the container, because {why}. Use another file system; or set \
                 idmap = false, with which they belong to nobody; or set config.user_namespacing = false"
            ),
            Why::Failed(error) => format!("{what}: it can't be copied: {error}"),
        };
        Self {
            source: followed.source.clone(),
            mount: mount.clone(),
            note,
        }
    }

    /// Whether it is this mount below this source, or this one is on it, or on another that is on it.
    fn hides(&self, followed: &Followed, mount: &Mount, host: &[Mount]) -> bool {
        let parent = |mount: &&Mount| host.iter().find(|other| other.id == mount.parent);
        let mut chain = std::iter::successors(Some(mount), parent).take(host.len() + 1);
        self.source == followed.source && chain.any(|mount| *mount == self.mount)
    }
}

/// How the ids of this source are mapped.
fn map_of(ids: IdRange, source: &Path) -> io::Result<IdMap> {
    let top = place(source).and_then(|top| about(&top))?;
    Ok(id_map(ids, top.stx_uid, top.stx_gid))
}

/// The path below a top, without a slash at its end.
fn below(top: &Path, path: &Path) -> PathBuf {
    match path.as_os_str().is_empty() {
        true => top.to_owned(),
        false => top.join(path),
    }
}

fn on_host(followed: &[Followed]) -> io::Result<Vec<Mount>> {
    procfs::mounts_at(Path::new("/proc/self/mountinfo"), |target| {
        let mut followed = followed.iter();
        followed.any(|followed| target.starts_with(&followed.source))
    })
}

/// Nothing if systemd-nspawn has exited.
fn in_namespace_of(nspawn: i32, followed: &[Followed]) -> io::Result<Vec<Mount>> {
    let table = PathBuf::from(format!("/proc/{nspawn}/mountinfo"));
    let mounts = procfs::mounts_at(&table, |target| {
        let mut followed = followed.iter();
        followed.any(|followed| target.starts_with(&followed.place))
    });
    match mounts {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(Vec::new()),
        other => other,
    }
}

/// The mounts below a source and those below its place. Two are the same if they show the same directory of the same file system at the same path,
/// and forbid the same: as long as a copy exists, its device is that of no other file system.
struct Tables<'a> {
    followed: &'a Followed,
    host: Vec<&'a Mount>,
    /// Without the mount at the place itself.
    inside: Vec<&'a Mount>,
    /// The mount at the place itself.
    base: Option<&'a Mount>,
}

type Key<'a> = (&'a Path, (u32, u32), &'a Path);

fn key<'a>(mount: &'a Mount, top: &Path) -> Option<Key<'a>> {
    let path = mount.target.strip_prefix(top).ok()?;
    Some((path, mount.device, &mount.root))
}

impl<'a> Tables<'a> {
    fn of(followed: &'a Followed, host: &'a [Mount], inside: &'a [Mount]) -> Self {
        let at = |mounts: &'a [Mount], top: &Path| -> Vec<&'a Mount> {
            let mounts = mounts.iter();
            mounts
                .filter(|mount| mount.target.starts_with(top))
                .collect()
        };
        let all = at(inside, &followed.place);
        let is_base = |mount: &&Mount| !all.iter().any(|other| other.id == mount.parent);
        let (base, inside): (Vec<_>, Vec<_>) = all.iter().partition(|mount| is_base(mount));
        Self {
            followed,
            host: at(host, &followed.source),
            inside,
            base: base.first().copied(),
        }
    }

    /// What is in the place and no longer on the host.
    fn gone(&self) -> Vec<&'a Mount> {
        let of_host = |mount: &Mount| self.host.iter().any(|other| self.is_copy(mount, other));
        let inside = self.inside.iter().copied();
        inside.filter(|mount| !of_host(mount)).collect()
    }

    fn is_copy(&self, inside: &Mount, host: &Mount) -> bool {
        let Denied {
            write,
            set_user_id,
            devices,
            execution,
        } = self.followed.denied;
        let expected = Forbidden {
            write: host.forbids.write || write,
            set_user_id: host.forbids.set_user_id || set_user_id,
            devices: host.forbids.devices || devices,
            execution: host.forbids.execution || execution,
        };
        inside.forbids == expected && self.is_same_place(inside, host)
    }

    fn is_same_place(&self, inside: &Mount, host: &Mount) -> bool {
        key(host, &self.followed.source) == key(inside, &self.followed.place)
    }

    /// What is on the host and not in the place, outer mounts first. The source itself is what the container was started with. One that another covers
    /// can't be copied, and is not seen.
    fn added(&self) -> Vec<&'a Mount> {
        let Some(base) = self.base else {
            return Vec::new();
        };
        let has = |mount: &Mount| {
            let mut inside = self.inside.iter();
            self.is_same_place(base, mount) || inside.any(|other| self.is_copy(other, mount))
        };
        let is_covered = |mount: &Mount| {
            let mut host = self.host.iter();
            host.any(|other| other.parent == mount.id && other.target == mount.target)
        };
        let host = self.host.iter().copied();
        let new = host.filter(|mount| !has(mount) && !is_covered(mount));
        let mut new: Vec<_> = new.collect();
        new.sort_by_key(|mount| mount.target.components().count());
        new
    }
}

/// Detaches a mount below a place, and what covers it. In the namespace of systemd-nspawn.
fn remove(gone: &Mount, inside: &[&Mount]) -> io::Result<()> {
    loop {
        let Some(id) = seen_at(&gone.target) else {
            return Ok(());
        };
        // The mount at the place itself is not among them: then this one has been removed with another.
        let Some(top) = inside.iter().find(|mount| mount.id == id) else {
            return Ok(());
        };
        let place = place_as_it_is(&top.target)?;
        if mount_id(place.as_fd())? != id {
            return Ok(());
        }
        detach(place.as_fd())?;
        if id == gone.id {
            return Ok(());
        }
    }
}

/// The number of the mount that is seen at a path; none if there is nothing.
fn seen_at(path: &Path) -> Option<u32> {
    mount_id(place_as_it_is(path).ok()?.as_fd()).ok()
}

/// None if it has been unmounted, is covered, or must not be copied.
fn copy(
    followed: &Followed,
    mount: &Mount,
    mappings: &mut Mappings,
) -> Result<Option<MountTree>, Why> {
    let Some(tree) = copy_as_it_is(mount) else {
        return Ok(None);
    };
    if let Some(map) = &followed.ids
        && let Err(error) = mappings.apply(map, &tree)
        && !OF_THE_KERNEL.contains(&mount.kind.as_str())
    {
        return Err(Why::Unmappable(unmappable(mount, &error)));
    }
    tree.follow_later_mounts(false)
        .and_then(|()| tree.deny(followed.denied))
        .map_err(Why::Failed)?;
    Ok(Some(tree))
}

fn copy_as_it_is(mount: &Mount) -> Option<MountTree> {
    let place = place_as_it_is(&mount.target).ok()?;
    let is_seen = mount_id(place.as_fd()).ok()? == mount.id;
    MountTree::copy_of_one(place.as_fd())
        .ok()
        .filter(|_| is_seen)
}

/// Attaches a copy in the namespace of systemd-nspawn. A directory that has been renamed since the tables were read, also by the container, is left
/// to the next attempt: then it returns false.
fn attach(followed: &Followed, mount: &Mount, tree: &MountTree) -> io::Result<bool> {
    let path = mount.target.strip_prefix(&followed.source);
    let path = below(&followed.place, path.map_err(io::Error::other)?);
    match place_as_it_is(&path) {
        Ok(over) => tree.attach(over.as_fd()).map(|()| true),
        Err(_) => Ok(false),
    }
}

fn unmappable(mount: &Mount, error: &io::Error) -> Unmappable {
    let at = mount.target.clone();
    match error.raw_os_error() {
        Some(nix::libc::EPERM) => Unmappable::Mapped { at },
        _ if is_of_a_mount(error) => Unmappable::FileSystem {
            at,
            kind: mount.kind.clone(),
        },
        _ => Unmappable::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn followed() -> Followed {
        Followed {
            option: "config.bind[\"/v\"]".to_owned(),
            source: "/v".into(),
            place: "/t/mounts/1".into(),
            ids: None,
            denied: Denied::default(),
        }
    }

    fn table(lines: &[&str]) -> Vec<Mount> {
        let lines = lines.iter();
        let text: String = lines
            .map(|line| {
                let [id, parent, device, root, target] = line.split(' ').collect::<Vec<_>>()[..]
                else {
                    panic!("{line}")
                };
                format!("{id} {parent} 0:{device} {root} {target} rw - ext4 /dev/x rw\n")
            })
            .collect();
        procfs::parse_mountinfo(text.as_bytes())
    }

    /// The mount points of what is gone and of what is new.
    fn difference(host: &[&str], inside: &[&str]) -> (Vec<String>, Vec<String>) {
        let (host, inside, followed) = (table(host), table(inside), followed());
        let tables = Tables::of(&followed, &host, &inside);
        let targets = |mounts: Vec<&Mount>| {
            let targets = mounts.iter().map(|mount| &mount.target);
            targets.map(|target| target.display().to_string()).collect()
        };
        (targets(tables.gone()), targets(tables.added()))
    }

    /// A source that is a directory of the root, and one that is a mount of its own.
    const BASE: &str = "90 80 1 /v /t/mounts/1";
    const OF_DEVICE: &str = "90 80 2 / /t/mounts/1";

    #[rstest]
    #[case::nothing(&[], &[BASE], &[], &[])]
    #[case::the_source_itself(&["10 1 2 / /v"], &[OF_DEVICE], &[], &[])]
    #[case::the_source_has_been_unmounted(&[], &[OF_DEVICE], &[], &[])]
    #[case::another_one_over_the_source(&["10 1 2 / /v", "11 10 3 / /v"], &[OF_DEVICE], &[], &["/v"])]
    #[case::the_other_one_is_gone(&["10 1 2 / /v"], &[OF_DEVICE, "91 90 3 / /t/mounts/1"], &["/t/mounts/1"], &[])]
    #[case::the_same(&["10 1 2 / /v/a"], &[BASE, "91 90 2 / /t/mounts/1/a"], &[], &[])]
    #[case::new(&["10 1 2 / /v/a"], &[BASE], &[], &["/v/a"])]
    #[case::gone(&[], &[BASE, "91 90 2 / /t/mounts/1/a"], &["/t/mounts/1/a"], &[])]
    #[case::another_file_system(&["10 1 3 / /v/a"], &[BASE, "91 90 2 / /t/mounts/1/a"], &["/t/mounts/1/a"], &["/v/a"])]
    #[case::another_directory(&["10 1 2 /x /v/a"], &[BASE, "91 90 2 / /t/mounts/1/a"], &["/t/mounts/1/a"], &["/v/a"])]
    #[case::moved(&["10 1 2 / /v/b"], &[BASE, "91 90 2 / /t/mounts/1/a"], &["/t/mounts/1/a"], &["/v/b"])]
    #[case::outer_ones_first(&["11 10 3 / /v/a/b/c", "10 1 2 / /v/a"], &[BASE], &[], &["/v/a", "/v/a/b/c"])]
    #[case::below_one_that_is_there(&["10 1 2 / /v/a", "11 10 3 / /v/a/b"], &[BASE, "91 90 2 / /t/mounts/1/a"], &[], &["/v/a/b"])]
    #[case::one_over_another(&["10 1 2 / /v/a", "11 10 3 / /v/a"], &[BASE, "91 90 2 / /t/mounts/1/a"], &[], &["/v/a"])]
    #[case::covered(&["10 1 2 / /v/a", "11 10 3 / /v/a"], &[BASE], &[], &["/v/a"])]
    #[case::names_with_the_same_beginning(&["10 1 2 / /vv"], &[BASE, "91 80 2 / /t/mounts/10"], &[], &[])]
    #[case::the_namespace_is_gone(&["10 1 2 / /v/a"], &[], &[], &[])]
    fn tables_are_compared(
        #[case] host: &[&str],
        #[case] inside: &[&str],
        #[case] gone: &[&str],
        #[case] new: &[&str],
    ) {
        let (found_gone, found_new) = difference(host, inside);
        assert_eq!((found_gone, found_new), (owned(gone), owned(new)));
    }

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }
}
