//! What is left of a start when nobody watches over it any more: processes, control groups, systemd-nspawn's own droppings.
//! Ends and frees only what the records of that start name, and may be repeated at will.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::process::{Held, children, first_child};
use super::record::{Order, Records, Running};
use super::{tree_lock, zone};
use crate::cgroup::{Group, Layout, freezer};
use crate::container::Process;
use crate::nspawn::probe;
use crate::procfs;
use crate::signal::Signal;

/// Where systemd-nspawn keeps the locks of the ranges of user ids that it has picked.
const UIDS: &str = "/run/systemd/nspawn-uid";

/// How long killed processes may take to go.
const GONE: Duration = Duration::from_secs(10);

/// Ends every process that belongs to the start of these records and frees what it held on the host. The records themselves
/// stay. The error names what is still there.
pub fn end(records: &Records) -> io::Result<()> {
    let boot = probe::boot_id()?;
    let running = records.running().ok();
    // In another boot the same numbers may mean anybody, even with the start time.
    if let Some(running) = running
        .as_ref()
        .filter(|running| running.started.boot == boot)
    {
        // The leader first: everything in its pid namespace dies with it, and a systemd-nspawn that sees it end clears up
        // after itself, unless somebody has stopped it.
        kill(running.started.leader);
        if let Some(group) = &running.started.cgroup {
            Group::new(group).thaw();
        }
        let watched = Held::again(running.nspawn);
        if let Ok(nspawn) = &watched {
            let _ = nspawn.signal(Signal::CONT);
        }
        match watched.map(|nspawn| nspawn.wait(Duration::from_secs(2))) {
            Ok(true) => records.write_released()?,
            _ => kill(running.nspawn),
        }
    } else if let Ok(nspawn) = records.entered()
        && records.order().map_or(true, |order| order.boot == boot)
    {
        kill_with_descendants(nspawn);
    }
    let order = match records.order() {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // What it held can't be known; its processes can: no other group has this name.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let leaf = records.path().file_name().and_then(|name| name.to_str());
            let leaf = leaf.filter(|leaf| Records::is_name(leaf)).ok_or(error)?;
            let groups = Layout::of_this_host().find(leaf);
            return groups.iter().try_for_each(|group| empty(group, true));
        }
        Err(error) => return Err(error),
    };
    if let Some(place) = order.place.as_ref().filter(|_| order.boot == boot) {
        empty(&place.group, false)?;
    }
    free(records, &order, running.as_ref())
}

/// Ends every process of a group, and removes it if that is wanted.
pub(super) fn empty(group: &Path, remove: bool) -> io::Result<()> {
    let group = Group::new(group);
    group.kill();
    if !group.wait_empty(GONE) {
        let text = format!("processes {:?} do not die", group.processes());
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    }
    if remove { group.remove() } else { Ok(()) }
}

/// Frees what the host holds for a container whose processes are gone. What can't be freed keeps nothing else from it; the error
/// is the first. What was never told, because it never came up, is found by what is known without.
pub fn free(records: &Records, order: &Order, running: Option<&Running>) -> io::Result<()> {
    for path in dropped_mounts(&order.machine) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&path);
    }
    // systemd-nspawn leaves this one where /run is no tmpfs. Only an empty directory goes.
    let _ = fs::remove_dir(Path::new("/run/systemd/nspawn/propagate").join(&order.machine));
    let copy = running.and_then(|running| running.copy.as_deref());
    let copies = match copy.filter(|copy| is_copy(copy, order)) {
        Some(copy) => remove_copy(copy),
        None => remove_nameless_copies(records, order),
    };
    // One that has ended by itself has given up its locks by itself, and the tree may be another's since.
    let killed = !records.has_released();
    if killed {
        // The stand-in for a root is a tree like any other to systemd-nspawn.
        let skeleton = records.skeleton();
        for tree in order.locks.iter().chain([&skeleton]) {
            tree_lock::remove_of_tree(records, tree);
        }
    }
    let uids = match running.and_then(|running| running.uids) {
        _ if !order.picks || !killed => Ok(()),
        Some(first) => {
            tree_lock::remove(records, &Path::new(UIDS).join(first.to_string()));
            Ok(())
        }
        None => remove_nameless_uids(records, Path::new(UIDS)),
    };
    // In another boot a bridge of this name is another one.
    let here = probe::boot_id().is_ok_and(|boot| boot == order.boot);
    let zone = order.zone.as_deref().filter(|_| here);
    // A systemd-nspawn that has ended by itself took its interface along.
    let by_itself = matches!(records.exit(), Ok(Some(exit)) if exit.error.is_none());
    let leaving = (!by_itself).then_some(&*order.machine);
    let zone = zone.map_or(Ok(()), |zone| zone::remove_if_empty(zone, leaving));
    let places = order.place.iter();
    let groups = places.flat_map(|place| place.mirror.iter().chain([&place.group]));
    let groups = all(groups.map(|group| Group::new(group).remove()));
    copies.and(uids).and(zone).and(groups)
}

/// Does all of this, and gives the first error.
fn all(done: impl Iterator<Item = io::Result<()>>) -> io::Result<()> {
    done.fold(Ok(()), io::Result::and)
}

/// Clears what blocks a start: from 256 on a systemd-nspawn that was killed leaves mounts that the next one of the same name
/// trips over.
pub fn clear_the_way(machine: &str) {
    for path in dropped_mounts(machine) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&path);
    }
}

fn dropped_mounts(machine: &str) -> [PathBuf; 2] {
    let base = Path::new("/run/systemd/nspawn");
    [
        base.join("unix-export").join(machine),
        base.join(machine).join("unix-export"),
    ]
}

/// Where a container's throw-away root lies, seen from its leader: the kernel shows which directory of the file system is
/// mounted at its root.
pub fn copy_of(leader: i32, copies: &Path) -> Option<PathBuf> {
    let mounts = procfs::mounts_of(leader).ok()?;
    let root = mounts
        .iter()
        .filter(|mount| mount.target == Path::new("/"))
        .find_map(|mount| mount.root.file_name())
        .map(|name| copies.join(name))?;
    let name = root.file_name()?.to_str()?;
    (name.starts_with(".#") && root.is_dir()).then_some(root)
}

/// The first id outside of a process's range of user ids, if that is a range of its own.
pub fn uids_of(leader: i32) -> Option<u32> {
    first_uid(&fs::read_to_string(format!("/proc/{leader}/uid_map")).ok()?)
}

fn first_uid(map: &str) -> Option<u32> {
    let first = map.lines().next()?.split_ascii_whitespace().nth(1)?;
    first.parse().ok().filter(|first| *first != 0)
}

/// Only a directory that systemd-nspawn named as a throw-away copy, in the place where this order's copies lie.
fn is_copy(path: &Path, order: &Order) -> bool {
    let named = path
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(".#"));
    named && order.copies.as_deref() == path.parent()
}

/// A systemd-nspawn that was killed early has told nobody what its copy is called. It locks the name before it copies anything, and
/// the lock ends with it: so a copy in this order's place, begun after the order was written, whose lock nobody holds, is a
/// dead one's.
fn remove_nameless_copies(records: &Records, order: &Order) -> io::Result<()> {
    let Some(copies) = &order.copies else {
        return Ok(());
    };
    let dead = dead_locks(records, copies, |name| {
        let copy = name.strip_prefix(".#")?.strip_suffix(".lck")?;
        is_random(copy).then(|| copy.to_owned())
    })?;
    all(dead
        .into_iter()
        .map(|(_held, _, copy)| remove_copy(&copies.join(copy))))
}

/// The same for the lock of a range of user ids, which is called by the first of them.
fn remove_nameless_uids(records: &Records, locks: &Path) -> io::Result<()> {
    let dead = dead_locks(records, locks, |name| name.parse::<u32>().ok())?;
    for (_held, lock, _) in dead {
        let _ = fs::remove_file(lock);
    }
    Ok(())
}

/// The locks in a directory that were made after the order and that nobody holds, of those names that mean something. They are
/// held as long as what is returned.
fn dead_locks<T>(
    records: &Records,
    directory: &Path,
    meaning: impl Fn(&str) -> Option<T>,
) -> io::Result<Vec<(fs::File, PathBuf, T)>> {
    let entries = match fs::read_dir(directory) {
        // Whoever removed the place has removed what lay in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let ordered = fs::symlink_metadata(records.path().join("order"))?.modified()?;
    let dead = entries.flatten().filter_map(|entry| {
        let meaning = meaning(entry.file_name().to_str()?)?;
        let made = entry.metadata().and_then(|about| about.modified()).ok()?;
        let held = (made >= ordered).then(|| tree_lock::take(&entry.path()))??;
        Some((held, entry.path(), meaning))
    });
    Ok(dead.collect())
}

/// Whether systemd-nspawn makes up such a name for a copy.
fn is_random(copy: &str) -> bool {
    let random = copy
        .strip_prefix(".#machine.")
        .and_then(|rest| rest.get(rest.len().checked_sub(16)?..));
    random.is_some_and(|random| random.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Removes a copy, of a tree or of an image.
fn remove_copy(path: &Path) -> io::Result<()> {
    let is_tree = path.symlink_metadata().is_ok_and(|about| about.is_dir());
    let removed = if is_tree {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // After the copy: without its lock nobody would find it again.
    if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
        let _ = fs::remove_file(path.with_file_name(format!(".#{name}.lck")));
    }
    Ok(())
}

/// Kills a process and waits until it has gone.
pub fn kill(process: Process) {
    if let Ok(held) = Held::again(process) {
        let _ = held.signal(Signal::KILL);
        freezer::release(process.pid);
        held.wait(GONE);
    }
}

/// Kills a process and what descends from it. What loses its parent on the way was seen before.
fn kill_with_descendants(process: Process) {
    let Ok(first) = Held::again(process) else {
        return;
    };
    let held: Vec<_> = descendants(process.pid)
        .into_iter()
        .skip(1)
        .filter_map(|pid| Held::by_pid(pid).ok())
        .collect();
    for one in std::iter::once(&first).chain(&held) {
        let _ = one.signal(Signal::KILL);
    }
    for one in std::iter::once(&first).chain(&held) {
        one.wait(GONE);
    }
}

/// Kills what descends from a process, for hosts without control groups. Whoever is orphaned on the way comes back as a child,
/// because the process is a subreaper; so this goes on until there is none.
pub fn kill_descendants(of: i32, mut reap: impl FnMut()) {
    for _ in 0..1000 {
        let Some(child) = first_child(of) else { return };
        for pid in descendants(child) {
            if let Ok(held) = Held::by_pid(pid) {
                let _ = held.signal(Signal::KILL);
            }
        }
        if let Ok(held) = Held::by_pid(child) {
            held.wait(GONE);
        }
        reap();
    }
}

pub(super) fn descendants(of: i32) -> Vec<i32> {
    let mut found = vec![of];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children(*pid));
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::an_order;
    use super::*;
    use crate::cgroup::Place;
    use std::collections::BTreeMap;

    /// A start whose copies lie in this place.
    fn copying_to(copies: &Path, place: Option<Place>) -> (Records, Order) {
        let records = Records::at(copies.with_file_name("records"));
        records.create().unwrap();
        let order = Order {
            place,
            copies: Some(copies.to_owned()),
            ..an_order("a/t/1")
        };
        records.write_order(&order, &BTreeMap::new(), None).unwrap();
        (records, order)
    }

    #[test]
    fn what_can_not_be_freed_keeps_nothing_else_from_it() {
        let temp = tempfile::tempdir().unwrap();
        let (copies, group) = (temp.path().join("images"), temp.path().join("group"));
        for directory in [&copies, &group] {
            fs::create_dir(directory).unwrap();
        }
        // No hierarchy of groups has files, so this is one that does not go.
        let mirror = temp.path().join("mirror");
        fs::create_dir(&mirror).unwrap();
        fs::write(mirror.join("file"), "").unwrap();
        let (records, order) = copying_to(
            &copies,
            Some(Place {
                group: group.clone(),
                mirror: Some(mirror),
            }),
        );
        let error = free(&records, &order, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::DirectoryNotEmpty);
        assert!(!group.exists());
    }

    #[test]
    fn a_range_of_user_ids_is_told_by_its_first_outside() {
        assert_eq!(
            first_uid("         0  403111936      65536\n"),
            Some(403_111_936)
        );
        assert_eq!(first_uid("         0          0 4294967295\n"), None);
        assert_eq!(first_uid(""), None);
        assert_eq!(uids_of(i32::MAX), None);
    }

    #[test]
    fn of_locks_of_user_ids_those_go_that_are_dead_and_later_than_the_order() {
        let temp = tempfile::tempdir().unwrap();
        let locks = temp.path().join("locks");
        fs::create_dir(&locks).unwrap();
        let make = |name: &str| {
            fs::write(locks.join(name), "").unwrap();
            locks.join(name)
        };
        let early = make("65536");
        let before = std::time::SystemTime::UNIX_EPOCH;
        let file = fs::File::options().write(true).open(&early).unwrap();
        file.set_modified(before).unwrap();
        let (records, _) = copying_to(&temp.path().join("images"), None);
        let (dead, alive, other) = (make("131072"), make("196608"), make("131072.bak"));
        let held = tree_lock::take(&alive).unwrap();
        remove_nameless_uids(&records, &locks).unwrap();
        assert!(!dead.exists());
        assert!([&early, &alive, &other].iter().all(|lock| lock.exists()));
        drop(held);
        remove_nameless_uids(&records, &locks).unwrap();
        assert!(!alive.exists());
        remove_nameless_uids(&records, &locks.join("gone")).unwrap();
    }

    #[test]
    fn where_the_place_of_the_copies_is_gone_there_is_nothing_to_remove() {
        let temp = tempfile::tempdir().unwrap();
        let (records, order) = copying_to(&temp.path().join("gone"), None);
        free(&records, &order, None).unwrap();
    }

    #[test]
    fn of_copies_without_a_name_those_go_that_are_dead_and_later_than_the_order() {
        let temp = tempfile::tempdir().unwrap();
        let copies = temp.path().join("images");
        fs::create_dir(&copies).unwrap();
        let make = |name: &str| {
            let copy = copies.join(name);
            fs::create_dir(&copy).unwrap();
            fs::write(copy.join("file"), "").unwrap();
            fs::write(copies.join(format!(".#{name}.lck")), "").unwrap();
            copy
        };
        let early = make(".#machine.tree00000000000000aa");
        let (records, order) = copying_to(&copies, None);
        let lock = |copy: &Path| {
            let name = copy.file_name().unwrap().to_str().unwrap();
            copies.join(format!(".#{name}.lck"))
        };
        let before = std::time::SystemTime::UNIX_EPOCH;
        let file = fs::File::options().write(true).open(lock(&early)).unwrap();
        file.set_modified(before).unwrap();
        let dead = make(".#machine.tree00000000000000bb");
        let image = copies.join(".#machine.disk.raw00000000000000dd");
        for file in [&image, &lock(&image)] {
            fs::write(file, "").unwrap();
        }
        let alive = make(".#machine.tree00000000000000cc");
        let other = make(".#machine.backup");
        let held = tree_lock::take(&lock(&alive)).unwrap();
        free(&records, &order, None).unwrap();
        for copy in [&early, &alive, &other] {
            assert!(copy.exists() && lock(copy).exists(), "{}", copy.display());
        }
        for copy in [&dead, &image] {
            assert!(!copy.exists() && !lock(copy).exists(), "{}", copy.display());
        }
        drop(held);
        free(&records, &order, None).unwrap();
        assert!(!alive.exists());
    }
}
