//! Seccomp filters that were captured from one container and are installed in another. The fake installs none.

use std::sync::{Arc, mpsc};

use nomad_driver_nspawn::exec::{End, ExecRequest, Streams};
use nomad_driver_nspawn::seccomp::{self, Captured, Filter, Kind, Source, Store};
use nomad_driver_nspawn::sys::procfs::status_field;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::*;

/// The fields of `/proc/<pid>/status` that tell how a process is restricted.
const FIELDS: [&str; 8] = [
    "Seccomp",
    "Seccomp_filters",
    "NoNewPrivs",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
];

/// Whether filters can be captured here at all.
fn is_possible(world: &World) -> bool {
    if world.is_fake() {
        not_applicable("needs the filters of a real systemd-nspawn");
        return false;
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    if status_field(&status, "Seccomp") != Some("0") {
        not_applicable("the kernel shows no filters to a process that has some");
        return false;
    }
    true
}

fn source(started: &Started) -> Source {
    let launch_spec = TaskDir::new(&started.state).launch_spec();
    launch_spec.unwrap().seccomp
}

/// What restricts the first process of a container.
fn restrictions(started: &Started) -> Vec<String> {
    let path = format!("/proc/{}/status", started.leader.pid);
    let status = fs::read_to_string(path).unwrap();
    let field = |name: &&str| format!("{name}: {:?}", status_field(&status, name));
    FIELDS.iter().map(field).collect()
}

fn filters(started: &Started) -> Vec<Filter> {
    let leader = ProcessHandle::open(started.leader.pid).unwrap();
    seccomp::read(&leader).unwrap()
}

/// Starts a container whose command prints `up` and then waits, in a world of its own name.
async fn start(world: &World, task: &str, change: impl FnOnce(&mut ContainerSpec)) -> Started {
    let spec = world.named(task, "echo up; exec sleep 1000").with(change);
    let started = world.start(spec).await;
    world.received("up").await;
    started
}

#[rstest]
#[case::plain(Mode::Plain, false, &[])]
#[case::plain_with_users(Mode::Plain, true, &[])]
#[case::plain_with_capabilities(Mode::Plain, false, &["CAP_SYS_TIME", "CAP_SYS_MODULE", "CAP_SYSLOG"])]
#[case::init(Mode::ProcessTwo, false, &[])]
#[case::init_with_users_and_capabilities(Mode::ProcessTwo, true, &["CAP_SYS_RAWIO"])]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captured_filters_are_those_of_systemd_nspawn(
    world: World,
    #[case] mode: Mode,
    #[case] users: bool,
    #[case] capabilities: &[&str],
) {
    if !is_possible(&world) {
        return world.leave(&[]).await;
    }
    let change = |spec: &mut ContainerSpec| {
        spec.payload.mode = mode;
        spec.payload.capabilities = capabilities.iter().map(|&name| name.to_owned()).collect();
        if users {
            spec.users = Users::Private {
                range: "pick".into(),
                ownership: None,
            };
        }
    };
    let first = start(&world, "first", change).await;
    assert!(matches!(source(&first), Source::Capture(_)));
    let built = filters(&first);
    assert!(!built.is_empty());
    let wanted = restrictions(&first);
    stop(&world, &first).await;
    let second = start(&world, "second", change).await;
    let count = u32::try_from(built.len()).unwrap();
    assert!(matches!(source(&second), Source::Captured { count: found, .. } if found == count));
    assert_eq!(filters(&second), built);
    assert_eq!(restrictions(&second), wanted);
    assert_eq!(second.filters, first.filters);
    // A further command has them too.
    let text = seccomp_of_a_command(&world, &second).await;
    assert_eq!(text, format!("Seccomp:\t2\nSeccomp_filters:\t{count}\n"));
    world.leave(&[&second]).await;
}

/// A command gets captured filters without a look at the container's first process, which another tracer holds here.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_gets_captured_filters_without_tracing_the_task(world: World) {
    if !is_possible(&world) {
        return world.leave(&[]).await;
    }
    let (_, _, captured) = captured(&world).await;
    let second = start(&world, "second", |_| {}).await;
    let leader = nix::unistd::Pid::from_raw(second.leader.pid);
    // The kernel ties a tracer to its thread.
    let (let_go, until) = mpsc::channel::<()>();
    let held = Arc::new(tokio::sync::Notify::new());
    let seized = Arc::clone(&held);
    let tracer = std::thread::spawn(move || {
        nix::sys::ptrace::seize(leader, nix::sys::ptrace::Options::empty()).unwrap();
        seized.notify_one();
        until.recv().unwrap_err();
    });
    within(held.notified()).await;
    let traced = ProcessHandle::open(second.leader.pid).unwrap();
    seccomp::read(&traced).unwrap_err();
    let count = captured.filters.len();
    assert_eq!(
        seccomp_of_a_command(&world, &second).await,
        format!("Seccomp:\t2\nSeccomp_filters:\t{count}\n")
    );
    drop(let_go);
    tracer.join().unwrap();
    world.leave(&[&second]).await;
}

/// What the kernel says about the filters of a further command.
async fn seccomp_of_a_command(world: &World, started: &Started) -> String {
    let command = ["/bin/grep", "^Seccomp", "/proc/self/status"];
    let request = ExecRequest {
        command: command.map(str::to_owned).to_vec(),
        ..ExecRequest::default()
    };
    let mut session = within(world.backend.exec(started, request)).await.unwrap();
    let Streams::Pipes { mut stdout, .. } = session.streams else {
        panic!("no pipes");
    };
    let mut text = String::new();
    within(stdout.read_to_string(&mut text)).await.unwrap();
    assert!(matches!(
        within(session.control.ended()).await,
        End::Exited(_)
    ));
    within(session.control.end()).await;
    text
}

/// Ends a container and removes what is left of it.
async fn stop(world: &World, started: &Started) {
    within(world.backend.stop(started, None, Duration::ZERO))
        .await
        .unwrap();
    within(world.backend.remove(&started.id)).await.unwrap();
    fs::write(world.file("stdout"), "").unwrap();
}

/// The store of a world, the kind of its containers, and the filters that one of them has left.
async fn captured(world: &World) -> (Store, Kind, Captured) {
    let started = start(world, "first", |_| {}).await;
    stop(world, &started).await;
    let store = Store::of(&world.settings.state_dir);
    let program = world.settings.nspawn.as_ref().unwrap();
    let kind = Kind::of(&world.spec(""), program).unwrap().unwrap();
    let captured = store.load(&kind).unwrap();
    (store, kind, captured)
}

/// Whatever is wrong, the start succeeds, with all filters.
#[rstest]
#[case::a_program_that_the_kernel_refuses(|captured: &mut Captured| captured.filters[0].0[0].0 = 0xffff)]
#[case::an_empty_program(|captured: &mut Captured| captured.filters[1].0.clear())]
#[case::other_capabilities(|captured: &mut Captured| captured.bounding ^= 1)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_that_can_not_be_installed_are_built(
    world: World,
    #[case] damage: fn(&mut Captured),
) {
    if !is_possible(&world) {
        return world.leave(&[]).await;
    }
    let (store, kind, whole) = captured(&world).await;
    let mut damaged = whole.clone();
    damage(&mut damaged);
    store.save(&damaged).unwrap();
    // A log collector stops reading when nobody has the pipe open any more.
    let log = world.scratch.path().join("log");
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut pipe = pipe::OpenOptions::new().open_receiver(&log).unwrap();
    let collector = tokio::spawn(async move {
        let mut line = [0; 3];
        pipe.read_exact(&mut line).await.map(|_| line)
    });
    let spec = world.named("second", "echo up; exec sleep 1000");
    let spec = spec.with(|spec| spec.payload.stdout = Some(log.clone()));
    let second = world.start(spec).await;
    assert_eq!(source(&second), Source::Nspawn);
    assert_eq!(filters(&second), whole.filters);
    assert_eq!(store.load(&kind), None, "they are not used again");
    assert_eq!(within(collector).await.unwrap().unwrap(), *b"up\n");
    world.leave(&[&second]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_can_not_be_used_is_replaced(world: World) {
    if !is_possible(&world) {
        return world.leave(&[]).await;
    }
    let (store, kind, whole) = captured(&world).await;
    let directory = world.settings.state_dir.join(seccomp::DIRECTORY);
    for entry in fs::read_dir(directory).unwrap().flatten() {
        fs::write(entry.path(), "other").unwrap();
    }
    assert_eq!(store.load(&kind), None);
    let second = start(&world, "second", |_| {}).await;
    assert!(matches!(source(&second), Source::Capture(_)));
    assert_eq!(store.load(&kind), Some(whole));
    world.leave(&[&second]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_can_turn_captured_filters_off(mut world: World) {
    world.settings.seccomp_cache = false;
    world.backend = NspawnBackend::new(world.settings.clone());
    let started = start(&world, "first", |_| {}).await;
    assert_eq!(source(&started), Source::Nspawn);
    assert!(!world.settings.state_dir.join(seccomp::DIRECTORY).exists());
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_whose_kernel_shows_filters_uses_captured_ones(world: World) {
    if !is_possible(&world) {
        return world.leave(&[]).await;
    }
    assert_eq!(within(world.backend.probe()).await.seccomp_cache, Ok(()));
    world.leave(&[]).await;
}
