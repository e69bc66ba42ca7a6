//! What a booted container prints and how it ends, with an init that has no journal.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};

use nomad_driver_nspawn::container::{Console, Journal, Notes};

use super::*;

/// The fake simulates an init, and runs none.
fn has_no_init(world: &World) -> bool {
    let is_fake = world.is_fake();
    if is_fake {
        not_applicable("needs an image's own init: the fake runs none");
    }
    is_fake
}

/// A container whose init is this script, and what the user is told about it.
fn booted(world: &mut World, script: &str) -> (ContainerSpec, Arc<Mutex<Vec<String>>>) {
    let init = world.tree.join("sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    fs::write(&init, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let received = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&received);
    let notes = Notes::new(move |_, note| kept.lock().unwrap().push(note));
    world.backend = NspawnBackend::new(world.settings.clone()).with_notes(notes);
    let spec = world.spec("").with(|spec| {
        spec.payload.mode = Mode::Boot;
        spec.payload.command = Vec::new();
        spec.payload.console = Console::Relayed;
        spec.payload.journal = Some(Journal::default());
    });
    (spec, received)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_console_is_in_the_log_to_its_last_line(mut world: World) {
    if has_no_init(&world) {
        return world.leave(&[]).await;
    }
    let script = "i=0; while [ $i -lt 300 ]; do echo line-$i-; i=$((i + 1)); done; printf last";
    let (spec, notes) = booted(&mut world, script);
    let started = world.start(spec).await;
    assert_eq!(ended(&world.end(&started).await), (0, 0));
    let printed = world.said("stdout");
    let lines: Vec<_> = printed.lines().map(str::trim_end).collect();
    let expected = (0..300).map(|number| format!("line-{number}-"));
    let expected: Vec<_> = expected.chain(["last".to_owned()]).collect();
    assert_eq!(lines, expected);
    let is_noted = |notes: &[String]| notes == ["the system has shut down by itself"];
    eventually("the note", || is_noted(&notes.lock().unwrap())).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_is_explained_only_by_a_systemd_that_says_why(mut world: World) {
    if has_no_init(&world) {
        return world.leave(&[]).await;
    }
    let (spec, notes) = booted(&mut world, "echo booting; echo no cgroups; exit 255");
    let started = world.start(spec.clone()).await;
    let exit = world.end(&started).await;
    assert_eq!((ended(&exit), exit.error), ((255, 0), None));
    within(world.backend.remove(&started.id)).await.unwrap();
    let script = "#!/bin/sh\necho booting; echo no cgroups; echo Exiting PID 1...; exit 255\n";
    fs::write(world.tree.join("sbin/init"), script).unwrap();
    let started = world.start(spec).await;
    let exit = world.end(&started).await;
    let error = "the image's init has failed: booting; no cgroups";
    assert_eq!(
        (ended(&exit), exit.error.as_deref()),
        ((255, 0), Some(error))
    );
    assert!(notes.lock().unwrap().is_empty(), "{notes:?}");
    world.leave(&[&started]).await;
}

/// A container that is killed has not failed by itself, and what it was asked to do is no news.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_explained_while_it_takes_long(mut world: World) {
    if has_no_init(&world) {
        return world.leave(&[]).await;
    }
    let script = "trap 'echo bye; exit 143' USR1; echo up; while :; do sleep 0.05; done";
    let (spec, notes) = booted(&mut world, script);
    let started = world.up(spec.clone()).await;
    world.handles(&started, "USR1").await;
    let asked = world.backend.stop(&started, Some(signal("USR1")), AMPLE);
    within(asked).await.unwrap();
    let exit = world.end(&started).await;
    assert_eq!((ended(&exit), exit.error), ((143, 0), None));
    assert!(notes.lock().unwrap().is_empty(), "{notes:?}");
    within(world.backend.remove(&started.id)).await.unwrap();
    let started = world.up(spec).await;
    let unanswered = Some(signal("CONT"));
    let stop = world
        .backend
        .stop(&started, unanswered, Duration::from_secs(1));
    within(stop).await.unwrap();
    let exit = world.end(&started).await;
    assert_eq!((ended(&exit), exit.error), ((137, 9), None));
    let expected = "half of kill_timeout is over, and the system has not stopped";
    assert_eq!(*notes.lock().unwrap(), [expected]);
    world.leave(&[&started]).await;
}
