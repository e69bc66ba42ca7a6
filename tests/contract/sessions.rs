//! What further commands in a container depend on: what the supervisor keeps for them, and the cgroups of those that run.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use nomad_driver_nspawn::container::ExecDefaults;
use nomad_driver_nspawn::exec::SessionGroups;
use nomad_driver_nspawn::supervisor::exec_defaults;

use super::*;

/// What a plugin that has just been started gets for this container.
async fn kept(started: &Started) -> Option<ExecDefaults> {
    let task_dir = TaskDir::new(&started.state);
    let fetch = move || exec_defaults::fetch(&task_dir).unwrap();
    within(tokio::task::spawn_blocking(fetch)).await.unwrap()
}

/// Also after the command has overwritten the area that the kernel shows.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_directory_and_environment_are_kept_until_the_end(world: World) {
    let environment: BTreeMap<_, _> = [("TOKEN", "s3cret"), ("LINES", "a\nb\n")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let spec = world.spec(HEARS_TERM).with(|spec| {
        spec.payload.environment = environment.clone();
        spec.payload.working_directory = Some("/".to_owned());
    });
    let started = world.up(spec).await;
    let wanted = ExecDefaults {
        user: None,
        directory: Some("/".to_owned()),
        environment,
    };
    assert!(!started.state.join("exec").exists());
    // Twice: what one reads does not move the other's offset.
    for _ in 0..2 {
        assert_eq!(kept(&started).await.as_ref(), Some(&wanted));
    }
    strike(started.leader.pid, signal("TERM"));
    world.end(&started).await;
    assert_eq!(kept(&started).await, None);
    world.leave(&[&started]).await;
}

/// A process that takes no notice of SIGTERM, in a cgroup of a session of this container.
#[expect(
    clippy::disallowed_methods,
    reason = "stands for what a session has left"
)]
fn leftover(started: &Started) -> std::process::Child {
    let leader = ProcessHandle::open(started.leader.pid).unwrap();
    let groups = SessionGroups::create(started, &leader).unwrap().hand_over();
    let script =
        "trap '' TERM; for group; do echo $$ >$group/cgroup.procs; done; echo in; exec sleep 600";
    let mut child = Command::new("sh")
        .args(["-c", script, "sh"])
        .args(groups.unified.iter().chain(&groups.joined))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 3];
    let stdout = child.stdout.as_mut().unwrap();
    std::io::Read::read_exact(stdout, &mut word).unwrap();
    assert_eq!(&word, b"in\n");
    let memberships = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
    assert!(memberships.contains("/nomad-exec-"), "{memberships}");
    child
}

/// An init that powers off waits 90 seconds for it.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_a_booted_container_are_killed_before_it_is_asked_to_stop(world: World) {
    if !nix::unistd::geteuid().is_root() {
        not_applicable("needs root and cgroups");
        return world.leave(&[]).await;
    }
    let init = world.tree.join("sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    let script = "#!/bin/sh\nwhile :; do sleep 0.05; done\n";
    fs::write(&init, script).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let spec = world.spec("").with(|spec| {
        spec.payload.mode = Mode::Boot;
        spec.payload.command = Vec::new();
    });
    let started = world.start(spec).await;
    let mut left = leftover(&started);
    // A signal that ends no init, and a grace period after which this scenario has failed.
    let stop = world
        .backend
        .stop(&started, Some(signal("CONT")), 2 * LIMIT);
    let mut stop = Box::pin(stop);
    let ended = tokio::task::spawn_blocking(move || left.wait().unwrap());
    let status = within(async {
        tokio::select! {
            biased;
            ended = ended => ended.unwrap(),
            stopped = &mut stop => panic!("the container was stopped first: {stopped:?}"),
        }
    })
    .await;
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    drop(stop);
    world.leave(&[&started]).await;
}
