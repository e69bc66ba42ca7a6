//! The search for leftovers: creates one of every kind, checks that it is found, and removes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

use e2e::leftovers::Marks;
use e2e::stage::Namespace;
use nix::fcntl::{FcntlArg, fcntl};

struct Ground {
    dir: tempfile::TempDir,
    name: String,
    marks: Marks,
    _alone: MutexGuard<'static, ()>,
}

/// What one of these tests leaves for a moment is what another one looks for, and a process that one starts holds the other's files until
/// its own program runs.
static ALONE: Mutex<()> = Mutex::new(());

fn ground() -> Ground {
    e2e::needs_root();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::Builder::new().prefix("nde-").tempdir().unwrap();
    let name = format!("t{}", e2e::unique());
    let marks = Marks::new(dir.path()).named(&name);
    assert_eq!(marks.left(), Vec::<String>::new());
    Ground {
        dir,
        name,
        marks,
        _alone: alone,
    }
}

impl Ground {
    #[track_caller]
    fn sees(&self, what: &str) {
        let left = self.marks.left();
        assert!(left.iter().any(|line| line.contains(what)), "{left:?}");
    }
}

fn finish(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_process_is_found_by_its_arguments_environment_and_directory() {
    let ground = ground();
    let sleep = || {
        let mut command = Command::new("sleep");
        command.arg("1000");
        command
    };
    let mut commands = [sleep(), sleep(), Command::new("sh")];
    commands[0].env("X", ground.dir.path());
    commands[1].current_dir(ground.dir.path());
    commands[2].args(["-c", "read line", &ground.name]);
    // It waits for input that never comes, and starts no process that would outlive it.
    commands[2].stdin(std::process::Stdio::piped());
    for mut command in commands {
        let child = command.spawn().unwrap();
        e2e::until("the process is seen", || {
            let want = format!("process {} ", child.id());
            ground
                .marks
                .left()
                .iter()
                .find(|line| line.starts_with(&want))
                .cloned()
        });
        ground.marks.kill();
        finish(child);
    }
    ground.marks.assert_none_left();
}

#[test]
fn a_payload_is_found_by_its_mounts() {
    let ground = ground();
    let tree = ground.dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let script = "mount --bind \"$0\" /mnt && cd / && exec sleep 1000";
    let child = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(&tree)
        .spawn()
        .unwrap();
    let want = format!("process {} sleep 1000", child.id());
    e2e::until("the process is seen", || {
        ground
            .marks
            .left()
            .iter()
            .find(|line| line.starts_with(&want))
            .cloned()
    });
    finish(child);
    ground.marks.assert_none_left();
}

#[test]
fn a_mount_a_cgroup_and_a_namespace_are_found() {
    let ground = ground();
    let point = ground.dir.path().join("point");
    fs::create_dir(&point).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(None::<&str>, &point, Some("tmpfs"), flags, None::<&str>).unwrap();
    ground.sees("mount ");
    nix::mount::umount(&point).unwrap();

    let group = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
    let group = group
        .into_iter()
        .find(|mount| mount.join("cgroup.procs").exists())
        .unwrap();
    let group = group.join(format!("{}.leaf", ground.name));
    fs::create_dir(&group).unwrap();
    ground.sees(group.to_str().unwrap());
    fs::remove_dir(group).unwrap();

    let namespace = Namespace::new(&ground.name);
    ground.sees("/run/netns/");
    drop(namespace);
    ground.marks.assert_none_left();
}

#[test]
fn a_lock_of_a_tree_is_found() {
    use std::os::unix::fs::MetadataExt;
    let ground = ground();
    let tree = ground.dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let of = fs::metadata(&tree).unwrap();
    let locks = Path::new("/run/systemd/nspawn/locks");
    fs::create_dir_all(locks).unwrap();
    let lock = locks.join(format!("inode-{}:{}", of.dev(), of.ino()));
    fs::write(&lock, "").unwrap();
    ground.sees("inode-");
    // Left by an earlier run, for a tree that had the same inode.
    let earlier = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    let file = fs::File::options().write(true).open(&lock).unwrap();
    file.set_modified(earlier).unwrap();
    assert_eq!(ground.marks.left(), Vec::<String>::new());
    fs::remove_file(lock).unwrap();
    ground.marks.assert_none_left();
}

#[test]
fn an_unheld_uid_lock_is_found() {
    let ground = ground();
    let locks = Path::new("/run/systemd/nspawn-uid");
    fs::create_dir_all(locks).unwrap();
    // No uid range starts at this number, so no other process uses this lock.
    let lock = locks.join(u32::from_str_radix(&e2e::unique(), 16).unwrap().to_string());
    let file = fs::File::create(&lock).unwrap();
    let whole = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    let seen = || {
        ground
            .marks
            .left()
            .iter()
            .any(|line| line.contains(lock.to_str().unwrap()))
    };
    assert!(!seen());
    drop(file);
    assert!(seen());
    fs::remove_file(lock).unwrap();
    ground.marks.assert_none_left();
}

#[test]
fn a_loop_device_is_found() {
    let ground = ground();
    let image = ground.dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let losetup = |words: &[&str]| {
        let said = Command::new("losetup").args(words).output().unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap().trim().to_owned()
    };
    let device = losetup(&["--find", "--show", image.to_str().unwrap()]);
    ground.sees("loop device ");
    losetup(&["--detach", &device]);
    ground.marks.assert_none_left();
}

#[test]
fn a_link_is_found() {
    let ground = ground();
    let link = "nd-0123456789ab";
    let ip = |words: &[&str]| {
        let said = Command::new("ip").args(words).output().unwrap();
        assert!(said.status.success(), "{said:?}");
    };
    // A bridge that is down and has no ports.
    ip(&["link", "add", link, "type", "bridge"]);
    ground.sees("link ");
    ip(&["link", "delete", link]);
    ground.marks.assert_none_left();
}
