//! What dead plugins left: the starts in a state directory, supervisors and control groups whose start is not recorded any more.
//! Finds and tells apart; of what it ends itself it is certain that this state directory's driver made it. Names and files are
//! taken for hostile until they have been checked, and links are never followed. Whether somebody still wants a start is asked
//! elsewhere, see `claim`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::process::{Held, children};
use super::record::{Order, Records};
use super::remains::{self, descendants};
use super::state_dir;
use crate::cgroup::{Group, Layout};
use crate::signal::Signal;

/// An empty group younger than this may be one in which a container is just about to be started, be it by a plugin with another
/// state directory.
const STALE: Duration = Duration::from_secs(60);

/// How long a supervisor may take to free everything once its container was ended.
const FREEING: Duration = Duration::from_secs(15);

/// What lies in a state directory.
#[derive(Debug, Default)]
pub struct Survey {
    /// Directories of starts.
    pub starts: Vec<Records>,
    /// What the driver did not make, and how that is seen.
    pub foreign: Vec<(PathBuf, String)>,
}

/// Looks through a state directory. One that is not there holds nothing; one that others can write is an error, because nothing
/// in it can be trusted then.
pub fn survey(state_dir: &Path) -> io::Result<Survey> {
    let mut survey = Survey::default();
    state_dir::check(state_dir).map_err(io::Error::other)?;
    let entries = match fs::read_dir(state_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(survey),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        match judge(state_dir, &path) {
            Ok(None) => survey.starts.push(Records::at(path)),
            Ok(Some(reason)) => survey.foreign.push((path, reason)),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => survey
                .foreign
                .push((path, format!("it can't be read: {error}"))),
        }
    }
    Ok(survey)
}

/// Why what lies in these records, in whatever state directory, is no start of the driver's, if it is none.
pub fn foreign(records: &Records) -> io::Result<Option<String>> {
    let state_dir = records.path().parent().unwrap_or_else(|| Path::new("/"));
    if let Err(refused) = state_dir::check(state_dir) {
        return Ok(Some(refused.to_string()));
    }
    judge(state_dir, records.path())
}

/// Why this is no start of the driver's, if it is none.
fn judge(state_dir: &Path, path: &Path) -> io::Result<Option<String>> {
    let foreign = |reason: &str| Ok(Some(reason.to_owned()));
    let name = path.file_name().and_then(|name| name.to_str());
    if !name.is_some_and(Records::is_name) {
        return foreign("it is not called like a start");
    }
    let about = path.symlink_metadata()?;
    if !about.is_dir() {
        return foreign("it is not a directory");
    }
    if about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        return foreign("it is not for the driver's own user alone");
    }
    let records = Records::at(path);
    match records.order() {
        Ok(order) if Records::of(state_dir, &order.id) != records => {
            foreign("its order is another start's")
        }
        // A newer driver's, perhaps with a container that this one must not touch.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(Some(error.to_string())),
        Ok(order) if !is_sound(&order, &records) => foreign("its order names what is not its own"),
        Ok(_) => Ok(None),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData
            ) =>
        {
            // Nothing but the name tells that it is ours, so nothing else may lie in it.
            let stranger = records.stranger()?;
            Ok(stranger.map(|name| format!("{} lies in it", name.display())))
        }
        Err(error) => Err(error),
    }
}

/// Whether an order names a machine and a group that can be its own: both become paths of what is removed.
fn is_sound(order: &Order, records: &Records) -> bool {
    let machine = !order.machine.is_empty()
        && order.machine.len() <= 64
        && !order.machine.starts_with('.')
        && order
            .machine
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    machine
        && order
            .resources
            .iter()
            .all(|resource| resource.is_own(records))
}

/// A supervisor of this state directory, by its command line.
#[derive(Debug)]
pub struct Supervisor {
    /// The process.
    pub held: Held,
    /// The directory of the start it watches over, which may not be there any more.
    pub directory: PathBuf,
}

/// The supervisors whose starts belong into this state directory.
pub fn supervisors(state_dir: &Path) -> Vec<Supervisor> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter_map(|pid: i32| supervisor(pid, state_dir))
        .collect()
}

/// The supervisors of this start.
pub fn supervisors_of(records: &Records) -> Vec<Supervisor> {
    let state_dir = records.path().parent().unwrap_or_else(|| records.path());
    let mut found = supervisors(state_dir);
    found.retain(|supervisor| supervisor.directory == records.path());
    found
}

fn supervisor(pid: i32, state_dir: &Path) -> Option<Supervisor> {
    // Held before the look: what is seen afterwards is this process or none.
    let held = Held::by_pid(pid).ok()?;
    let about = fs::metadata(format!("/proc/{pid}")).ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    let ours = about.uid() == nix::unistd::geteuid().as_raw()
        && words.next() == Some(b"nomad-driver-nspawn")
        && words.next() == Some(b"supervise");
    let directory = PathBuf::from(OsString::from_vec(words.next()?.to_owned()));
    let name = directory.file_name()?.to_str()?;
    (ours && directory.parent() == Some(state_dir) && Records::is_name(name))
        .then_some(Supervisor { held, directory })
}

impl Supervisor {
    /// Whether the start it watches over is not recorded any more, so that nobody can ever ask for it.
    pub fn is_lost(&self) -> bool {
        let there = self.directory.symlink_metadata();
        there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Lets one that was stopped go on. One that runs takes no notice.
    pub fn rouse(&self) {
        let _ = self.held.signal(Signal::CONT);
    }

    /// Ends its container, so that it frees everything and ends by itself; by force if it does not.
    pub fn end(&self) {
        self.rouse();
        let pid = self.held.process().pid;
        for child in children(pid) {
            if let Ok(child) = Held::by_pid(child) {
                let _ = child.signal(Signal::KILL);
            }
        }
        if self.held.wait(FREEING) {
            return;
        }
        let below = descendants(pid).into_iter().skip(1);
        let below: Vec<Held> = below.filter_map(|pid| Held::by_pid(pid).ok()).collect();
        let _ = self.held.signal(Signal::KILL);
        self.held.wait(FREEING);
        for process in below {
            let _ = process.signal(Signal::KILL);
        }
    }
}

/// The driver's control groups that belong to no start that is recorded in this state directory: those in which a systemd-nspawn
/// of this state directory runs, wherever they lie, and those of the driver's own subtree that have been empty for long.
pub fn groups(state_dir: &Path) -> Vec<PathBuf> {
    let layout = Layout::of_this_host();
    let mut leaves = layout.leaves(Records::is_name);
    leaves.retain(|leaf| is_left(&layout, leaf, state_dir).unwrap_or(false));
    leaves
}

fn is_left(layout: &Layout, leaf: &Path, state_dir: &Path) -> Option<bool> {
    let name = leaf.file_name()?.to_str()?;
    // Asked after the group was seen: a start is recorded before its group is made and as long as it is there.
    let recorded = state_dir.join(name).symlink_metadata().is_ok();
    if recorded || !Records::is_name(name) {
        return Some(false);
    }
    let processes = Group::new(leaf).processes();
    if !processes.is_empty() {
        let socket = Records::at(state_dir.join(name)).notify();
        return Some(processes.iter().any(|pid| tells(*pid, &socket)));
    }
    // Elsewhere a name is no proof.
    if !layout.is_own(leaf) {
        return Some(false);
    }
    let changed = fs::metadata(leaf).and_then(|about| about.modified()).ok()?;
    Some(SystemTime::now().duration_since(changed).ok()? > STALE)
}

/// Whether a process was started to tell this socket of its start.
fn tells(pid: i32, socket: &Path) -> bool {
    let mut want = b"NOTIFY_SOCKET=".to_vec();
    want.extend_from_slice(socket.as_os_str().as_encoded_bytes());
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == want)
}

/// Ends what runs in such a group and removes it, with what systemd-nspawn has made in its likeness in another hierarchy. One that
/// was empty and is no more is an error.
pub fn remove_group(group: &Path, state_dir: &Path) -> io::Result<()> {
    let layout = Layout::of_this_host();
    match is_left(&layout, group, state_dir) {
        Some(true) if Group::new(group).processes().is_empty() => Group::new(group).remove(),
        Some(true) => {
            remains::empty(group, true)?;
            let name = group.file_name().and_then(|name| name.to_str());
            let alike = layout.find(name.unwrap_or_default());
            alike
                .iter()
                .try_for_each(|group| Group::new(group).remove())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::an_order;
    use super::super::resource::{Cgroup, CgroupMirror, Resource};
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn ordered(state_dir: &Path, id: &str, change: impl FnOnce(&mut Order)) -> Records {
        let records = Records::of(state_dir, id);
        records.create().unwrap();
        let mut order = an_order(id);
        change(&mut order);
        records.write_order(&order, &BTreeMap::new(), None).unwrap();
        records
    }

    fn in_group(group: PathBuf) -> Resource {
        Resource::Cgroup(Cgroup { group })
    }

    #[test]
    fn only_what_the_driver_made_counts_as_a_start() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let group = |records: &Records, above: &str| {
            Path::new(above).join(records.path().file_name().unwrap())
        };
        let whole = ordered(dir, "a/whole/1", |_| {});
        let placed = Records::of(dir, "a/placed/1");
        ordered(dir, "a/placed/1", |order| {
            let mirror = group(&placed, "/m");
            order.resources = vec![
                in_group(group(&placed, "/g/x")),
                Resource::CgroupMirror(CgroupMirror { group: mirror }),
            ];
        });
        let bare = Records::of(dir, "a/bare/1");
        bare.create().unwrap();
        let torn = ordered(dir, "a/torn/1", |_| {});
        fs::write(torn.path().join("order"), "{").unwrap();

        fs::write(dir.join("note"), "").unwrap();
        fs::create_dir(dir.join("else")).unwrap();
        let strange = Records::of(dir, "a/strange/1");
        strange.create().unwrap();
        fs::write(strange.path().join("thesis"), "").unwrap();
        let open = ordered(dir, "a/open/1", |_| {});
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
        symlink(whole.path(), Records::of(dir, "a/link/1").path()).unwrap();
        let moved = Records::of(dir, "a/moved/1");
        fs::rename(ordered(dir, "a/other/1", |_| {}).path(), moved.path()).unwrap();
        let linked = Records::of(dir, "a/linked/1");
        linked.create().unwrap();
        symlink(whole.path().join("order"), linked.path().join("order")).unwrap();
        for (name, machine) in [("up", "../../etc"), ("none", ""), ("dot", "..")] {
            ordered(dir, &format!("a/{name}/1"), |order| {
                order.machine = machine.to_owned()
            });
        }
        let newer = ordered(dir, "a/newer/1", |_| {});
        let text = fs::read_to_string(newer.path().join("order")).unwrap();
        let text = text.replace("\"form\":1", "\"form\":2");
        fs::write(newer.path().join("order"), text).unwrap();
        ordered(dir, "a/group/1", |order| {
            let group = PathBuf::from("/sys/fs/cgroup/system.slice");
            order.resources = vec![in_group(group)];
        });
        let climbing = Records::of(dir, "a/climbing/1");
        ordered(dir, "a/climbing/1", |order| {
            let group = group(&climbing, "/g/../..");
            order.resources = vec![in_group(group)];
        });

        let survey = survey(dir).unwrap();
        let mut starts: Vec<_> = survey.starts.iter().map(Records::path).collect();
        let mut want = [&whole, &placed, &bare, &torn].map(Records::path);
        starts.sort();
        want.sort();
        assert_eq!(starts, want);
        assert_eq!(survey.foreign.len(), 13, "{:?}", survey.foreign);
    }

    #[test]
    fn a_directory_that_others_can_write_is_not_looked_through() {
        let temp = tempfile::tempdir().unwrap();
        assert!(survey(&temp.path().join("none")).unwrap().starts.is_empty());
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o777)).unwrap();
        survey(temp.path()).unwrap_err();
    }
}
