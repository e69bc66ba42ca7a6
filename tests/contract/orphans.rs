//! Reconciliation removes everything that no plugin holds a lock on.

use super::*;

/// Starts a container with a backend that is dropped, as if its process had died: its locks are released.
async fn abandoned(world: &World, spec: ContainerSpec) -> Started {
    let dead = NspawnBackend::new(world.settings.clone());
    Started::clone(&*within(dead.start(spec)).await.unwrap())
}

fn is_cleared(started: &Started) -> bool {
    !started.state.exists() && !is_alive(started.leader) && !is_alive(started.supervisor)
}

/// Reconciles until all of these are removed. A process that is being started for another scenario inherits the dead backend's locks until
/// it calls exec, and reconciliation skips what looks locked.
async fn cleared(world: &World, all: &[&Started]) {
    within(async {
        while !all.iter().all(|started| is_cleared(started)) {
            world.backend.reconcile(&world.alloc_roots()).await;
        }
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unlocked_starts_are_removed(world: World) {
    let beside = |task: &str, script: &str| {
        world
            .named(task, script)
            .with(|spec| spec.rootfs.volatile = Volatile::Overlay)
    };
    let deaf = abandoned(&world, beside("deaf", DEAF)).await;
    world.received("up").await;
    let over = abandoned(&world, beside("over", "exit 1")).await;
    cleared(&world, &[&deaf, &over]).await;
    within(world.backend.reconcile(&world.alloc_roots())).await;
    let next = world.start(world.spec("exit 21")).await;
    assert_eq!(ended(&world.end(&next).await), (21, 0));
    world.leave(&[&deaf, &over, &next]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_of_another_backend_are_left_alone(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    world.received("up").await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile(&world.alloc_roots())).await;
    within(world.backend.reconcile(&world.alloc_roots())).await;
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovered_starts_are_left_alone(world: World) {
    let started = abandoned(&world, world.spec(HEARS_TERM)).await;
    world.received("up").await;
    within(world.backend.attach(&started)).await.unwrap();
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile(&world.alloc_roots())).await;
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_record_that_may_be_asked_for_is_kept(world: World) {
    let started = world.start(world.spec("exit 22")).await;
    world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile(&world.alloc_roots())).await;
    within(other.attach(&started)).await.unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (22, 0));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlocked_copy_is_removed(world: World) {
    let spec = world.spec(DEAF).with(|spec| spec.rootfs.ephemeral = true);
    let started = abandoned(&world, spec).await;
    world.received("up").await;
    cleared(&world, &[&started]).await;
    world.leave(&[&started]).await;
}

/// The leftovers of a plugin that is killed before it has started the supervisor.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_starts_are_removed(world: World) {
    let bare = world.task_dir("bare");
    bare.create().unwrap();
    let secret = world.task_dir("secret");
    secret.create().unwrap();
    fs::write(secret.path().join("environment.new"), "{").unwrap();
    let started = world.start(world.spec("exit 0")).await;
    world.end(&started).await;
    let ordered = world.copied(&started, "ordered", |_| {});
    fs::remove_file(ordered.path().join("running")).unwrap();
    fs::remove_file(ordered.path().join("exit")).unwrap();
    within(world.backend.reconcile(&world.alloc_roots())).await;
    for task_dir in [bare, secret, ordered] {
        assert!(!task_dir.path().exists(), "{}", task_dir.path().display());
    }
    assert!(started.state.exists());
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_launch_spec_does_not_hide_a_container(world: World) {
    let started = abandoned(&world, world.spec(DEAF)).await;
    world.received("up").await;
    fs::write(started.state.join("order"), "{\"id\":").unwrap();
    cleared(&world, &[&started]).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_files_are_left_alone(world: World) {
    use std::os::unix::fs::symlink;
    let started = world.start(world.spec("exit 0")).await;
    let state = &world.settings.state_dir;
    let elsewhere = world.scratch.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("order"), "{}").unwrap();
    let strange = world.task_dir("strange");
    strange.create().unwrap();
    let link = world.task_dir("link").path().to_owned();
    symlink(&elsewhere, &link).unwrap();
    let foreign = [
        state.join("note"),
        state.join("else/deep"),
        strange.path().join("order.old"),
        elsewhere.join("order"),
    ];
    fs::create_dir(state.join("else")).unwrap();
    for path in &foreign {
        fs::write(path, "{}").unwrap();
    }
    // A launch spec that would make the driver remove something foreign.
    let hostile = world.copied(&started, "hostile", |order| {
        order["machine"] = "../../../../tmp".into();
    });
    within(world.backend.reconcile(&world.alloc_roots())).await;
    for path in foreign.iter().chain([&link]) {
        assert!(path.symlink_metadata().is_ok(), "{}", path.display());
    }
    assert!(hostile.path().join("order").exists());
    fs::remove_file(link).unwrap();
    fs::remove_file(state.join("note")).unwrap();
    for directory in [&state.join("else"), strange.path(), hostile.path()] {
        fs::remove_dir_all(directory).unwrap();
    }
    world.leave(&[&started]).await;
}

/// After a reboot the same pid with the same start time may be a different process.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_process_is_mistaken_for_one_of_another_boot(world: World) {
    let innocent = world.start(world.spec(HEARS_TERM)).await;
    world.received("up").await;
    let old = |task: &str| {
        world.copied(&innocent, task, |value| {
            let boot = "00000000-0000-0000-0000-000000000000";
            if value.get("started").is_some() {
                value["started"]["boot"] = boot.into();
            } else {
                value["boot"] = boot.into();
                value["place"] = serde_json::Value::Null;
                value["locks"] = serde_json::Value::Null;
            }
        })
    };
    let (reconciled, removed) = (old("reconciled"), old("removed"));
    let found = Started {
        id: world.named("removed", "").identity.id,
        state: removed.path().to_owned(),
        boot: removed.launch_spec().unwrap().boot,
        ..innocent.clone()
    };
    lost(&world, &found).await;
    within(world.backend.remove(&found.id)).await.unwrap();
    assert!(!removed.path().exists());
    within(world.backend.reconcile(&world.alloc_roots())).await;
    assert!(!reconciled.path().exists());
    for process in [innocent.leader, innocent.supervisor] {
        assert!(is_alive(process), "another one was ended");
    }
    within(world.backend.stop(&innocent, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&innocent).await), (3, 0));
    world.leave(&[&innocent]).await;
}
