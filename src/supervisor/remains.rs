//! What is left of a start when nobody watches over it any more: processes, control groups, systemd-nspawn's own droppings.
//! Ends and frees only what the records of that start name, and may be repeated at will.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MntFlags, umount2};

use super::process::{Held, children, first_child};
use super::record::{Order, Records};
use crate::cgroup::{Group, Layout};
use crate::container::Process;
use crate::nspawn::probe;
use crate::signal::Signal;

/// The kind of a lock that nobody shares. The field is narrower than the constant on all platforms.
#[expect(clippy::cast_possible_truncation, reason = "the constant is 1")]
const WRITE_LOCK: i16 = nix::libc::F_WRLCK as i16;

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
        // after itself.
        kill(running.started.leader);
        let watched = Held::again(running.nspawn);
        if !watched.is_ok_and(|nspawn| nspawn.wait(Duration::from_secs(2))) {
            kill(running.nspawn);
        }
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
    free(&order, running.and_then(|running| running.copy).as_deref())
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

/// Frees what the host holds for a container whose processes are gone.
pub fn free(order: &Order, copy: Option<&Path>) -> io::Result<()> {
    for path in dropped_mounts(&order.machine) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&path);
    }
    // systemd-nspawn leaves this one where /run is no tmpfs. Only an empty directory goes.
    let _ = fs::remove_dir(Path::new("/run/systemd/nspawn/propagate").join(&order.machine));
    if let Some(copy) = copy.filter(|copy| is_copy(copy, order)) {
        remove_copy(copy)?;
    }
    for lock in order
        .locks
        .iter()
        .filter_map(|tree| locks_of(tree))
        .flatten()
    {
        remove_lock(&lock);
    }
    let Some(place) = &order.place else {
        return Ok(());
    };
    if let Some(mirror) = &place.mirror {
        Group::new(mirror).remove()?;
    }
    Group::new(&place.group).remove()
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
    let text = fs::read_to_string(format!("/proc/{leader}/mountinfo")).ok()?;
    let root = text.lines().find_map(|line| {
        let mut words = line.split(' ').skip(3);
        let (source, target) = (words.next()?, words.next()?);
        (target == "/")
            .then(|| Path::new(source).file_name())?
            .map(|name| copies.join(name))
    })?;
    let name = root.file_name()?.to_str()?;
    (name.starts_with(".#") && root.is_dir()).then_some(root)
}

/// Only a directory that systemd-nspawn named as a throw-away copy, in the place where this order's copies lie.
fn is_copy(path: &Path, order: &Order) -> bool {
    let named = path
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(".#"));
    named && order.copies.as_deref() == path.parent()
}

fn remove_copy(path: &Path) -> io::Result<()> {
    if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
        let _ = fs::remove_file(path.with_file_name(format!(".#{name}.lck")));
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The two files by which systemd-nspawn keeps others off a tree or an image.
fn locks_of(tree: &Path) -> Option<[PathBuf; 2]> {
    let about = fs::metadata(tree).ok()?;
    let name = tree.file_name()?.to_str()?;
    let node = format!("inode-{}:{}", about.dev(), about.ino());
    Some([
        tree.with_file_name(format!(".#{name}.lck")),
        Path::new("/run/systemd/nspawn/locks").join(node),
    ])
}

/// Removes a lock file that a killed systemd-nspawn has left, if nobody holds it: the lock is taken first, so that another
/// container of the same tree keeps its own. systemd-nspawn notices when a file it has locked was removed, and begins again.
fn remove_lock(path: &Path) {
    let Ok(file) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path)
    else {
        return;
    };
    let whole = nix::libc::flock {
        l_type: WRITE_LOCK,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    if fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)).is_ok() {
        let _ = fs::remove_file(path);
    }
}

/// Kills a process and waits until it has gone.
pub fn kill(process: Process) {
    if let Ok(held) = Held::again(process) {
        let _ = held.signal(Signal::KILL);
        held.wait(GONE);
    }
}

/// Kills what descends from a process, for hosts without control groups. Whoever is orphaned on the way comes back as a child,
/// because the process is a subreaper; so this goes on until there is none.
pub fn kill_descendants(of: i32, reap: impl Fn()) {
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
