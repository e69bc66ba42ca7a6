use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::super::testing::{BOOT, JournalWriter, OTHER_BOOT};
use super::*;

const MACHINE: &str = "0123456789abcdef0123456789abcdef";

/// A root directory as journald finds it.
struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let tree = Self { root };
        for directory in ["run", "var/log", "proc/sys/kernel/random", "etc"] {
            fs::create_dir_all(tree.path(directory)).unwrap();
        }
        fs::write(tree.path(BOOT_ID), "b0b0b0b0-b0b0-b0b0-b0b0-b0b0b0b0b0b0\n").unwrap();
        fs::write(tree.path("etc/machine-id"), format!("{MACHINE}\n")).unwrap();
        tree
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn volatile(&self, name: &str) -> PathBuf {
        self.path("run/log/journal").join(MACHINE).join(name)
    }

    fn persistent(&self, name: &str) -> PathBuf {
        self.path("var/log/journal").join(MACHINE).join(name)
    }

    fn follow(&self) -> Follower {
        Follower::new(File::open(self.root.path()).unwrap().into())
    }
}

fn message(writer: &mut JournalWriter, time: u64, text: &str) {
    writer.entry(BOOT, time, &[format!("MESSAGE={text}").as_bytes()]);
}

fn messages(follower: &mut Follower) -> Vec<String> {
    follower.look(true);
    std::iter::from_fn(|| follower.next_entry())
        .map(|entry| entry.text("MESSAGE").unwrap().to_owned())
        .collect()
}

fn journal(path: &Path, id: u8) -> JournalWriter {
    JournalWriter::create(path, id, true)
}

#[test]
fn a_journal_is_found_when_it_is_made() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    assert_eq!(messages(&mut follower), Vec::<String>::new());
    let mut writer = journal(&tree.volatile("system.journal"), 1);
    message(&mut writer, 1, "a");
    assert_eq!(messages(&mut follower), ["a"]);
    message(&mut writer, 2, "b");
    assert_eq!(messages(&mut follower), ["b"]);
}

/// What systemd-journal-flush.service does.
#[test]
fn what_is_copied_to_the_persistent_journal_is_returned_once() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    let mut volatile = journal(&tree.volatile("system.journal"), 1);
    message(&mut volatile, 1, "a");
    message(&mut volatile, 2, "b");
    assert_eq!(messages(&mut follower), ["a", "b"]);
    message(&mut volatile, 3, "c");
    message(&mut volatile, 3, "d");
    let mut persistent = journal(&tree.persistent("system.journal"), 2);
    persistent.entry(OTHER_BOOT, 9, &[b"MESSAGE=old"]);
    for (time, text) in [(1, "a"), (2, "b"), (3, "c"), (3, "d"), (4, "e")] {
        message(&mut persistent, time, text);
    }
    fs::remove_file(tree.volatile("system.journal")).unwrap();
    assert_eq!(messages(&mut follower), ["c", "d", "e"]);
    assert_eq!(follower.files.len(), 1);
}

/// The volatile file is gone before it was seen.
#[test]
fn a_journal_that_moved_early_is_read_from_its_new_place() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    let mut persistent = journal(&tree.persistent("system.journal"), 2);
    message(&mut persistent, 1, "a");
    assert_eq!(messages(&mut follower), ["a"]);
}

#[test]
fn rotated_files_are_read_to_their_end() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    let mut first = journal(&tree.persistent("system.journal"), 1);
    message(&mut first, 1, "a");
    assert_eq!(messages(&mut follower), ["a"]);
    message(&mut first, 2, "b");
    first.archive("system@1.journal");
    let mut second = journal(&tree.persistent("system.journal"), 2);
    message(&mut second, 3, "c");
    assert_eq!(messages(&mut follower), ["b", "c"]);
    assert_eq!(follower.files.len(), 1);
    let mut user = journal(&tree.persistent("user-1000.journal"), 3);
    message(&mut user, 5, "user");
    message(&mut second, 4, "d");
    message(&mut second, 6, "e");
    assert_eq!(messages(&mut follower), ["d", "user", "e"]);
}

#[test]
fn a_file_without_a_header_is_opened_when_it_has_one() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    let path = tree.persistent("system.journal");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(&path).unwrap();
    assert_eq!(messages(&mut follower), Vec::<String>::new());
    // It may stay like that, which must not cost anything.
    assert_eq!(follower.next_look(), None);
    let mut writer = journal(&path, 1);
    message(&mut writer, 1, "a");
    assert_eq!(messages(&mut follower), ["a"]);
    assert_eq!(follower.take_fault(), None);
}

#[test]
fn hundreds_of_old_files_do_not_hide_the_current_one() {
    let tree = Tree::new();
    for number in 0..=200 {
        let mut old = JournalWriter::create(&tree.persistent("old.journal"), number, true);
        old.entry(OTHER_BOOT, 1, &[b"MESSAGE=old"]);
        old.archive(&format!("system@{number}.journal"));
    }
    let mut writer = journal(&tree.persistent("system.journal"), 255);
    message(&mut writer, 1, "a");
    let mut follower = tree.follow();
    assert_eq!(messages(&mut follower), ["a"]);
    assert_eq!(follower.files.len(), 1);
}

#[test]
fn links_and_devices_are_not_journals() {
    let tree = Tree::new();
    let outside = tempfile::tempdir().unwrap();
    let mut other = journal(&outside.path().join(MACHINE).join("system.journal"), 1);
    message(&mut other, 1, "of another container");
    let inside = tree.persistent("x.journal");
    fs::create_dir_all(inside.parent().unwrap()).unwrap();
    symlink(outside.path().join(MACHINE).join("system.journal"), &inside).unwrap();
    nix::unistd::mkfifo(
        &tree.persistent("fifo.journal"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    let mut follower = tree.follow();
    assert_eq!(messages(&mut follower), Vec::<String>::new());
    assert!(follower.take_fault().is_some());
    // A link to a directory of the host leads below the root of the container.
    let tree = Tree::new();
    symlink(outside.path(), tree.path("var/log/journal")).unwrap();
    assert_eq!(messages(&mut tree.follow()), Vec::<String>::new());
}

#[test]
fn only_the_journal_of_its_own_machine_id_is_followed() {
    let tree = Tree::new();
    let other = tree.path("var/log/journal/ffffffffffffffffffffffffffffffff/system.journal");
    message(&mut journal(&other, 1), 1, "other");
    assert_eq!(messages(&mut tree.follow()), Vec::<String>::new());
    fs::write(tree.path("etc/machine-id"), "uninitialized\n").unwrap();
    let mut writer = journal(&tree.persistent("system.journal"), 2);
    message(&mut writer, 1, "own");
    let mut follower = tree.follow();
    assert_eq!(messages(&mut follower), Vec::<String>::new());
    fs::write(tree.path("etc/machine-id"), format!("{MACHINE}\n")).unwrap();
    assert_eq!(messages(&mut follower), ["own"]);
}

/// A file that can't be read further does not hide others, and is reported once.
#[test]
fn a_damaged_file_is_given_up() {
    let tree = Tree::new();
    let mut damaged = journal(&tree.persistent("user-1.journal"), 1);
    message(&mut damaged, 1, "a");
    message(&mut damaged, 2, "b");
    damaged.put(152, &u64::MAX.to_le_bytes());
    let mut first = [0; 8];
    let file = File::open(tree.persistent("user-1.journal")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 176).unwrap();
    damaged.put(u64::from_le_bytes(first) + 16, &first);
    let mut writer = journal(&tree.persistent("system.journal"), 2);
    message(&mut writer, 3, "c");
    let mut follower = tree.follow();
    assert_eq!(messages(&mut follower), ["c"]);
    assert!(follower.take_fault().is_some());
    fs::write(tree.persistent("bad.journal"), [0; 300]).unwrap();
    message(&mut writer, 4, "d");
    assert_eq!(messages(&mut follower), ["d"]);
    assert_eq!(follower.take_fault(), None);
}

#[test]
fn names_are_not_searched_again_and_again() {
    let tree = Tree::new();
    let mut follower = tree.follow();
    fs::write(tree.path("run/x"), "").unwrap();
    follower.look(false);
    assert!(follower.next_look().is_some());
    follower.look(true);
    assert_eq!(follower.next_look(), None);
}

#[test]
fn units_without_a_file_are_known() {
    let tree = Tree::new();
    for file in [
        "etc/systemd/system/a.service",
        "usr/lib/systemd/system/b@.timer",
    ] {
        let path = tree.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let units = ["a.service", "b@x.timer", "b@x.service", "c.service"].map(str::to_owned);
    assert_eq!(
        tree.follow().without_file(&units),
        ["b@x.service", "c.service"]
    );
}

#[test]
fn the_journal_of_the_host_is_never_followed() {
    let tree = Tree::new();
    fs::copy(format!("/{BOOT_ID}"), tree.path(BOOT_ID)).unwrap();
    let text = fs::read_to_string(format!("/{BOOT_ID}")).unwrap();
    let mut writer = journal(&tree.persistent("system.journal"), 1);
    writer.entry(parse_id(&text).unwrap(), 1, &[b"MESSAGE=host"]);
    assert_eq!(messages(&mut tree.follow()), Vec::<String>::new());
}
