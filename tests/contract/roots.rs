//! The root file system and its mounts.

use nomad_driver_nspawn::container::Mount;

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_without_an_operating_system_is_refused(world: World) {
    let empty = world.scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let error = world
        .refused(
            world
                .spec("exit 0")
                .with(|spec| spec.rootfs.source = Root::Directory(empty)),
        )
        .await;
    assert!(matches!(error, BackendError::Start { .. }), "{error:?}");
    assert!(error.to_string().contains("status 1"), "{error}");
    assert!(!error.is_transient());
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_without_a_source_is_refused(world: World) {
    let mounts = vec![Mount::new(world.scratch.path().join("none"), "/mnt")];
    let error = world
        .refused(world.spec("exit 0").with(|spec| spec.mounts = mounts))
        .await;
    assert!(matches!(error, BackendError::Start { .. }), "{error:?}");
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_root_leaves_no_copy(world: World) {
    let started = world
        .up(world.spec(DEAF).with(|spec| spec.rootfs.ephemeral = true))
        .await;
    within(world.backend.stop(&started, None, Duration::ZERO))
        .await
        .unwrap();
    world.leave(&[&started]).await;
}

/// systemd-nspawn creates missing mount points in the image, and fails if it can't.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_root_needs_no_mount_points(world: World) {
    let inside = world.scratch.path().join("inside");
    fs::create_dir(&inside).unwrap();
    let mounts = vec![Mount::new(inside, "/no/such/place")];
    let started = world
        .start(world.spec("exit 17").with(|spec| {
            spec.rootfs.read_only = true;
            spec.mounts = mounts;
        }))
        .await;
    assert_eq!(ended(&world.end(&started).await), (17, 0));
    assert!(!world.tree.join("no").exists(), "the image was written");
    world.leave(&[&started]).await;
}

/// Ids are the same inside and outside: there is nothing to map, and the kernel refuses such a mapping.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_mapping_needs_no_mapped_mounts(world: World) {
    let source = world.scratch.path().join("inside");
    fs::create_dir(&source).unwrap();
    let mounts = vec![Mount::new(source, "/mnt")];
    let users = Users::Private {
        range: "identity".into(),
        ownership: None,
    };
    let started = world
        .start(world.spec("exit 19").with(|spec| {
            spec.users = users;
            spec.mounts = mounts;
        }))
        .await;
    assert_eq!(ended(&world.end(&started).await), (19, 0));
    world.leave(&[&started]).await;
}

/// systemd-nspawn mounts over some directories of every tree, and fails if they don't exist and it can't create them.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_root_without_base_directories_starts(world: World) {
    for base in ["dev", "proc", "run", "sys", "tmp"] {
        let _ = fs::remove_dir_all(world.tree.join(base));
    }
    let started = world
        .start(
            world
                .spec("exit 20")
                .with(|spec| spec.rootfs.read_only = true),
        )
        .await;
    assert_eq!(ended(&world.end(&started).await), (20, 0));
    world.leave(&[&started]).await;
}
