//! A forced stop ends everything, whatever state it is in.

use nomad_driver_nspawn::cgroup::Group;

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_process_is_killed_too(world: World) {
    let started = world
        .up(world.spec("trap '' TERM INT; sleep 600 & kill -STOP $!; echo up; wait"))
        .await;
    let inner = offspring(started.leader.pid);
    assert!(!inner.is_empty());
    within(
        world
            .backend
            .stop(&started, None, Duration::from_millis(50)),
    )
    .await
    .unwrap();
    assert!(
        inner.iter().all(|held| held.wait(LIMIT)),
        "a stopped process lives on"
    );
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_is_killed_too(world: World) {
    let started = world
        .up(world.spec(
            "(sleep 600 & sleep 601 &) ; trap '' TERM INT; echo up; while :; do sleep 0.05; done",
        ))
        .await;
    let inner = offspring(started.leader.pid);
    within(
        world
            .backend
            .stop(&started, None, Duration::from_millis(50)),
    )
    .await
    .unwrap();
    assert!(
        inner.iter().all(|held| held.wait(LIMIT)),
        "a grandchild lives on"
    );
    world.leave(&[&started]).await;
}

/// With a cgroup of its own a stop finds all processes at once.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_has_a_group_of_its_own(world: World) {
    if !has_groups() {
        return world.leave(&[]).await;
    }
    let started = world.up(world.spec(DEAF)).await;
    let inner = offspring(started.leader.pid);
    let group = Group::new(started.cgroup.as_ref().unwrap());
    let payload = group.child("payload").processes();
    assert!(payload.contains(&started.leader.pid), "{payload:?}");
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    assert!(!payload.contains(&nspawn.pid), "{payload:?}");
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_session_is_killed_too(world: World) {
    let script = "setsid sh -c 'trap \"\" TERM HUP; sleep 600 & setsid sleep 601 & wait' & trap '' TERM INT; echo up; while :; do sleep 0.05; done";
    let started = world.up(world.spec(script)).await;
    let inner = offspring(started.leader.pid);
    assert!(!inner.is_empty());
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// The processes fork faster than a list of them can be read.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_bomb_is_killed_too(world: World) {
    let script = "trap '' TERM INT; i=0; while [ $i -lt 20 ]; do (while :; do (:); done) & i=$((i+1)); done; echo up; wait";
    let started = world.up(world.spec(script)).await;
    let inner = offspring(started.leader.pid);
    assert!(inner.len() >= 20);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// Such as those of a payload that runs containers itself.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nested_cgroups_are_killed_and_removed(world: World) {
    if !has_groups() {
        return world.leave(&[]).await;
    }
    let started = world
        .up(world.spec("sleep 600 & trap '' TERM INT; echo up; while :; do sleep 0.05; done"))
        .await;
    let inner = offspring(started.leader.pid);
    let group = Group::new(started.cgroup.as_ref().unwrap());
    let below = group.child("payload").child("a").child("b");
    below.create().unwrap();
    let moved = inner.iter().map(|held| held.process().pid.to_string());
    let moved = moved.filter(|pid| fs::write(below.path().join("cgroup.procs"), pid).is_ok());
    assert!(moved.count() > 0, "no process could be moved");
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_payload_is_killed_too(world: World) {
    if !has_groups() {
        return world.leave(&[]).await;
    }
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "payload/cgroup.freeze").await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// systemd-nspawn is frozen too and can't clean up.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_container_is_killed_too(world: World) {
    if !has_groups() {
        return world.leave(&[]).await;
    }
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "cgroup.freeze").await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_container_can_be_removed(world: World) {
    if !has_groups() {
        return world.leave(&[]).await;
    }
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "cgroup.freeze").await;
    world.leave(&[&started]).await;
}

/// Whether containers get cgroups. Reports the test as not applicable otherwise.
fn has_groups() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        not_applicable("a control group needs root");
    }
    root
}

/// Freezes a cgroup of the container.
async fn freeze(started: &Started, file: &str) {
    let file = started.cgroup.as_ref().unwrap().join(file);
    fs::write(&file, "1").unwrap();
    let events = file.with_file_name("cgroup.events");
    within(async {
        while !fs::read_to_string(&events).unwrap().contains("frozen 1") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Even SIGKILL has no effect on a process in a frozen v1 freezer.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_in_a_v1_freezer_is_killed_too(world: World) {
    let top = Path::new("/sys/fs/cgroup/freezer");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let is_freezer = |line: &str| {
        let mut words = line.split(' ').skip(1);
        words.next() == top.to_str() && words.next() == Some("cgroup")
    };
    if !nix::unistd::geteuid().is_root() || !mounts.lines().any(is_freezer) {
        not_applicable("needs root and the freezer of cgroup v1 at /sys/fs/cgroup/freezer");
        return world.leave(&[]).await;
    }
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    let inner = offspring(started.leader.pid);
    let freezer = top.join(&started.machine);
    fs::create_dir(&freezer).unwrap();
    for pid in [nspawn.pid, started.leader.pid] {
        fs::write(freezer.join("cgroup.procs"), pid.to_string()).unwrap();
    }
    fs::write(freezer.join("freezer.state"), "FROZEN").unwrap();
    within(async {
        while fs::read_to_string(freezer.join("freezer.state")).unwrap() != "FROZEN\n" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    ended_by_force(&world, &started, inner).await;
    let state = fs::read_to_string(freezer.join("freezer.state")).unwrap();
    assert_eq!(state, "FROZEN\n", "a group of somebody else was changed");
    fs::remove_dir(&freezer).unwrap();
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_first_process_is_killed_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.leader.pid, signal("SIGSTOP"));
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_second_process_is_killed_too(world: World) {
    let started = world
        .up(world
            .spec(DEAF)
            .with(|spec| spec.payload.mode = Mode::ProcessTwo))
        .await;
    within(world.backend.signal(&started, signal("SIGSTOP")))
        .await
        .unwrap();
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_nspawn_is_killed_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal("SIGSTOP"));
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// systemd-nspawn must be continued to notice the end.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_nspawn_does_not_hide_a_graceful_exit(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal("SIGSTOP"));
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_works_with_a_stopped_supervisor(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_supervisor_can_be_removed(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    world.leave(&[&started]).await;
}

/// The supervisor is killed and systemd-nspawn is stopped: neither can clean up.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_nspawn_without_a_supervisor_is_killed(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
    let mut all = offspring(started.leader.pid);
    all.extend(
        [nspawn, started.leader].map(|process| ProcessHandle::open_checked(process).unwrap()),
    );
    strike(nspawn.pid, signal("SIGSTOP"));
    strike(started.supervisor.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert!(exit.error.is_some(), "{exit:?}");
    assert!(all.iter().all(|held| held.wait(LIMIT)), "one lives on");
    world.leave(&[&started]).await;
}
