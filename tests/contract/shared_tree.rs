//! One tree for several containers: which of them may use it concurrently, and that cleaning up after one never blocks the start of
//! another.

use nomad_driver_nspawn::container::Cause;
use nomad_driver_nspawn::failpoint::Failpoint;

use support::trap::Trap;

use super::*;

const UP: &str = "echo up; exec sleep 1000";

/// A container that does not write to its tree.
fn shares(world: &World, task: &str, script: &str) -> ContainerSpec {
    world
        .named(task, script)
        .with(|spec| spec.rootfs.volatile = Volatile::Overlay)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_written_by_another_container_is_busy(world: World) {
    let writes = world.up(world.named("writes", UP)).await;
    for spec in [
        world.named("writes-too", "exit 0"),
        shares(&world, "shares", "exit 0"),
    ] {
        let error = world.refused(spec).await;
        assert_eq!(error.cause(), Cause::Busy, "{error}");
        assert!(error.is_transient());
        assert!(error.to_string().contains("is currently busy"), "{error}");
    }
    world.leave(&[&writes]).await;
}

/// A killed systemd-nspawn leaves its lock file. The process that removes it holds the lock for a moment.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removing_a_killed_container_does_not_block_others_of_the_tree(world: World) {
    let state = world.settings.state_dir.clone();
    let killed = world.up(shares(&world, "killed", UP)).await;
    let mut locked = Trap::at(&state, Failpoint::TreeLocked);
    let mut busy = Trap::at(&state, Failpoint::TreeBusy);
    let nspawn = TaskDir::new(&killed.state).running().unwrap().nspawn;
    strike(nspawn.pid, Signal::KILL);
    within(locked.reached()).await;
    let mut start = world.backend.start(shares(&world, "next", "exit 11"));
    let met = async {
        tokio::select! {
            reached = busy.reached() => reached,
            started = &mut start => panic!("it did not meet the lock: {started:?}"),
        }
    };
    within(met).await;
    drop(locked);
    within(world.backend.wait(&killed)).await.unwrap();
    within(world.backend.remove(&killed.id)).await.unwrap();
    drop(busy);
    let next = within(&mut start).await.unwrap();
    drop(start);
    assert_eq!(ended(&world.end(&next).await), (11, 0));
    world.leave(&[&killed, &next]).await;
}

/// The container has released its locks by itself. A lock file found later belongs to another container that has just created it and is
/// about to lock it.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_locks_of_a_container_that_ended_by_itself_are_left_alone(world: World) {
    let started = world.up(shares(&world, "ends", HEARS_TERM)).await;
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    let lock = world.tree.with_file_name(".#tree.lck");
    eventually("the lock is gone", || !lock.exists()).await;
    fs::write(&lock, "").unwrap();
    within(world.backend.remove(&started.id)).await.unwrap();
    assert!(lock.exists(), "the lock of another was removed");
    fs::remove_file(lock).unwrap();
    world.leave(&[&started]).await;
}
