//! What a container gets of the host's files: mounts below a source, what is denied on them, and that nothing else is mounted than what was checked.
//! Their owners in a user namespace are in `owners` and `table`, overlays in `overlays`. All of it is real only: mounts and user namespaces.

use std::os::unix::fs::{FileTypeExt, chown};
use std::os::unix::net::UnixListener;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode as Bits;
use nomad_driver_nspawn::backend::ContainerBackend as _;
use nomad_driver_nspawn::container::{
    Mount, MountIds, Propagation, Restrictions, Tmpfs, Users, Volatile,
};
use nomad_driver_nspawn::sys::procfs;
use rstest::rstest;

use super::inside::{Inside, private_users};
use super::*;

mod overlays;
mod owners;
mod table;

/// Something mounted on the host, until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: PathBuf, kind: &str, flags: MsFlags, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        mount(Some("test"), &at, Some(kind), flags, Some(options)).unwrap();
        Self(at)
    }

    fn tmpfs(at: PathBuf) -> Self {
        Self::new(at, "tmpfs", MsFlags::empty(), "mode=0755")
    }

    /// An overlay, which can't map ids.
    fn overlay(stage: &Stage, at: PathBuf) -> Self {
        Self::overlay_of(stage.path(), at)
    }

    /// The same with its directories here.
    fn overlay_of(top: &Path, at: PathBuf) -> Self {
        let dirs = ["lower", "upper", "work"].map(|name| top.join(name));
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let [lower, upper, work] = dirs.map(|dir| dir.to_str().unwrap().to_owned());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        Self::new(at, "overlay", MsFlags::empty(), &options)
    }

    /// Lets later mounts below it appear in copies, as on a host with systemd.
    fn shared(self) -> Self {
        const NONE: Option<&str> = None;
        mount(NONE, &self.0, NONE, MsFlags::MS_SHARED, NONE).unwrap();
        self
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn volume(stage: &Stage) -> PathBuf {
    let volume = stage.join("volume");
    fs::create_dir(&volume).unwrap();
    volume
}

fn mapped(source: &Path, target: &str) -> Mount {
    Mount {
        ids: MountIds::Mapped,
        option: Some(format!("config.bind[{:?}]", source.to_str().unwrap())),
        ..Mount::new(source, target)
    }
}

fn tmpfs(target: &str) -> Tmpfs {
    Tmpfs {
        target: target.into(),
        size: Some(1 << 20),
        mode: 0o1777,
        read_only: false,
        restrictions: Restrictions::default(),
        option: "config.tmpfs[0]".to_owned(),
    }
}

/// How many mounts the host has at this path and below it.
fn mounts_of_host(path: &Path) -> usize {
    let mounts = procfs::own_mounts().unwrap().into_iter();
    mounts
        .filter(|mount| mount.target.starts_with(path))
        .count()
}

fn owner(path: &Path) -> (u32, u32) {
    let about = path.symlink_metadata().unwrap();
    (about.uid(), about.gid())
}

/// A container with these mounts, in a user namespace.
async fn run(inside: &Inside, mounts: Vec<Mount>, script: &str) -> String {
    inside
        .run(inside.spec(script).with(|spec| {
            spec.users = private_users();
            spec.mounts = mounts;
        }))
        .await
}

/// The range is that of the image: that of the host.
fn yes() -> Users {
    Users::Private {
        range: "yes".to_owned(),
        ownership: None,
    }
}

/// The directory of a start is where mounts are attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_directory_may_be_reached_through_a_link() {
    let inside = Inside::with_state_dir(|stage| {
        fs::create_dir(stage.join("real")).unwrap();
        symlink("real", stage.join("link")).unwrap();
        stage.join("link/state")
    });
    let volume = volume(&inside.stage);
    let spec = inside.spec("touch /v/made").with(|spec| {
        spec.users = private_users();
        spec.rootfs.volatile = Volatile::State;
        spec.mounts = vec![mapped(&volume, "/v")];
    });
    assert_eq!(inside.run(spec).await, "");
    assert_eq!(owner(&volume.join("made")), (0, 0));
    inside.stage.leave();
}

/// systemd-nspawn would follow the link.
#[rstest]
#[case::the_source("volume", "volume")]
#[case::a_directory_above_it("volume", "volume/inner")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_became_a_link_after_the_check_is_not_followed(
    #[case] replaced: &str,
    #[case] source: &str,
    #[values(Users::Host, private_users(), yes())] users: Users,
) {
    let inside = Inside::new();
    let secret = inside.stage.join("secret/inner");
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("key"), "key").unwrap();
    let source = inside.stage.join(source);
    fs::create_dir_all(&source).unwrap();
    let mount = mapped(&source, "/v");
    let replaced = inside.stage.join(replaced);
    fs::remove_dir_all(&replaced).unwrap();
    symlink(inside.stage.join("secret"), &replaced).unwrap();
    let error = inside.refused(inside.spec("sleep 1000").with(|spec| {
        spec.users = users;
        spec.mounts = vec![mount];
    }));
    let text = error.await.to_string();
    let option = format!("config.bind[\"{}\"]", source.display());
    for part in [&*option, "has become a symbolic link since it was checked"] {
        assert!(text.contains(part), "{text}");
    }
    inside.stage.leave();
}

#[rstest]
#[case::in_a_user_namespace(private_users())]
#[case::without(Users::Host)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_mount_of_the_host_appears_if_that_is_asked_for(#[case] users: Users) {
    let inside = Inside::new();
    let volume = Mounted::tmpfs(inside.stage.join("volume")).shared();
    fs::create_dir(volume.0.join("later")).unwrap();
    let mount = |target: &str, propagation| Mount {
        propagation,
        ..mapped(&volume.0, target)
    };
    let script = "until test -e /v/go && test -e /follows/later/file; do sleep 0.05; done; ls /follows/later; echo; ls /private/later";
    let spec = inside.spec(script).with(|spec| {
        spec.users = users;
        spec.mounts = vec![
            mount("/follows", Propagation::HostToTask),
            mount("/private", Propagation::Private),
            mount("/v", Propagation::Private),
        ];
    });
    let started = inside.start(spec).await;
    let later = Mounted::tmpfs(volume.0.join("later"));
    fs::write(later.0.join("file"), "").unwrap();
    fs::write(volume.0.join("go"), "").unwrap();
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, &*printed), (0, "file\n\n"));
    drop((later, volume));
    inside.stage.leave();
}

/// Also below mounts: a change of the whole tree of mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_denied_on_a_mount_is_denied_below_it_and_root_cannot_change_that() {
    let inside = Inside::new();
    let volume = volume(&inside.stage);
    let below = Mounted::tmpfs(volume.join("below"));
    for place in [&volume, &below.0] {
        fs::write(place.join("program"), "#!/bin/sh\necho runs\n").unwrap();
        fs::set_permissions(place.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let noexec = Mount {
        restrictions: Restrictions {
            noexec: true,
            nosuid: true,
            nodev: true,
        },
        ..mapped(&volume, "/n")
    };
    let read_only = mapped(&volume, "/r").with_read_only(true);
    let script = "for p in /n/program /n/below/program /r/program; do $p || echo denied; done 2> /dev/null
        for d in /n /n/below /r /r/below; do touch $d/x && echo written || echo denied; done 2> /dev/null
        mount -o remount,rw,bind /r || echo kept; mount -o remount,exec,bind /n || echo kept; touch /r/y || echo denied";
    let printed = run(&inside, vec![noexec, read_only], script).await;
    let want = "denied\ndenied\nruns\nwritten\nwritten\ndenied\ndenied\nkept\nkept\ndenied\n";
    assert_eq!(printed, want);
    drop(below);
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_devices_sockets_and_pipes_are_mounted_by_their_path() {
    let inside = Inside::new();
    let stage = &inside.stage;
    let file = stage.file("config file", "text");
    let socket = stage.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let pipe = stage.join("pipe");
    nix::unistd::mkfifo(&pipe, Bits::from_bits_truncate(0o644)).unwrap();
    let mounts = [
        (&file, "/v/file"),
        (&PathBuf::from("/dev/full"), "/v/device"),
        (&socket, "/v/socket"),
        (&pipe, "/v/pipe"),
    ];
    let mounts = mounts.map(|(source, target)| mapped(source, target));
    let script = "cat /v/file; echo; stat -c '%n %F %u' /v/*; echo x > /v/device || echo full";
    let spec = inside.spec(script).with(|spec| {
        spec.users = private_users();
        spec.mounts = mounts.to_vec();
    });
    let started = inside.start(spec).await;
    let (exit, printed) = inside.finish(&started).await;
    let want = "text\n/v/device character special file 65534\n/v/file regular file 0\n/v/pipe fifo 0\n/v/socket socket 0\nfull\n";
    assert_eq!((exit.code, &*printed), (0, want));
    assert!(socket.metadata().unwrap().file_type().is_socket());
    drop(listener);
    inside.stage.leave();
}

/// On the host there is nothing to remove, whatever happens to the task; and a host with many tasks has not the mounts of each in each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mounts_of_a_task_are_seen_by_systemd_nspawn_alone_and_no_others_are() {
    let inside = Inside::new();
    let volume = volume(&inside.stage);
    let other = Mounted::tmpfs(PathBuf::from(format!("/mnt/{}", inside.stage.name())));
    let spec = inside.spec("sleep 1000").with(|spec| {
        spec.users = private_users();
        spec.mounts = vec![mapped(&volume, "/v")];
    });
    let started = inside.start(spec).await;
    let name = started.state.join("mounts");
    let of_host = procfs::own_mounts().unwrap();
    assert!(!of_host.iter().any(|mount| mount.target.starts_with(&name)));
    let task_dir = TaskDir::new(&started.state);
    let nspawn = task_dir.running().unwrap().nspawn;
    let seen = procfs::mounts_of(nspawn.pid).unwrap();
    assert!(seen.iter().any(|mount| mount.target == name.join("0")));
    assert!(!seen.iter().any(|mount| mount.target == other.0));
    // What the host unmounts is in use no longer.
    umount2(&other.0, MntFlags::empty()).unwrap();
    fs::remove_dir(&other.0).unwrap();
    within("the removal", inside.backend.remove(&started.id))
        .await
        .unwrap();
    inside.stage.leave();
}

/// systemd-nspawn can't map the ids of a root that it puts together.
#[rstest]
#[case::yes(Volatile::Yes, "1\n0:0\n0:0\nmissing\n")]
#[case::state(Volatile::State, "1\n0:0\n0:0\nthere\n")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volatile_root_has_its_owners(
    #[case] volatile: Volatile,
    #[case] want: &str,
    #[values(false, true)] with_mount: bool,
) {
    let inside = Inside::new();
    let tree = merged_tree(&inside.stage, "merged");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/of-image"), "").unwrap();
    let before = owner(&tree.join("usr/bin"));
    let script = "awk '$2 > 0 {print 1}' /proc/self/uid_map; touch /var/x; stat -c %u:%g /usr/bin /var/x
        test -e /etc/of-image && echo there || echo missing; touch /usr/x 2> /dev/null && exit 1; exit 0";
    let volume = volume(&inside.stage);
    let spec = inside.spec(script).with(|spec| {
        spec.users = private_users();
        spec.rootfs.source = nomad_driver_nspawn::container::Root::Directory(tree.clone());
        spec.rootfs.volatile = volatile;
        if with_mount {
            // For which a root that stays read-only lacks the mount point.
            spec.mounts = vec![mapped(&volume, "/data")];
        }
    });
    assert_eq!(inside.run(spec).await, want);
    assert_eq!(owner(&tree.join("usr/bin")), before);
    inside.stage.leave();
}

/// systemd-nspawn makes the missing mount points of one mount in another before it is in the user namespace.
#[rstest]
#[case::of_root((0, 0))]
#[case::of_a_user_beyond_the_range((200_000, 200_000))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_in_a_mount_gets_its_mount_point(#[case] (user, group): (u32, u32)) {
    let inside = Inside::new();
    let outer = volume(&inside.stage);
    chown(&outer, Some(user), Some(group)).unwrap();
    let inner = inside.stage.join("inner");
    fs::create_dir(&inner).unwrap();
    let file = inside.stage.file("file", "text");
    let mounts = vec![
        mapped(&outer, "/v"),
        mapped(&inner, "/v/new/inner"),
        mapped(&file, "/v/a-file"),
        mapped(&inner, "/v/memory/inner"),
    ];
    let script =
        "cat /v/a-file; touch /v/new/inner/made /v/memory/x; stat -c ' %u' /v/new /v/memory";
    let spec = inside.spec(script).with(|spec| {
        spec.users = private_users();
        spec.mounts = mounts;
        spec.tmpfs = vec![tmpfs("/v/memory")];
    });
    assert_eq!(inside.run(spec).await, "text 0\n 0\n");
    assert_eq!(owner(&outer.join("memory")), (user, group));
    assert_eq!(fs::read_dir(outer.join("memory")).unwrap().count(), 0);
    assert!(inner.join("made").exists());
    assert_eq!(owner(&outer.join("new")), (user, group));
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_source_is_created_if_the_job_says_so_and_never_through_a_link() {
    let inside = Inside::new();
    let source = inside.stage.join("new/deep");
    let spec = |source: &Path| {
        inside.spec("touch /v/made; stat -c %u:%a /v").with(|spec| {
            spec.users = private_users();
            spec.mounts = vec![Mount {
                create: true,
                ..mapped(source, "/v")
            }];
        })
    };
    assert_eq!(inside.run(spec(&source)).await, "0:755\n");
    assert_eq!(owner(&source.join("made")), (0, 0));
    symlink(&source, inside.stage.join("link")).unwrap();
    let error = inside.refused(spec(&inside.stage.join("link/more"))).await;
    assert!(error.to_string().contains("config.bind["), "{error}");
    assert!(!source.join("more").exists());
    inside.stage.leave();
}

/// The image lacks the mount point, and can't get it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_temporary_file_system_is_mounted_in_a_read_only_root() {
    let inside = Inside::new();
    let script = "touch /scratch/x && df -k /scratch | tail -n 1 | awk '{print $2}'; touch /y 2> /dev/null || echo kept";
    let spec = inside.spec(script).with(|spec| {
        spec.users = private_users();
        spec.rootfs.read_only = true;
        spec.tmpfs = vec![tmpfs("/scratch")];
    });
    assert_eq!(inside.run(spec).await, "1024\nkept\n");
    inside.stage.leave();
}
