//! Owners of files in a user namespace: what is mapped, what can't be, and what is refused then.

use super::*;

/// systemd-nspawn's own mapping fails if anything is mounted below the source.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_with_a_mount_below_has_the_owners_of_the_host() {
    let inside = Inside::new();
    let volume = volume(&inside.stage);
    let below = Mounted::tmpfs(volume.join("below"));
    for (name, user, group) in [("of-user", 1000, 100), ("of-nobody", 70_000, 0)] {
        fs::write(volume.join(name), "").unwrap();
        chown(volume.join(name), Some(user), Some(group)).unwrap();
    }
    let script =
        "cd /v; touch made below/made; stat -c '%n %u:%g' of-user of-nobody made below/made";
    let printed = run(&inside, vec![mapped(&volume, "/v")], script).await;
    assert_eq!(
        printed,
        "of-user 1000:100\nof-nobody 65534:0\nmade 0:0\nbelow/made 0:0\n"
    );
    for made in ["made", "below/made"] {
        assert_eq!(owner(&volume.join(made)), (0, 0), "{made}");
    }
    drop(below);
    inside.stage.leave();
}

/// Another start has another range of ids.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_task_has_written_the_next_one_reads_with_other_ids() {
    let inside = Inside::new();
    let volume = volume(&inside.stage);
    let range = |script: &str| format!("{script}; awk '{{print $2}}' /proc/self/uid_map");
    let mounts = || vec![mapped(&volume, "/v")];
    let script = range("umask 077; echo secret > /v/file");
    let first = run(&inside, mounts(), &script).await;
    fs::write(inside.stage.join("stdout"), "").unwrap();
    // The name decides the range.
    let spec = inside.spec(&range("cat /v/file; stat -c %u:%g:%a /v/file"));
    let spec = spec.with(|spec| {
        spec.users = private_users();
        spec.mounts = mounts();
        spec.identity.machine = format!("{}-other", spec.identity.machine);
    });
    let second = inside.run(spec).await;
    let second = second.strip_prefix("secret\n0:0:600\n").unwrap();
    assert_ne!(first, second);
    assert_eq!(owner(&volume.join("file")), (0, 0));
    inside.stage.leave();
}

#[rstest]
#[case::within_the_range((1000, 100), "1000:100", (0, 0))]
#[case::a_user_beyond_it((200_000, 100), "0:100", (200_000, 0))]
#[case::a_group_beyond_it((1000, 200_001), "1000:0", (0, 200_001))]
#[case::both_beyond_it((200_000, 200_001), "0:0", (200_000, 200_001))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_can_write_a_volume_whoever_owns_it(
    #[case] (user, group): (u32, u32),
    #[case] shown: &str,
    #[case] made: (u32, u32),
) {
    let inside = Inside::new();
    let volume = volume(&inside.stage);
    chown(&volume, Some(user), Some(group)).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o750)).unwrap();
    let script = "stat -c %u:%g /v; echo x > /v/made; stat -c %u:%g /v/made";
    let printed = run(&inside, vec![mapped(&volume, "/v")], script).await;
    assert_eq!(printed, format!("{shown}\n0:0\n"));
    assert_eq!(owner(&volume.join("made")), made);
    inside.stage.leave();
}

#[rstest]
#[case::the_source_itself("")]
#[case::a_mount_below_it("/deep/below")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_mapped_is_refused_by_name_or_taken_as_it_is(#[case] below: &str) {
    let inside = Inside::new();
    let top = Mounted::tmpfs(inside.stage.join("volume")).shared();
    let volume = top.0.clone();
    let at = PathBuf::from(format!("{}{below}", volume.display()));
    let overlay = Mounted::overlay(&inside.stage, at.clone());
    fs::write(at.join("file"), "text").unwrap();
    let spec = |ids| {
        inside
            .spec(&format!("cat /v{below}/file; stat -c ' %u' /v{below}/file"))
            .with(|spec| {
                spec.users = private_users();
                let mount = mapped(&volume, "/v");
                spec.mounts = vec![Mount { ids, ..mount }];
            })
    };
    let error = inside.refused(spec(MountIds::Mapped)).await;
    let text = error.to_string();
    let option = format!("config.bind[\"{}\"]", volume.display());
    let place = format!("the file system overlay at {} ", at.display());
    for part in [
        &*option,
        &place,
        "idmap = false",
        "user_namespacing = false",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!error.cause().is_recoverable());
    assert_eq!(inside.run(spec(MountIds::Unmapped)).await, "text 65534\n");
    let before = mounts_of_host(&volume);
    let started = inside.start(spec(MountIds::MappedIfPossible)).await;
    assert_eq!(mounts_of_host(&volume), before);
    let [note] = &*started.notes else {
        panic!("{:?}", started.notes)
    };
    assert!(note.contains("the file system overlay"), "{note}");
    inside.finish(&started).await;
    drop((overlay, top));
    inside.stage.leave();
}

/// What the kernel shows of itself has no owners to map, and does not keep the rest from being mapped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_of_the_kernel_below_a_volume_is_taken_as_it_is() {
    let inside = Inside::new();
    // As on a host with systemd, where what is mounted in one place of a shared mount is mounted in all.
    let top = Mounted::tmpfs(inside.stage.join("volume")).shared();
    let volume = top.0.clone();
    let kernel = Mounted::new(volume.join("kernel"), "proc", MsFlags::empty(), "");
    let memory = Mounted::tmpfs(volume.join("memory"));
    let spec = || {
        let script = "cd /v; touch made memory/made; stat -c %u . made memory memory/made kernel";
        inside.spec(script).with(|spec| {
            spec.users = private_users();
            spec.mounts = vec![mapped(&volume, "/v")];
        })
    };
    let before = mounts_of_host(&volume);
    let started = inside.start(spec()).await;
    assert_eq!(mounts_of_host(&volume), before);
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, &*printed), (0, "0\n0\n0\n0\n65534\n"));
    let [note] = &*started.notes else {
        panic!("{:?}", started.notes)
    };
    let place = format!("the file system proc at {} ", kernel.0.display());
    assert!(note.contains(&place), "{note}");
    // Others are found behind it.
    let overlay = Mounted::overlay(&inside.stage, volume.join("overlay"));
    let text = inside.refused(spec()).await.to_string();
    assert!(text.contains("the file system overlay at "), "{text}");
    drop((overlay, memory, kernel, top));
    inside.stage.leave();
}

/// Whatever is mounted below it, such as `/dev/shm`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_the_kernel_is_mounted_as_it_is() {
    let inside = Inside::new();
    let spec = inside.spec("test -c /v/null && ls -d /v/shm").with(|spec| {
        spec.users = private_users();
        spec.mounts = vec![mapped(Path::new("/dev"), "/v")];
    });
    let started = inside.start(spec).await;
    let (exit, printed) = inside.finish(&started).await;
    assert_eq!((exit.code, &*printed), (0, "/v/shm\n"));
    assert!(
        started.notes[0].contains("the file system "),
        "{:?}",
        started.notes
    );
    inside.stage.leave();
}

/// An image whose files have been given to a range.
#[rstest]
#[case::picked("pick", false, 0x12)]
#[case::picked_and_read_only_without_mount_points("pick", true, 0x13)]
#[case::named("yes", false, 0x14)]
#[case::named_and_read_only_without_mount_points("yes", true, 0x15)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_a_range_keeps_its_owners(
    #[case] range: &str,
    #[case] read_only: bool,
    #[case] number: u32,
) {
    let first = number << 16;
    let inside = Inside::new();
    let tree = inside.stage.join("tree");
    let chown = Command::new("chown")
        .args(["-R", "-h", &format!("{first}:{first}")])
        .arg(&tree)
        .status();
    assert!(chown.unwrap().success());
    let file = tree.join("etc/of-33");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(&file, "").unwrap();
    for path in [&tree.join("etc"), &file] {
        std::os::unix::fs::chown(path, Some(first + 33), Some(first + 33)).unwrap();
    }
    let volume = volume(&inside.stage);
    let script =
        "stat -c %u /etc/of-33 /bin/busybox; touch /v/made; awk '{print $2}' /proc/self/uid_map";
    let spec = inside.spec(script).with(|spec| {
        spec.users = Users::Private {
            range: range.to_owned(),
            ownership: (range == "pick").then(|| "auto".to_owned()),
        };
        spec.rootfs.read_only = read_only;
        spec.mounts = vec![mapped(&volume, "/v")];
    });
    assert_eq!(inside.run(spec).await, format!("33\n0\n{first}\n"));
    assert_eq!(owner(&volume.join("made")), (0, 0));
    inside.stage.leave();
}
