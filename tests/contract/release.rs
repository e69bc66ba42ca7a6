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
    assert_eq!(within(other.attach(&started)).await.unwrap(), started);
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (13, 0));
    within(other.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    within(other.stop(&started, None, AMPLE)).await.unwrap();
    let task_dir = TaskDir::new(&started.state);
    assert!(!task_dir.is_freed(), "released while the release was held");
    let mut asked = Trap::at(&state, Failpoint::Signalled);
    let release = async {
        within(asked.reached()).await;
        assert!(is_alive(started.supervisor), "it did not wait");
        drop(asked);
        drop(releasing);
    };
    let (removed, ()) = tokio::join!(within(other.remove(&started.id)), release);
    removed.unwrap();
    world.leave(&[&started]).await;
}
