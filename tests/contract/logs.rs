//! Where the output goes.

use super::*;

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdout_and_stderr_stay_separate(world: World) {
    let started = world
        .start(world.spec("echo to-out; echo to-err >&2"))
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "to-out\n");
    assert!(
        world.said("stderr").starts_with("to-err\n"),
        "{:?}",
        world.said("stderr")
    );
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_can_be_disabled(world: World) {
    let missing = world.scratch.path().join("missing");
    let started = world
        .start(world.spec("echo x; echo y >&2; exit 16").with(|spec| {
            spec.payload.stdout = None;
            spec.payload.stderr = Some(missing);
        }))
        .await;
    assert_eq!(ended(&world.end(&started).await), (16, 0));
    world.leave(&[&started]).await;
}

/// The task can write to the log directory, so it may have replaced a log file.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_for_a_log_is_refused(world: World) {
    let link = world.scratch.path().join("link");
    let elsewhere = world.file("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
    let error = world
        .refused(
            world
                .spec("echo x")
                .with(|spec| spec.payload.stdout = Some(link)),
        )
        .await;
    assert!(error.to_string().contains("log"), "{error}");
    assert_eq!(fs::read_to_string(elsewhere).unwrap(), "");
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fifo_gets_everything_and_end_of_file(world: World) {
    let fifo = fifo(&world);
    let reader = read_all(fifo.clone());
    let script = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line-$i; done; printf last";
    let started = world
        .start(
            world
                .spec(script)
                .with(|spec| spec.payload.stdout = Some(fifo)),
        )
        .await;
    world.end(&started).await;
    let text = within(reader).await.unwrap();
    let want: String = (1..=2000)
        .map(|number| format!("line-{number}\n"))
        .collect();
    assert_eq!(text, format!("{want}last"));
    world.leave(&[&started]).await;
}

/// Web servers do this for their logs.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_stdout_can_be_opened_again(world: World) {
    let fifo = fifo(&world);
    let reader = read_all(fifo.clone());
    let script = "echo first; echo second > /proc/self/fd/1; echo third";
    let started = world
        .start(
            world
                .spec(script)
                .with(|spec| spec.payload.stdout = Some(fifo)),
        )
        .await;
    assert_eq!(ended(&world.end(&started).await), (0, 0));
    assert_eq!(within(reader).await.unwrap(), "first\nsecond\nthird\n");
    world.leave(&[&started]).await;
}

fn fifo(world: &World) -> PathBuf {
    let path = world.scratch.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    path
}

/// Reads a FIFO until end of file, as Nomad's log collector does.
fn read_all(path: PathBuf) -> tokio::task::JoinHandle<String> {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        let mut file = fs::OpenOptions::new().read(true).open(path).unwrap();
        std::io::Read::read_to_string(&mut file, &mut text).unwrap();
        text
    })
}
