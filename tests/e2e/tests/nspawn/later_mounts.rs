//! What the host mounts and unmounts below a volume while the container runs: owners, restrictions, and that nothing of it is left or in use. All
//! of it is real only: mounts and user namespaces.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_nspawn::backend::ContainerBackend as _;
use nomad_driver_nspawn::container::{
    ContainerSpec, Mount, MountIds, Propagation, Restrictions, Started, Users,
};
use nomad_driver_nspawn::sys::procfs;
use rstest::rstest;

use super::inside::{Inside, private_users};
use super::*;

/// Something mounted on the host, until it is dropped.
struct HostMount(PathBuf);

impl HostMount {
    fn new(at: PathBuf, kind: &str, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        mount(
            Some("test"),
            &at,
            Some(kind),
            MsFlags::empty(),
            Some(options),
        )
        .unwrap();
        Self(at)
    }

    /// With a file that belongs to a user.
    fn tmpfs(at: PathBuf) -> Self {
        let mounted = Self::new(at, "tmpfs", "mode=0755");
        let file = mounted.0.join("file");
        fs::write(&file, "#!/bin/sh\necho runs\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&file, Some(1000), Some(100)).unwrap();
        mounted
    }

    /// What is mounted below it later is mounted in copies, as on a host with systemd.
    fn shared(self) -> Self {
        const NONE: Option<&str> = None;
        mount(NONE, &self.0, NONE, MsFlags::MS_SHARED, NONE).unwrap();
        self
    }

    /// Fails if it is in use.
    fn unmount(self) {
        umount2(&self.0, MntFlags::empty()).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The volume of a test: a mount of its own, with directories to mount at.
fn volume(inside: &Inside) -> HostMount {
    let volume = HostMount::new(inside.stage.join("volume"), "tmpfs", "mode=0755");
    for name in ["later", "a/b"] {
        fs::create_dir_all(volume.0.join(name)).unwrap();
    }
    volume
}

fn followed(volume: &HostMount) -> Mount {
    Mount {
        ids: MountIds::Mapped,
        option: Some("config.mount[0]".to_owned()),
        propagation: Propagation::HostToTask,
        ..Mount::new(&volume.0, "/v")
    }
}

fn spec(inside: &Inside, mounts: Vec<Mount>, script: &str) -> ContainerSpec {
    inside.spec(&format!("{WAIT} {script}")).with(|spec| {
        spec.users = private_users();
        spec.mounts = mounts;
    })
}

/// What a container has printed so far, once that is so many lines.
async fn printed(inside: &Inside, lines: usize) -> String {
    let path = inside.stage.join("stdout");
    let found = tokio::task::spawn_blocking(move || {
        let text = || fs::read_to_string(&path).unwrap();
        until("its output", || {
            Some(text()).filter(|text| text.lines().count() >= lines)
        })
    });
    found.await.unwrap()
}

/// The mounts of a process below a path that has this name.
fn mounts_below(pid: i32, name: &str) -> Vec<PathBuf> {
    let mounts = procfs::mounts_of(pid).unwrap().into_iter();
    let mut found: Vec<_> = mounts
        .map(|mount| mount.target)
        .filter(|target| {
            target
                .ancestors()
                .skip(1)
                .any(|above| above.ends_with(name))
        })
        .collect();
    found.sort();
    found
}

/// Functions of the shell in a container.
const WAIT: &str = "appears() { until test -e $1; do sleep 0.02; done; }; vanishes() { while test -e $1; do sleep 0.02; done; }; ";

/// Also where the kernel propagates nothing.
#[rstest]
#[case::shared(true)]
#[case::private(false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_mount_has_the_owners_of_the_host_and_goes_with_it(#[case] is_shared: bool) {
    let inside = Inside::new();
    let mut volume = volume(&inside);
    if is_shared {
        volume = volume.shared();
    }
    let script = "appears /v/later/file; touch /v/later/made; stat -c %u:%g /v/later/file /v/later/made; vanishes /v/later/file; echo gone";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = HostMount::tmpfs(volume.0.join("later"));
    assert_eq!(printed(&inside, 2).await, "1000:100\n0:0\n");
    let made = later.0.join("made").symlink_metadata().unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0));
    later.unmount();
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, &*printed), (0, "1000:100\n0:0\ngone\n"));
    volume.unmount();
    inside.stage.leave();
}

/// An owner whom the container does not have is its root, as on the volume itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owner_of_the_volume_is_root_on_a_later_mount_too() {
    let inside = Inside::new();
    let volume = volume(&inside);
    std::os::unix::fs::chown(&volume.0, Some(200_000), Some(200_000)).unwrap();
    let script = "appears /v/later/file; touch /v/later/made";
    let later = |volume: &HostMount| {
        let later = HostMount::tmpfs(volume.0.join("later"));
        std::os::unix::fs::chown(&later.0, Some(200_000), Some(200_000)).unwrap();
        later
    };
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = later(&volume);
    let (exit, _) = inside.finish(&started).await;
    assert_eq!(exit.code, 0);
    assert_eq!(
        later.0.join("made").symlink_metadata().unwrap().uid(),
        200_000
    );
    drop((later, volume));
    inside.stage.leave();
}

#[rstest]
#[case::mapped(private_users(), MountIds::Mapped, "1000:100")]
#[case::as_they_are(private_users(), MountIds::Unmapped, "65534:65534")]
#[case::without_a_user_namespace(Users::Host, MountIds::Mapped, "1000:100")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_restrictions_of_a_volume_hold_for_later_mounts(
    #[case] users: Users,
    #[case] ids: MountIds,
    #[case] owner: &str,
) {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let has_user_namespace = users != Users::Host;
    let read_only = Mount {
        ids,
        ..followed(&volume).with_read_only(true)
    };
    let restricted = Mount {
        ids,
        target: "/n".into(),
        restrictions: Restrictions {
            nosuid: true,
            nodev: true,
            noexec: true,
        },
        ..followed(&volume)
    };
    let script = "appears /v/later/file; appears /n/later/file; stat -c %u:%g /v/later/file /n/later/file
        touch /v/later/made || echo read-only; /v/later/file; /n/later/file || echo not executed
        grep ' /n/later ' /proc/self/mountinfo | cut -d ' ' -f 6 | sed s/,idmapped//
        mount -o remount,rw,bind /v/later && echo changed; vanishes /v/later/file; vanishes /n/later/file; echo gone";
    let started = inside
        .start(spec(&inside, vec![read_only, restricted], script).with(|spec| spec.users = users))
        .await;
    let later = HostMount::tmpfs(volume.0.join("later"));
    let want = format!(
        "{owner}\n{owner}\nread-only\nruns\nnot executed\nrw,nosuid,nodev,noexec,relatime\n{}",
        if has_user_namespace { "" } else { "changed\n" }
    );
    assert_eq!(printed(&inside, want.lines().count()).await, want);
    later.unmount();
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, printed), (0, format!("{want}gone\n")));
    volume.unmount();
    inside.stage.leave();
}

/// Also what `mount -o bind,ro` does, which are two calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_host_forbids_later_is_forbidden_inside() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let script = "appears /v/later/file; touch /v/later/made && echo writable
        while touch /v/later/made 2>/dev/null; do sleep 0.02; done; echo read-only";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = HostMount::tmpfs(volume.0.join("later"));
    assert_eq!(printed(&inside, 1).await, "writable\n");
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    const NONE: Option<&str> = None;
    mount(NONE, &later.0, NONE, flags, NONE).unwrap();
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, &*printed), (0, "writable\nread-only\n"));
    later.unmount();
    volume.unmount();
    inside.stage.leave();
}

/// With its owners as they are and nothing restricted, there is nothing to change: the kernel does it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_as_it_is_gets_later_mounts_as_they_are() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let overlay_stage = inside.stage.join("layers");
    let mount = Mount {
        ids: MountIds::Unmapped,
        ..followed(&volume)
    };
    let script = "appears /v/later/file; stat -c %u:%g /v/later/file; vanishes /v/later/file";
    let started = inside.start(spec(&inside, vec![mount], script)).await;
    let later = overlay(&overlay_stage, volume.0.join("later"));
    assert_eq!(printed(&inside, 1).await, "65534:65534\n");
    later.unmount();
    let (exit, _) = inside.finish(&started).await;
    assert_eq!(exit.code, 0);
    volume.unmount();
    inside.stage.leave();
}

/// An overlay with a file, which can't map ids.
fn overlay(layers: &Path, at: PathBuf) -> HostMount {
    let dirs = ["lower", "upper", "work"].map(|name| layers.join(name));
    dirs.iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    fs::write(dirs[0].join("file"), "").unwrap();
    fs::create_dir_all(dirs[0].join("inner")).unwrap();
    std::os::unix::fs::chown(dirs[0].join("file"), Some(1000), Some(100)).unwrap();
    let [lower, upper, work] = dirs.map(|dir| dir.to_str().unwrap().to_owned());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    HostMount::new(at, "overlay", &options)
}

/// Also for a plugin that starts after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_mapped_does_not_appear_and_is_noted_once() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let script =
        "appears /v/later/file; test -e /v/a/file && echo seen; vanishes /v/later/file; echo end";
    let spec = spec(&inside, vec![followed(&volume)], script);
    let (inside, mut notes) = inside.with_notes();
    let started = inside.start(spec).await;
    let overlay = overlay(&inside.stage.join("layers"), volume.0.join("a"));
    // It is on one that does not appear, so it does not appear in its place.
    let on_it = HostMount::tmpfs(overlay.0.join("inner"));
    let note = within("a note", notes.recv()).await.unwrap();
    let place = format!("the file system overlay at {} ", overlay.0.display());
    for part in ["config.mount[0]: ", &place, "idmap = false"] {
        assert!(note.contains(part), "{note}");
    }
    let later = HostMount::tmpfs(volume.0.join("later"));
    until("the mount in the container", || {
        Some(()).filter(|()| mounts_below(started.leader.pid, "v") == [Path::new("/v/later")])
    });
    later.unmount();
    let (_, printed) = inside.finish(&started).await;
    assert_eq!(printed, "end\n");
    // No other note has followed.
    assert!(notes.try_recv().is_err());
    on_it.unmount();
    overlay.unmount();
    volume.unmount();
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mounts_in_mounts_and_over_mounts_appear_as_on_the_host() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let at_start = HostMount::tmpfs(volume.0.join("at-start"));
    let script = "appears /v/end; echo end";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let seen = |want: &[&str]| {
        let want: Vec<_> = want.iter().map(PathBuf::from).collect();
        until(&format!("{want:?}"), || {
            Some(()).filter(|()| mounts_below(started.leader.pid, "v") == want)
        });
    };
    seen(&["/v/at-start"]);
    let inner = HostMount::tmpfs(volume.0.join("a/b"));
    seen(&["/v/a/b", "/v/at-start"]);
    let over = HostMount::tmpfs(volume.0.join("a"));
    seen(&["/v/a", "/v/a/b", "/v/at-start"]);
    let in_it = HostMount::tmpfs(volume.0.join("a/x"));
    seen(&["/v/a", "/v/a/b", "/v/a/x", "/v/at-start"]);
    let twice = HostMount::tmpfs(volume.0.join("a/x"));
    seen(&["/v/a", "/v/a/b", "/v/a/x", "/v/a/x", "/v/at-start"]);
    twice.unmount();
    in_it.unmount();
    over.unmount();
    seen(&["/v/a/b", "/v/at-start"]);
    inner.unmount();
    at_start.unmount();
    seen(&[]);
    // A tree at once.
    let tree = HostMount::tmpfs(inside.stage.join("tree-of-mounts"));
    let in_tree = HostMount::tmpfs(tree.0.join("in/it"));
    const NONE: Option<&str> = None;
    let later = volume.0.join("later");
    mount(
        Some(&tree.0),
        &later,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .unwrap();
    seen(&["/v/later", "/v/later/in/it"]);
    umount2(&later, MntFlags::MNT_DETACH).unwrap();
    seen(&[]);
    // Over the volume itself.
    let over_all = HostMount::tmpfs(volume.0.clone());
    fs::write(over_all.0.join("end"), "").unwrap();
    let (_, printed) = inside.finish(&started).await;
    assert_eq!(printed, "end\n");
    for mounted in [over_all, in_tree, tree, volume] {
        mounted.unmount();
    }
    inside.stage.leave();
}

/// What is gone before it is looked at is ignored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_mounts_that_come_and_go_quickly_end_as_on_the_host() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let script = "appears /v/end; echo end";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let many: Vec<_> = (0..40)
        .map(|number| HostMount::tmpfs(volume.0.join(format!("many/{number:02}"))))
        .collect();
    for _ in 0..300 {
        // At this moment it may be opened to be copied.
        drop(HostMount::tmpfs(volume.0.join("later")));
    }
    let last = HostMount::tmpfs(volume.0.join("later"));
    fs::write(last.0.join("last"), "").unwrap();
    until("41 mounts", || {
        Some(()).filter(|()| mounts_below(started.leader.pid, "v").len() == 41)
    });
    let shown = format!("/proc/{}/root/v/later/last", started.leader.pid);
    until("the last one", || {
        Some(()).filter(|()| Path::new(&shown).exists())
    });
    for mounted in many.into_iter().chain([last]) {
        mounted.unmount();
    }
    until("no mount", || {
        Some(()).filter(|()| mounts_below(started.leader.pid, "v").is_empty())
    });
    fs::write(volume.0.join("end"), "").unwrap();
    let (_, printed) = inside.finish(&started).await;
    assert_eq!(printed, "end\n");
    assert_eq!(log_of(&started), "");
    volume.unmount();
    inside.stage.leave();
}

fn log_of(started: &Started) -> String {
    fs::read_to_string(started.state.join("log")).unwrap_or_default()
}

/// The container may remove its own copy, and move the directories of a volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_disturbs_only_itself() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let script = "appears /v/later/file; umount /v/later; appears /v/a/b/file; mv /v/a /v/c; ln -s /proc /v/a; echo moved
        vanishes /v/c/b/file; appears /v/later/again; test -e /proc/self/status && echo end; appears /v/end";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = HostMount::tmpfs(volume.0.join("later"));
    let inner = HostMount::tmpfs(volume.0.join("a/b"));
    assert_eq!(printed(&inside, 1).await, "moved\n");
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn.pid;
    let before = mounts_below(nspawn, "proc");
    std::mem::forget(inner);
    HostMount(volume.0.join("c/b")).unmount();
    later.unmount();
    let later = HostMount::tmpfs(volume.0.join("later"));
    fs::write(later.0.join("again"), "").unwrap();
    assert_eq!(printed(&inside, 2).await, "moved\nend\n");
    assert_eq!(mounts_below(nspawn, "proc"), before);
    fs::write(volume.0.join("end"), "").unwrap();
    inside.finish(&started).await;
    later.unmount();
    volume.unmount();
    inside.stage.leave();
}

/// An ext4 file system in a file, on a loop device.
struct Disk(String);

impl Disk {
    fn new(inside: &Inside) -> Self {
        let image = inside.stage.join("disk");
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
        Self(run(
            "losetup",
            &["--find", "--show", image.to_str().unwrap()],
        ))
    }

    fn mount(&self, at: PathBuf) -> HostMount {
        run("mount", &[&self.0, at.to_str().unwrap()]);
        fs::write(at.join("file"), "").unwrap();
        HostMount(at)
    }

    /// Whether the kernel has the file system, mounted or not.
    fn is_in_use(&self) -> bool {
        let name = self.0.strip_prefix("/dev/").unwrap();
        Path::new("/sys/fs/ext4").join(name).exists()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

fn run(program: &str, words: &[&str]) -> String {
    let done = Command::new(program).args(words).output().unwrap();
    assert!(done.status.success(), "{program} {words:?}: {done:?}");
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

#[rstest]
#[case::while_the_task_runs(false)]
#[case::after_the_task(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_the_host_has_unmounted_is_not_in_use(#[case] after_the_task: bool) {
    let inside = Inside::new();
    let disk = Disk::new(&inside);
    let volume = volume(&inside).shared();
    let script = "appears /v/later/file; echo seen; appears /v/end";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = disk.mount(volume.0.join("later"));
    assert_eq!(printed(&inside, 1).await, "seen\n");
    assert!(disk.is_in_use());
    if !after_the_task {
        later.unmount();
        until("the release", || Some(()).filter(|()| !disk.is_in_use()));
        fs::write(volume.0.join("end"), "").unwrap();
        inside.finish(&started).await;
    } else {
        fs::write(volume.0.join("end"), "").unwrap();
        inside.finish(&started).await;
        later.unmount();
        until("the release", || Some(()).filter(|()| !disk.is_in_use()));
    }
    volume.unmount();
    drop(disk);
    inside.stage.leave();
}

/// The supervisor works on without a plugin, and the next plugin is told what it has to tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_is_gone_changes_nothing() {
    let inside = Inside::new();
    let volume = volume(&inside).shared();
    let script =
        "appears /v/later/file; echo seen; vanishes /v/later/file; appears /v/end; echo end";
    let spec = spec(&inside, vec![followed(&volume)], script);
    let plugin = tokio::runtime::Runtime::new().unwrap();
    let start = plugin.spawn(async move { (inside.start(spec).await, inside) });
    let (started, inside) = start.await.unwrap();
    let (inside, mut notes) = inside.with_new_backend().with_notes();
    // With all its connections, as with the process of a plugin.
    std::thread::spawn(|| drop(plugin)).join().unwrap();
    let later = HostMount::tmpfs(volume.0.join("later"));
    assert_eq!(printed(&inside, 1).await, "seen\n");
    let overlay = overlay(&inside.stage.join("layers"), volume.0.join("a"));
    let missing = overlay.0.to_str().unwrap();
    within("the recovery", inside.backend.attach(&started))
        .await
        .unwrap();
    let note = within("a note", notes.recv()).await.unwrap();
    assert!(note.contains(missing), "{note}");
    overlay.unmount();
    later.unmount();
    fs::write(volume.0.join("end"), "").unwrap();
    let (_, printed) = inside.finish(&started).await;
    assert_eq!(printed, "seen\nend\n");
    volume.unmount();
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_supervisor_leaves_nothing_on_the_host() {
    let inside = Inside::new();
    let disk = Disk::new(&inside);
    let volume = volume(&inside).shared();
    let script = "appears /v/later/file; echo seen; sleep 1000";
    let started = inside
        .start(spec(&inside, vec![followed(&volume)], script))
        .await;
    let later = disk.mount(volume.0.join("later"));
    assert_eq!(printed(&inside, 1).await, "seen\n");
    let supervisor = ProcessHandle::open_checked(started.supervisor).unwrap();
    supervisor.signal(Signal::KILL).unwrap();
    let (exit, _) = inside.finish(&started).await;
    assert!(exit.error.is_some(), "{exit:?}");
    later.unmount();
    until("the release", || Some(()).filter(|()| !disk.is_in_use()));
    volume.unmount();
    drop(disk);
    inside.stage.leave();
}
