//! Finds the journal files of a container and returns their entries in order, as journald writes them. Waits with inotify, so an idle
//! container costs nothing. The journal may move: systemd-journald writes to `/run/log/journal` at first and, where `/var/log/journal`
//! exists, copies that to it when `/var` can be written. A file that is rotated or deleted stays open until it has been read.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, openat2};

use super::entry::{Entry, Head};
use super::file::{JournalFile, invalid};

/// Where journald keeps its files, and whether they are the persistent ones.
const PLACES: [(&[&str], bool); 2] = [
    (&["run", "run/log", "run/log/journal"], false),
    (&["var", "var/log", "var/log/journal"], true),
];
const BOOT_ID: &str = "proc/sys/kernel/random/boot_id";
/// Where systemd finds files of units.
const UNIT_DIRS: [&str; 10] = [
    "etc/systemd/system",
    "run/systemd/system",
    "run/systemd/transient",
    "run/systemd/generator",
    "run/systemd/generator.early",
    "run/systemd/generator.late",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
    "etc/systemd/system.control",
];
/// The most journal files of one container that are open at the same time.
const MAX_FILES: usize = 64;
/// The most names of one directory that are read.
const MAX_NAMES: usize = 4096;
/// The most entries that one call skips, and the most reports of the kernel that it takes in.
const MAX_SKIPPED: usize = 4096;
const MAX_EVENTS: usize = 4096;
/// How often files are searched for at most: the container decides how often names change.
const SEARCH_INTERVAL: Duration = Duration::from_millis(100);
/// The same before the first file has been found: a system boots in a few hundred milliseconds. systemd-nspawn 257 and later report it before they
/// have mounted everything, which no event reports.
const FIRST_SEARCH_INTERVAL: Duration = Duration::from_millis(20);
/// How many searches that is for. An init other than systemd may never make a file.
const FIRST_SEARCHES: u32 = 100;
/// Magic numbers of `linux/magic.h`: 9P, Ceph, CIFS, FUSE, NFS, SMB2. Reading there may take forever.
const SLOW_FILE_SYSTEMS: [u32; 6] = [
    0x0102_1997,
    0x00c3_6400,
    0xff53_4d42,
    0x6573_5546,
    0x6969,
    0xfe53_4d42,
];

/// What follows the journal of one container.
#[derive(Debug)]
pub struct Follower {
    root: OwnedFd,
    /// `None` if the kernel has no instance left.
    inotify: Option<OwnedFd>,
    /// The boot id and the machine id of the container, once they are known.
    boot: Option<[u8; 16]>,
    machine: Option<String>,
    files: Vec<Followed>,
    /// The ids of the files that are open, have been read to their end, or can't be read.
    known: HashSet<[u8; 16]>,
    /// The time of the last entry from a volatile file: persistent files begin with copies of those.
    last_volatile: Option<u64>,
    /// Whether files may have been added since the last search.
    is_changed: bool,
    /// Whether a file was found to which journald has not written its header yet: the next event may be about that.
    has_unfinished: bool,
    /// When files were searched for last, and how often.
    searched: Option<Instant>,
    searches: u32,
    fault: Fault,
}

/// The first reason why something can't be read.
#[derive(Debug, Default)]
enum Fault {
    #[default]
    None,
    Found(String),
    Taken,
}

#[derive(Debug)]
struct Followed {
    file: JournalFile,
    is_persistent: bool,
}

impl Follower {
    /// Follows the journal of the container with this root directory. If root has as many inotify instances as
    /// `fs.inotify.max_user_instances` allows, there is no descriptor to wait for, and [`Self::look`] has to be called now and then.
    pub fn new(root: OwnedFd) -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let mut follower = Self {
            root,
            inotify: inotify.ok(),
            boot: None,
            machine: None,
            files: Vec::new(),
            known: HashSet::new(),
            last_volatile: None,
            is_changed: true,
            has_unfinished: false,
            searched: None,
            searches: 0,
            fault: Fault::None,
        };
        follower.look(true);
        follower
    }

    /// Takes in what the kernel has reported, and searches for new files if there may be some, not too often, unless `at_once`.
    pub fn look(&mut self, at_once: bool) {
        self.is_changed |= self.has_new_names();
        let is_due = self.next_look().is_none_or(|due| due <= Instant::now());
        if self.is_changed && (at_once || is_due) {
            self.is_changed = false;
            self.searched = Some(Instant::now());
            self.searches = self.searches.saturating_add(1);
            self.find_files();
        }
    }

    /// When to look again although the kernel has reported nothing more.
    pub fn next_look(&self) -> Option<Instant> {
        let is_early = self.known.is_empty() && self.searches < FIRST_SEARCHES;
        let is_due = self.is_changed || (is_early && self.has_no_ids());
        let interval = match is_early {
            true => FIRST_SEARCH_INTERVAL,
            false => SEARCH_INTERVAL,
        };
        Some(self.searched.filter(|_| is_due)? + interval)
    }

    /// The next entry that this boot of the container has written, in the files that are known; `None` if there is none yet.
    pub fn next_entry(&mut self) -> Option<Entry> {
        // So many copies at most: who has more of them waits for the next call.
        for _ in 0..MAX_SKIPPED {
            let (index, head) = self.earliest()?;
            let followed = &mut self.files[index];
            let is_copy = followed.is_persistent
                && self
                    .last_volatile
                    .is_some_and(|last| head.monotonic <= last);
            let entry = (!is_copy).then(|| followed.file.read(&head));
            followed.file.advance();
            if !followed.is_persistent {
                self.last_volatile = self.last_volatile.max(Some(head.monotonic));
            }
            match entry {
                Some(Ok(entry)) => return Some(entry),
                Some(Err(error)) => self.note(&error),
                None => {}
            }
        }
        None
    }

    /// The descriptor that is readable when something has changed.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Why entries are missing: the first reason, once.
    pub fn take_fault(&mut self) -> Option<String> {
        match std::mem::take(&mut self.fault) {
            Fault::None => None,
            Fault::Found(reason) => {
                self.fault = Fault::Taken;
                Some(reason)
            }
            Fault::Taken => {
                self.fault = Fault::Taken;
                None
            }
        }
    }

    /// Those of these units for which the container has no file, not even of a template or one that a generator has made.
    pub fn without_file<'a>(&self, units: &'a [String]) -> Vec<&'a str> {
        let exists = |name: &str| {
            UNIT_DIRS.iter().any(|directory| {
                let path = format!("{directory}/{name}");
                open_in_root(self.root.as_fd(), &path, OFlags::PATH).is_ok()
            })
        };
        let units = units.iter().map(String::as_str);
        let missing =
            units.filter(|unit| !exists(unit) && !template(unit).is_some_and(|name| exists(&name)));
        missing.collect()
    }

    /// The earliest entry that has not been read, and the index of its file. Closes the files to which nothing can be added, and those that can't be
    /// read.
    fn earliest(&mut self) -> Option<(usize, Head)> {
        let boot = self.boot?;
        let mut heads = Vec::new();
        let mut faults = Vec::new();
        self.files.retain_mut(|followed| {
            let head = followed.head_of(boot);
            let head = head.and_then(|head| Ok((head, followed.file.is_done()?)));
            match head {
                Ok((head, is_done)) => {
                    let is_kept = head.is_some() || !is_done;
                    if is_kept {
                        heads.push((head, followed.is_persistent));
                    }
                    is_kept
                }
                Err(error) => {
                    faults.push(error);
                    false
                }
            }
        });
        faults.iter().for_each(|error| self.note(error));
        let heads = heads.into_iter().enumerate();
        let heads = heads.filter_map(|(index, (head, is_persistent))| {
            let head = head?;
            // Of two with the same time, the volatile one: the persistent one is its copy.
            Some((head.monotonic, is_persistent, head.seqnum, index, head))
        });
        let first = heads.min_by_key(|(time, persistent, number, index, _)| {
            (*time, *persistent, *number, *index)
        });
        first.map(|(.., index, head)| (index, head))
    }

    /// Whether files may have been added, according to inotify. What it reports about the content of files only wakes the caller.
    fn has_new_names(&self) -> bool {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let Some(inotify) = &self.inotify else {
            return true;
        };
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        let mut found = self.has_no_ids();
        // As many as one turn may handle; the others are reported again.
        for _ in 0..MAX_EVENTS {
            match reader.next() {
                Ok(event) => found |= self.has_unfinished || event.events() != ReadFlags::MODIFY,
                Err(_) => break,
            }
        }
        found
    }

    /// Whether the container does not show its boot id and machine id yet.
    fn has_no_ids(&self) -> bool {
        self.boot.is_none() || self.machine.is_none()
    }

    /// Watches the directories in which files can appear, and opens the files that are not known yet. Only the directory of the container's own
    /// machine id is its journal.
    fn find_files(&mut self) {
        self.has_unfinished = false;
        let root = self.root.as_fd();
        self.boot = self.boot.or_else(|| boot_id(root));
        self.machine = self.machine.take().or_else(|| machine_id(root));
        for (levels, is_persistent) in PLACES {
            let mut directory = None;
            for level in levels {
                directory = self.watched(self.root.as_fd(), level, NAMES);
                if directory.is_none() {
                    break;
                }
            }
            if let (Some(journal), Some(machine)) = (directory, self.machine.clone()) {
                let directory = self.watched(journal.as_fd(), &machine, NAMES | FILES);
                if let Some(directory) = directory {
                    self.find_in(&directory, is_persistent);
                }
            }
        }
    }

    fn find_in(&mut self, directory: &OwnedFd, is_persistent: bool) {
        let mut names = names(directory);
        // Should there be too many, the current one of the system is not left out.
        names.sort_by_key(|name| (name != "system.journal", name.contains('@')));
        for name in names.iter().filter(|name| name.ends_with(".journal")) {
            self.add(directory, name, is_persistent);
        }
    }

    fn add(&mut self, directory: &OwnedFd, name: &str, is_persistent: bool) {
        let Some(boot) = self.boot else {
            return;
        };
        let opened = open_journal(directory.as_fd(), name).and_then(JournalFile::open);
        let mut file = match opened {
            Ok(file) => file,
            // Renamed or deleted: then it is found again, or not needed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            // journald has not written the header yet.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.has_unfinished = true;
                return;
            }
            Err(error) => return self.note(&error),
        };
        if self.known.contains(&file.id()) {
            return;
        }
        if self.files.len() >= MAX_FILES {
            let reason = format!("there are more than {MAX_FILES} files of one boot");
            return self.note(&io::Error::other(reason));
        }
        self.known.insert(file.id());
        match file.skip_to_boot(boot).and_then(|()| file.is_done()) {
            Ok(is_done) => self.files.extend((!is_done).then_some(Followed {
                file,
                is_persistent,
            })),
            Err(error) => self.note(&error),
        }
    }

    /// Opens a directory of the container and watches it. `None` if there is none.
    fn watched(&self, base: BorrowedFd<'_>, path: &str, flags: WatchFlags) -> Option<OwnedFd> {
        let directory = open_in_root(base, path, OFlags::DIRECTORY | OFlags::RDONLY).ok()?;
        let watched = format!("/proc/self/fd/{}", directory.as_raw_fd());
        if let Some(inotify) = &self.inotify {
            let flags = flags | WatchFlags::ONLYDIR;
            inotify::add_watch(inotify, watched, flags).ok()?;
        }
        Some(directory)
    }

    fn note(&mut self, error: &io::Error) {
        if let Fault::None = self.fault {
            self.fault = Fault::Found(error.to_string());
        }
    }
}

impl Followed {
    /// The next entry of this boot, if it is among the next ones.
    fn head_of(&mut self, boot: [u8; 16]) -> io::Result<Option<Head>> {
        for _ in 0..MAX_SKIPPED {
            match self.file.peek()? {
                Some(head) if head.boot != boot => self.file.advance(),
                head => return Ok(head),
            }
        }
        Ok(None)
    }
}

const NAMES: WatchFlags = WatchFlags::CREATE.union(WatchFlags::MOVED_TO);
/// A file that is deleted can be closed once it has been read.
const FILES: WatchFlags = WatchFlags::MODIFY.union(WatchFlags::DELETE);

/// The name of the template of a unit such as `getty@tty1.service`.
fn template(unit: &str) -> Option<String> {
    let (name, rest) = unit.split_once('@')?;
    let (_, kind) = rest.rsplit_once('.')?;
    Some(format!("{name}@.{kind}"))
}

/// The names in a directory; none if it can't be read.
fn names(directory: &OwnedFd) -> Vec<String> {
    let Ok(listing) = rustix::fs::Dir::read_from(directory) else {
        return Vec::new();
    };
    let listing = listing.take(MAX_NAMES);
    let names =
        listing.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
    names.collect()
}

/// Links lead nowhere outside of `base`, and those of `/proc` are not followed.
fn open_in_root(base: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let opening = match flags.contains(OFlags::PATH) {
        // openat2(2) takes no flags of reading with it.
        true => OFlags::CLOEXEC,
        false => OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
    };
    let flags = flags | opening;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(base, path, flags, Mode::empty(), resolve)?)
}

/// Opens a journal file of this directory itself: a link could lead to the journal of another container that is mounted in this one.
fn open_journal(directory: BorrowedFd<'_>, name: &str) -> io::Result<File> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let place = openat2(
        directory,
        name,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )?;
    let kind = fstatfs(&place)?.f_type;
    if SLOW_FILE_SYSTEMS.contains(&u32::try_from(kind).unwrap_or_default()) {
        return Err(invalid("the journal is on a network file system or FUSE"));
    }
    open_regular(&place)
}

/// Opens a file for reading if it is a regular one: opening a FIFO can wait, and opening a device can have an effect.
fn open_regular(place: &OwnedFd) -> io::Result<File> {
    let mode = fstat(place)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(invalid("it is not a regular file"));
    }
    File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn read_id(root: BorrowedFd<'_>, path: &str) -> Option<[u8; 16]> {
    let file = open_regular(&open_in_root(root, path, OFlags::PATH).ok()?).ok()?;
    let mut text = String::new();
    file.take(64).read_to_string(&mut text).ok()?;
    parse_id(&text)
}

/// The boot id of the container, which systemd-nspawn makes for each start. `None` while the container shows that of the host.
fn boot_id(root: BorrowedFd<'_>) -> Option<[u8; 16]> {
    let id = read_id(root, BOOT_ID)?;
    let of_host = std::fs::read_to_string(format!("/{BOOT_ID}")).ok()?;
    (Some(id) != parse_id(&of_host)).then_some(id)
}

/// The machine id of the container, as journald names its directory. `None` until the init has made one.
fn machine_id(root: BorrowedFd<'_>) -> Option<String> {
    let id = read_id(root, "etc/machine-id")?;
    Some(format!("{:032x}", u128::from_be_bytes(id)))
}

fn parse_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text
        .trim()
        .chars()
        .filter(|letter| *letter != '-')
        .collect();
    let number = u128::from_str_radix(&digits, 16).ok();
    number.filter(|_| digits.len() == 32).map(u128::to_be_bytes)
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
