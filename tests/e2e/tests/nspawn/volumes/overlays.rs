//! Overlays: which file is seen, where changes go, who owns what, and what is refused.

use nomad_driver_nspawn::container::{Cause, Changes, ContainerSpec, Overlay};

use super::*;

/// Directories of the host: `base` is below `site`, and changes are kept in `kept`.
struct Directories {
    base: PathBuf,
    site: PathBuf,
    kept: PathBuf,
}

impl Directories {
    fn new(top: &Path) -> Self {
        let [base, site, kept] = ["base", "site", "kept"].map(|name| top.join(name));
        for (directory, name) in [(&base, "of-base"), (&site, "of-site")] {
            fs::create_dir_all(directory.join("inner")).unwrap();
            let text = directory.file_name().unwrap().to_str().unwrap();
            for name in ["both", name, "inner/both"] {
                fs::write(directory.join(name), text).unwrap();
            }
            chown(directory.join(name), Some(1000), Some(100)).unwrap();
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o640)).unwrap();
        }
        fs::create_dir_all(&kept).unwrap();
        Self { base, site, kept }
    }

    fn overlay(&self, changes: Changes) -> Mount {
        Mount {
            ids: MountIds::Mapped,
            propagation: Propagation::Private,
            option: Some("config.overlay[0]".to_owned()),
            read_only: changes == Changes::Refused,
            overlay: Some(Overlay {
                below: vec![self.base.clone()],
                changes,
            }),
            ..Mount::new(&self.site, "/app")
        }
    }

    fn keeping(&self) -> Mount {
        self.overlay(kept_in(&self.kept))
    }

    /// All names below the directories that an overlay does not change, with content and owner.
    fn lower(&self) -> String {
        listed(&[&self.base, &self.site])
    }
}

const MIB: u64 = 1 << 20;

const DISCARDED: Changes = Changes::Discarded { size: None };

fn kept_in(directory: &Path) -> Changes {
    Changes::Kept {
        directory: directory.to_owned(),
        create: false,
    }
}

/// Everything below these directories, with kind, permissions, owner and content.
fn listed(directories: &[&Path]) -> String {
    let script = "find \"$@\" -printf '%p %y %m %U:%G ' -a \\( -type f -exec cat {} \\; -printf '\\n' -o -printf '\\n' \\) | sort";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .args(directories)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn with(inside: &Inside, users: Users, mount: Mount, script: &str) -> ContainerSpec {
    inside.spec(script).with(|spec| {
        spec.users = users;
        spec.mounts = vec![mount];
    })
}

#[rstest]
#[case::discarded(DISCARDED)]
#[case::kept(kept_in(Path::new("kept")))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_topmost_file_is_seen_and_the_directories_stay_as_they_are(
    #[case] changes: Changes,
    #[values(Users::Host, private_users(), yes())] users: Users,
) {
    let inside = Inside::new();
    let top = inside.stage.join("top");
    let directories = Directories::new(&top);
    let changes = match changes {
        Changes::Kept { .. } => kept_in(&directories.kept),
        other => other,
    };
    let (lower, all) = (directories.lower(), listed(&[&top]));
    let script = "cd /app; cat both inner/both of-base of-site; echo; stat -c '%n %u:%g %a' . of-base of-site
        echo changed > of-base; rm of-site both; rm -r inner; mkdir inner new; touch new/file; chown 33:34 new/file
        ls; ls inner; cat of-base; stat -c '%n %u:%g %a' of-base new new/file";
    let overlay = directories.overlay(changes.clone());
    let started = inside.start(with(&inside, users, overlay, script)).await;
    assert_eq!(mounts_of_host(started.state.parent().unwrap()), 0);
    let (exit, printed) = inside.finish(&started).await;
    let want = "sitesitebasesite\n. 0:0 755\nof-base 1000:100 640\nof-site 1000:100 640\n\
        inner\nnew\nof-base\nchanged\nof-base 1000:100 640\nnew 0:0 755\nnew/file 33:34 644\n";
    assert_eq!((exit.code, &*printed), (0, want));
    assert!(started.notes.is_empty(), "{:?}", started.notes);
    assert_eq!(directories.lower(), lower);
    let upper = directories.kept.join("upper");
    match changes {
        Changes::Kept { .. } => {
            assert_eq!(
                fs::read_to_string(upper.join("of-base")).unwrap(),
                "changed\n"
            );
            let owners = ["", "of-base", "new", "new/file"].map(|name| owner(&upper.join(name)));
            assert_eq!(owners, [(0, 0), (1000, 100), (0, 0), (33, 34)]);
        }
        _ => assert_eq!(listed(&[&top]), all),
    }
    inside.stage.leave();
}

/// Another start has another range of ids.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_task_has_changed_the_next_one_has_with_other_ids() {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let script = "cd /app; umask 077; echo secret > new; chown 33:34 new; rm both; mkdir -p dir/deep; touch dir/deep/x; echo more >> of-base
        awk '{print $2}' /proc/self/uid_map";
    let first = inside
        .run(with(
            &inside,
            private_users(),
            directories.keeping(),
            script,
        ))
        .await;
    let script = "cd /app; cat new of-base; stat -c '%n %u:%g %a' new of-base dir/deep/x; test -e both || echo gone
        rm -r dir; chown 35 new; echo again >> of-base; awk '{print $2}' /proc/self/uid_map";
    fs::write(inside.stage.join("stdout"), "").unwrap();
    let spec = with(&inside, private_users(), directories.keeping(), script);
    let other = spec.with(|spec| {
        spec.identity.machine = format!("{}-other", spec.identity.machine);
    });
    let second = inside.run(other).await;
    let want = "secret\nbasemore\nnew 33:34 600\nof-base 1000:100 640\ndir/deep/x 0:0 600\ngone\n";
    let second = second
        .strip_prefix(want)
        .unwrap_or_else(|| panic!("{second}"));
    assert_ne!(first, second);
    fs::write(inside.stage.join("stdout"), "").unwrap();
    // And one without a user namespace.
    let script = "cd /app; cat of-base; stat -c '%n %u:%g' new of-base; ls";
    let printed = inside
        .run(with(&inside, Users::Host, directories.keeping(), script))
        .await;
    let want = "basemore\nagain\nnew 35:34\nof-base 1000:100\ninner\nnew\nof-base\nof-site\n";
    assert_eq!(printed, want);
    fs::write(inside.stage.join("stdout"), "").unwrap();
    let script = "cd /app; rm -r inner of-site; mkdir of-site; stat -c '%n %u:%g' new of-base; ls";
    let spec = with(&inside, private_users(), directories.keeping(), script);
    let want = "new 35:34\nof-base 1000:100\nnew\nof-base\nof-site\n";
    assert_eq!(inside.run(spec).await, want);
    inside.stage.leave();
}

#[rstest]
#[case::of_the_topmost((200_000, 200_001), (0, 0))]
#[case::of_the_one_for_changes((0, 0), (200_000, 200_001))]
#[case::of_a_user((1000, 100), (0, 0))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_can_write_an_overlay_whoever_owns_its_directories(
    #[case] topmost: (u32, u32),
    #[case] kept: (u32, u32),
) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    chown(&directories.site, Some(topmost.0), Some(topmost.1)).unwrap();
    fs::set_permissions(&directories.site, fs::Permissions::from_mode(0o2750)).unwrap();
    chown(&directories.kept, Some(kept.0), Some(kept.1)).unwrap();
    fs::set_permissions(&directories.kept, fs::Permissions::from_mode(0o700)).unwrap();
    let script = "cd /app; stat -c '%u:%g %a' .; umask 077; echo x > made; stat -c '%u' made; echo x >> of-base; stat -c %u:%g of-base";
    let spec = with(&inside, private_users(), directories.keeping(), script);
    let shown = match topmost {
        (1000, group) => format!("1000:{group}"),
        _ => "0:0".to_owned(),
    };
    let want = format!("{shown} 2750\n0\n1000:100\n");
    assert_eq!(inside.run(spec).await, want);
    let upper = directories.kept.join("upper");
    assert_eq!(owner(&upper.join("made")).0, 0);
    assert_eq!(owner(&upper.join("of-base")), (1000, 100));
    inside.stage.leave();
}

#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_changed_in_one_that_is_read_only(#[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let before = listed(&[&inside.stage.join("top")]);
    let script = "cd /app; cat both of-base; echo; touch x 2> /dev/null || echo kept; echo x > /app/both 2> /dev/null || echo kept
        mount -o remount,rw,bind /app 2> /dev/null; touch x 2> /dev/null || echo kept";
    let overlay = directories.overlay(Changes::Refused);
    let printed = inside.run(with(&inside, users, overlay, script)).await;
    assert_eq!(printed, "sitebase\nkept\nkept\nkept\n");
    assert_eq!(listed(&[&inside.stage.join("top")]), before);
    inside.stage.leave();
}

#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discarded_changes_have_a_limit(#[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let overlay = directories.overlay(Changes::Discarded { size: Some(MIB) });
    let script = "dd if=/dev/zero of=/app/full bs=64k 2>&1 | head -n 1";
    let printed = inside.run(with(&inside, users, overlay, script)).await;
    assert_eq!(
        printed,
        "dd: error writing '/app/full': No space left on device\n"
    );
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_denied_on_an_overlay_is_denied_to_root() {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let program = directories.base.join("program");
    fs::write(&program, "#!/bin/sh\necho runs\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let all = Restrictions {
        noexec: true,
        nosuid: true,
        nodev: true,
    };
    for (restrictions, want) in [
        (Restrictions::default(), "runs\n"),
        (all, "denied\ndenied\n"),
    ] {
        let overlay = Mount {
            restrictions,
            ..directories.overlay(DISCARDED)
        };
        let script = "/app/program || { echo denied; mount -o remount,exec,bind /app; /app/program || echo denied; }";
        fs::write(inside.stage.join("stdout"), "").unwrap();
        let printed = inside
            .run(with(&inside, private_users(), overlay, script))
            .await;
        assert_eq!(printed, want);
    }
    inside.stage.leave();
}

/// A copy of a mount has its restrictions, and an overlay of it would not.
#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_mount_of_a_directory_forbids_is_forbidden_on_the_overlay(#[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(
        Some("test"),
        &directories.base,
        Some("tmpfs"),
        flags,
        Some("mode=0755"),
    )
    .unwrap();
    let program = directories.base.join("program");
    fs::write(&program, "#!/bin/sh\necho runs\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let script =
        "/app/program || echo denied; grep ' /app ' /proc/self/mountinfo | cut -d ' ' -f 6";
    let overlay = directories.overlay(DISCARDED);
    let printed = inside.run(with(&inside, users, overlay, script)).await;
    assert_eq!(printed, "denied\nrw,nosuid,nodev,noexec,relatime\n");
    nix::mount::umount(&directories.base).unwrap();
    inside.stage.leave();
}

/// What would be a separator or an escape in the options of a mount.
#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_path_can_be_part_of_an_overlay(#[case] users: Users) {
    let inside = Inside::new();
    let top = inside.stage.join(r"a:b,c\:d\,e f%20\040");
    let directories = Directories::new(&top);
    let script = "cat /app/both /app/of-base; touch /app/new";
    let spec = with(&inside, users, directories.keeping(), script);
    assert_eq!(inside.run(spec).await, "sitebase");
    assert!(directories.kept.join("upper/new").exists());
    inside.stage.leave();
}

#[rstest]
#[case::the_topmost("site", "config.overlay[0].lower[0]")]
#[case::one_below("base", "config.overlay[0].lower[1]")]
#[case::the_one_for_changes("kept", "config.overlay[0].upper")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_became_a_link_after_the_check_is_not_part_of_an_overlay(
    #[case] replaced: &str,
    #[case] option: &str,
    #[values(Users::Host, private_users())] users: Users,
) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let secret = inside.stage.join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "key").unwrap();
    let replaced = inside.stage.join("top").join(replaced);
    fs::remove_dir_all(&replaced).unwrap();
    symlink(&secret, &replaced).unwrap();
    let spec = with(&inside, users, directories.keeping(), "sleep 1000");
    let text = inside.refused(spec).await.to_string();
    for part in [option, "has become a symbolic link since it was checked"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    inside.stage.leave();
}

/// A task may write where its changes are kept, in a directory of the allocation.
#[rstest]
#[case("upper")]
#[case("work")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_link_in_the_directory_for_changes_is_followed(#[case] name: &str) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let elsewhere = inside.stage.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, directories.kept.join(name)).unwrap();
    let spec = with(&inside, Users::Host, directories.keeping(), "sleep 1000");
    let text = inside.refused(spec).await.to_string();
    assert!(text.contains("config.overlay[0].upper: "), "{text}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    inside.stage.leave();
}

/// The kernel only warns of two overlays with one directory for changes, and then anything may happen.
#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_task_at_a_time_keeps_its_changes_in_a_directory(#[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let spec = |name: &str, script: &str| {
        let spec = with(&inside, users.clone(), directories.keeping(), script);
        spec.with(|spec| {
            spec.identity.id = format!("{name}-{}", spec.identity.id);
            spec.identity.machine = format!("{name}-{}", spec.identity.machine);
            spec.rootfs.read_only = true;
        })
    };
    let first = inside.start(spec("a", "sleep 1000")).await;
    let error = inside.refused(spec("b", "sleep 1000")).await;
    let text = error.to_string();
    let path = directories.kept.display();
    let want = format!("config.overlay[0].upper: {path} is in use by another overlay");
    assert!(text.contains(&want), "{text}");
    assert_eq!(error.cause(), Cause::Busy);
    within("the removal", inside.backend.remove(&first.id))
        .await
        .unwrap();
    let printed = inside.run(spec("b", "touch /app/new; ls /app")).await;
    assert_eq!(printed, "both\ninner\nnew\nof-base\nof-site\n");
    inside.stage.leave();
}

#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_overlay_would_hide_is_refused_by_name(#[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let below = Mounted::tmpfs(directories.base.join("inner/below"));
    let spec = with(&inside, users, directories.overlay(DISCARDED), "sleep 1000");
    let error = inside.refused(spec).await;
    let want = format!(
        "config.overlay[0].lower[1]: {} is mounted below {}, and an overlay does not show",
        below.0.display(),
        directories.base.display()
    );
    let text = error.to_string();
    assert!(text.contains(&want), "{text}");
    assert!(!error.cause().is_recoverable());
    drop(below);
    inside.stage.leave();
}

/// An overlay can't map ids.
#[rstest]
#[case::a_directory("base", "config.overlay[0].lower[1]", true)]
#[case::the_one_for_changes("kept", "config.overlay[0].upper", false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overlay_that_cannot_be_mapped_is_refused_by_name(
    #[case] name: &str,
    #[case] option: &str,
    #[case] may_be_unmapped: bool,
) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let at = inside.stage.join("top").join(name);
    let overlay = Mounted::overlay(&inside.stage, at.clone());
    fs::write(at.join("file"), "text").unwrap();
    let spec = with(
        &inside,
        private_users(),
        directories.keeping(),
        "sleep 1000",
    );
    let text = inside.refused(spec).await.to_string();
    let place = format!("the file system overlay at {} ", at.display());
    for part in [option, &place, "user_namespacing = false"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(text.contains("idmap = false"), may_be_unmapped, "{text}");
    let script = "cat /app/file; stat -c ' %u' /app/file; echo x > /app/new || echo kept";
    let unmapped = Mount {
        ids: MountIds::Unmapped,
        ..directories.overlay(DISCARDED)
    };
    if may_be_unmapped {
        let spec = with(&inside, private_users(), unmapped, script);
        let printed = inside.run(spec).await;
        assert_eq!(printed, "text 65534\nkept\n");
        fs::write(inside.stage.join("stdout"), "").unwrap();
        let spec = with(&inside, Users::Host, directories.overlay(DISCARDED), script);
        assert_eq!(inside.run(spec).await, "text 0\n");
    }
    drop(overlay);
    inside.stage.leave();
}

/// The same directory by two paths.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_part_of_an_overlay_twice_is_refused() {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    fs::remove_dir_all(&directories.site).unwrap();
    fs::create_dir(&directories.site).unwrap();
    const NONE: Option<&str> = None;
    let (base, site) = (&directories.base, &directories.site);
    mount(Some(base), site, NONE, MsFlags::MS_BIND, NONE).unwrap();
    let bound = Mounted(site.clone());
    let spec = with(
        &inside,
        private_users(),
        directories.overlay(DISCARDED),
        "sleep 1000",
    );
    let text = inside.refused(spec).await.to_string();
    assert!(
        text.contains("config.overlay[0]: the overlay can't be mounted: two of its directories are the same one"),
        "{text}"
    );
    drop(bound);
    inside.stage.leave();
}

#[rstest]
#[case::kept(true, Users::Host)]
#[case::kept_in_a_user_namespace(true, private_users())]
#[case::discarded(false, private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_in_an_overlay_gets_its_mount_point(#[case] keeps: bool, #[case] users: Users) {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let volume = volume(&inside.stage);
    let overlay = match keeps {
        true => directories.keeping(),
        false => directories.overlay(DISCARDED),
    };
    let script = "touch /app/new/deep/made /app/memory/x; stat -c '%n %u' /app/new /app/new/deep /app/memory; cat /app/both";
    let spec = with(&inside, users, overlay, script).with(|spec| {
        spec.mounts.push(mapped(&volume, "/app/new/deep"));
        spec.tmpfs = vec![tmpfs("/app/memory")];
    });
    let want = "/app/new 0\n/app/new/deep 0\n/app/memory 0\nsite";
    assert_eq!(inside.run(spec).await, want);
    assert!(volume.join("made").exists());
    if keeps {
        let upper = directories.kept.join("upper");
        let owners = ["new", "new/deep", "memory"].map(|name| owner(&upper.join(name)));
        assert_eq!(owners, [(0, 0); 3]);
    }
    inside.stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_directory_for_changes_is_created_if_the_job_says_so() {
    let inside = Inside::new();
    let directories = Directories::new(&inside.stage.join("top"));
    let new = inside.stage.join("new/deep");
    let overlay = directories.overlay(Changes::Kept {
        directory: new.clone(),
        create: true,
    });
    let spec = with(&inside, private_users(), overlay, "touch /app/made");
    assert_eq!(inside.run(spec).await, "");
    assert_eq!(owner(&new.join("upper/made")), (0, 0));
    inside.stage.leave();
}

/// Nothing of them has a name on the host, so that nothing has to be removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discarded_changes_are_gone_with_a_container_that_is_killed() {
    let inside = Inside::new();
    let top = inside.stage.join("top");
    let directories = Directories::new(&top);
    let before = listed(&[&top]);
    let script = "echo changed > /app/both; touch /app/new; echo up; sleep 1000";
    let overlay = directories.overlay(DISCARDED);
    let started = inside
        .start(with(&inside, private_users(), overlay, script))
        .await;
    let stdout = inside.stage.join("stdout");
    tokio::task::block_in_place(|| {
        let is_up = || fs::read_to_string(&stdout).unwrap() == "up\n";
        until("the command", || is_up().then_some(()));
    });
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    for pid in [nspawn.pid, started.leader.pid] {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    within("the removal", inside.backend.remove(&started.id))
        .await
        .unwrap();
    assert_eq!(listed(&[&top]), before);
    assert_eq!(mounts_of_host(inside.stage.path()), 0);
    inside.stage.leave();
}
