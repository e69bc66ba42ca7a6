//! Finds the journal files of a container and returns their entries in order, as journald writes them. Waits with inotify, so an idle
//! container costs nothing. The journal may move: systemd-journald writes to `/run/log/journal` at first and, where `/var/log/journal`
//! exists, copies that to it when `/var` can be written. A file that is rotated or deleted stays open until it has been read.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::entry::{Entry, Head};
use super::file::JournalFile;

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

/// What follows the journal of one container.
#[derive(Debug)]
pub struct Follower {
    root: OwnedFd,
    /// `None` if the kernel has no instance left.
    inotify: Option<OwnedFd>,
    /// The boot id of the container, once it is known.
    boot: Option<[u8; 16]>,
    files: Vec<Followed>,
    /// The ids of the files that are open or have been read to their end.
    known: HashSet<[u8; 16]>,
    /// The time of the last entry from a volatile file: persistent files begin with copies of those.
    last_volatile: Option<u64>,
    /// Whether a file was found to which journald has not written its header yet.
    has_unfinished: bool,
    /// The first reason why a file can't be read, until it is taken.
    fault: Option<String>,
}

#[derive(Debug)]
struct Followed {
    file: JournalFile,
    is_persistent: bool,
}

impl Follower {
    /// Follows the journal of the container with this root directory. If root has as many inotify instances as
    /// `fs.inotify.max_user_instances` allows, there is no descriptor to wait for, and [`Self::next_entry`] has to be called now and then.
    pub fn new(root: OwnedFd) -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let mut follower = Self {
            root,
            inotify: inotify.ok(),
            boot: None,
            files: Vec::new(),
            known: HashSet::new(),
            last_volatile: None,
            has_unfinished: false,
            fault: None,
        };
        follower.find_files();
        follower
    }

    /// The next entry that this boot of the container has written, `None` if there is none yet. Looks for new files first if something has
    /// changed.
    pub fn next_entry(&mut self) -> Option<Entry> {
        if self.has_new_names() {
            self.find_files();
        }
        loop {
            let index = self.earliest()?;
            let followed = &mut self.files[index];
            let head = followed.head()?;
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
    }

    /// The descriptor that is readable when something has changed.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Why entries are missing, once for the first reason.
    pub fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
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

    /// The file with the earliest entry that has not been read. Closes those to which nothing can be added.
    fn earliest(&mut self) -> Option<usize> {
        let mut faults = Vec::new();
        self.files
            .retain_mut(|followed| match followed.file.is_done() {
                Ok(done) => !done,
                Err(error) => {
                    faults.push(error);
                    false
                }
            });
        faults.iter().for_each(|error| self.note(error));
        let boot = self.boot?;
        let heads = self.files.iter_mut().enumerate();
        let heads = heads.filter_map(|(index, followed)| {
            let head = followed.head_of(boot)?;
            // Of two with the same time, the volatile one: the persistent one is its copy.
            Some((head.monotonic, followed.is_persistent, head.seqnum, index))
        });
        heads.min().map(|(.., index)| index)
    }

    /// Whether files may have been added, according to inotify. What it tells about the content of files only wakes the caller.
    fn has_new_names(&mut self) -> bool {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let Some(inotify) = &self.inotify else {
            return true;
        };
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        let mut found = self.boot.is_none() || self.has_unfinished;
        while let Ok(event) = reader.next() {
            let content = ReadFlags::MODIFY;
            found |= !content.contains(event.events());
        }
        found
    }

    /// Watches the directories in which files can appear, and opens the files that are not known yet.
    fn find_files(&mut self) {
        if self.boot.is_none() {
            self.boot = boot_id(self.root.as_fd());
        }
        self.has_unfinished = false;
        for (levels, is_persistent) in PLACES {
            let mut directory = None;
            for level in levels {
                directory = self.watched(self.root.as_fd(), level, NAMES);
                if directory.is_none() {
                    break;
                }
            }
            if let Some(journal) = directory {
                self.find_machines(&journal, is_persistent);
            }
        }
    }

    /// The directories below `journal` are named after machine ids.
    fn find_machines(&mut self, journal: &OwnedFd, is_persistent: bool) {
        for machine in names(journal) {
            let is_id = machine.len() == 32 && machine.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !is_id {
                continue;
            }
            let Some(directory) =
                self.watched(journal.as_fd(), &machine, NAMES | WatchFlags::MODIFY)
            else {
                continue;
            };
            for name in names(&directory) {
                if name.ends_with(".journal") {
                    self.add(&directory, &name, is_persistent);
                }
            }
        }
    }

    fn add(&mut self, directory: &OwnedFd, name: &str, is_persistent: bool) {
        let Some(boot) = self.boot else {
            return;
        };
        let opened = open_file(directory.as_fd(), name).and_then(JournalFile::open);
        let mut file = match opened {
            Ok(file) => file,
            // Renamed or deleted: then it is found again, or not needed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.has_unfinished = true;
                return;
            }
            Err(error) => return self.note(&error),
        };
        if self.known.contains(&file.id()) || self.files.len() >= MAX_FILES {
            return;
        }
        match file.skip_to_boot(boot).and_then(|()| file.is_done()) {
            Ok(is_done) => {
                self.known.insert(file.id());
                self.files.extend((!is_done).then_some(Followed {
                    file,
                    is_persistent,
                }));
            }
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
        self.fault.get_or_insert_with(|| error.to_string());
    }
}

impl Followed {
    /// The next entry of this boot.
    fn head_of(&mut self, boot: [u8; 16]) -> Option<Head> {
        while let Some(head) = self.head() {
            if head.boot == boot {
                return Some(head);
            }
            self.file.advance();
        }
        None
    }

    /// A file that can't be read any more has no next entry.
    fn head(&mut self) -> Option<Head> {
        self.file.peek().ok().flatten()
    }
}

const NAMES: WatchFlags = WatchFlags::CREATE.union(WatchFlags::MOVED_TO);

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

/// Opens a regular file of this directory itself: a FIFO would block, and a link could lead to the journal of another container that is mounted
/// in this one.
fn open_file(directory: BorrowedFd<'_>, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file: File = openat2(directory, name, flags, Mode::empty(), resolve)?.into();
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(super::file::invalid("it is not a regular file")),
    }
}

/// The boot id of the container, which systemd-nspawn makes for each start. `None` while the container shows that of the host.
fn boot_id(root: BorrowedFd<'_>) -> Option<[u8; 16]> {
    let file: File = open_in_root(root, BOOT_ID, OFlags::RDONLY).ok()?.into();
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(64).read_to_string(&mut text).ok()?;
    let id = parse_id(&text)?;
    let of_host = std::fs::read_to_string(format!("/{BOOT_ID}")).ok()?;
    (Some(id) != parse_id(&of_host)).then_some(id)
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
