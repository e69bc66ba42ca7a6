//! What further commands in a container depend on: what the supervisor keeps for them, and the cgroups of those that run.

use std::os::unix::fs::PermissionsExt as _;

use nomad_driver_nspawn::container::ExecDefaults;
use nomad_driver_nspawn::exec::{End, ExecRequest};
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
    let request = ExecRequest {
        command: ["/bin/sh", "-c", "trap '' TERM; exec sleep 600"]
            .map(str::to_owned)
            .into(),
        ..ExecRequest::default()
    };
    let mut session = within(world.backend.exec(&started, request)).await.unwrap();
    within(session.control.started()).await;
    // A signal that ends no init, and a grace period after which this scenario has failed.
    let stop = world
        .backend
        .stop(&started, Some(signal("CONT")), 2 * LIMIT);
    let mut stop = Box::pin(stop);
    let end = within(async {
        tokio::select! {
            biased;
            end = session.control.ended() => end,
            stopped = &mut stop => panic!("the container was stopped first: {stopped:?}"),
        }
    })
    .await;
    assert_eq!(end, End::Lost);
    drop(stop);
    world.leave(&[&started]).await;
}
