//! Releasing what a container held on the host can take minutes: an ephemeral copy of gigabytes, the lock of a zone. Its supervisor serves
//! its clients all the same.

use nomad_driver_nspawn::failpoint::Failpoint;
use support::trap::Trap;

use super::*;

/// A removal waits until everything is released.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_during_a_long_release(world: World) {
    let state = world.settings.state_dir.clone();
    let mut releasing = Trap::at(&state, Failpoint::Releasing);
    let started = world.start(world.spec("exit 13")).await;
    assert_eq!(ended(&world.end(&started).await), (13, 0));
    within(releasing.reached()).await;
    let other = NspawnBackend::new(world.settings.clone());
    assert_eq!(*within(other.attach(&started)).await.unwrap(), started);
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (13, 0));
    within(other.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    within(other.stop(&started, None, AMPLE)).await.unwrap();
    let task_dir = TaskDir::new(&started.state);
    assert!(!task_dir.is_freed(), "released while the release was held");
    let mut removal = Box::pin(other.remove(&started.id));
    waits_for_release(&state, &mut removal).await;
    drop(releasing);
    within(removal).await.unwrap();
    world.leave(&[&started]).await;
}

/// However long that takes, and whatever time a removal allows for killing a container.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_that_is_releasing_is_not_killed(world: World) {
    let world = world.with_timeouts(Timeouts {
        kill: Duration::ZERO,
        release: LIMIT,
    });
    let state = world.settings.state_dir.clone();
    let releasing = Trap::at(&state, Failpoint::Releasing);
    let started = world.start(world.spec("exit 13")).await;
    assert_eq!(ended(&world.end(&started).await), (13, 0));
    let mut removal = Box::pin(world.backend.remove(&started.id));
    waits_for_release(&state, &mut removal).await;
    drop(releasing);
    within(removal).await.unwrap();
    world.leave(&[&started]).await;
}

/// There is no running record that would name the supervisor. Another plugin may remove the start at the same time.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_start_waits_for_the_release_too(world: World) {
    let world = world.with_timeouts(Timeouts {
        kill: Duration::ZERO,
        release: LIMIT,
    });
    let state = world.settings.state_dir.clone();
    let releasing = Trap::at(&state, Failpoint::Releasing);
    // systemd-nspawn refuses a tree without an operating system.
    let empty = world.scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let spec = world.spec("exit 0").with(|spec| {
        spec.rootfs.source = Root::Directory(empty);
    });
    let id = spec.identity.id.clone();
    let mut start = Box::pin(world.backend.start(spec));
    waits_for_release(&state, &mut start).await;
    let other = NspawnBackend::new(Settings {
        timeouts: Timeouts::default(),
        ..world.settings.clone()
    });
    let mut removal = Box::pin(other.remove(&id));
    waits_for_release(&state, &mut removal).await;
    drop(releasing);
    let (start, removal) = within(async { tokio::join!(start, removal) }).await;
    assert!(
        matches!(start, Err(BackendError::Start { .. })),
        "{start:?}"
    );
    removal.unwrap();
    world.leave(&[]).await;
}

/// It may be stuck, and nothing else would release what is left.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_takes_too_long_is_repeated_without_the_supervisor(world: World) {
    let world = world.with_timeouts(Timeouts {
        release: Duration::ZERO,
        ..Timeouts::default()
    });
    let mut releasing = Trap::at(&world.settings.state_dir, Failpoint::Releasing);
    let started = world.start(world.spec("exit 13")).await;
    assert_eq!(ended(&world.end(&started).await), (13, 0));
    within(releasing.reached()).await;
    within(world.backend.remove(&started.id)).await.unwrap();
    drop(releasing);
    world.leave(&[&started]).await;
}

/// Returns when this call on a backend waits for a supervisor that is releasing resources.
async fn waits_for_release<T: std::fmt::Debug>(
    state: &Path,
    call: &mut (impl Future<Output = T> + Unpin),
) {
    let mut awaiting = Trap::at(state, Failpoint::AwaitingRelease);
    tokio::select! {
        reached = within(awaiting.reached()) => drop(reached),
        over = call => panic!("it did not wait for the release: {over:?}"),
    }
}
