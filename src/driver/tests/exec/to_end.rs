//! ExecTask.

use super::other_side::starting;
use super::*;

fn request(seconds: i64) -> Request<proto::ExecTaskRequest> {
    Request::new(proto::ExecTaskRequest {
        task_id: ID.to_owned(),
        command: vec!["check".to_owned()],
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
    })
}

/// Runs ExecTask while `command` plays the other side. Returns stdout, exit code and signal.
async fn run(
    make: fn() -> (Session, OtherSide),
    seconds: i64,
    command: impl AsyncFnOnce(&mut OtherSide),
) -> (String, (i32, i32)) {
    let (mock, mut others) = sessions(make);
    let (driver, _end) = running(mock).await;
    let call = driver.exec_task(request(seconds));
    let other = async {
        let (request, mut other) = others.recv().await.unwrap();
        assert_eq!(request.terminal, None);
        command(&mut other).await;
        other
    };
    let (answer, _other) = tokio::join!(call, other);
    let answer = answer.unwrap().into_inner();
    assert_eq!(answer.stderr, b"");
    let result = answer.result.unwrap();
    let stdout = String::from_utf8(answer.stdout).unwrap();
    (stdout, (result.exit_code, result.signal))
}

async fn write(pipe: &mut Option<tokio::net::unix::pipe::Sender>, text: &str) {
    pipe.as_mut()
        .unwrap()
        .write_all(text.as_bytes())
        .await
        .unwrap();
    // The other side sees it before what follows.
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_check_has_no_input_and_its_output_comes_together() {
    let ran = run(piped, 1, async |other| {
        let mut input = Vec::new();
        other
            .stdin
            .as_mut()
            .unwrap()
            .read_to_end(&mut input)
            .await
            .unwrap();
        assert_eq!(input, b"");
        write(&mut other.stdout, "one\n").await;
        write(&mut other.stderr, "two\n").await;
        write(&mut other.stdout, "three").await;
        other.exit(1);
    });
    assert_eq!(
        timeout(LIMIT, ran).await.unwrap(),
        ("one\ntwo\nthree".to_owned(), (1, 0))
    );
}

#[tokio::test]
async fn much_output_is_cut() {
    let ran = run(piped, 0, async |other| {
        for _ in 0..10 {
            write(&mut other.stdout, &"x".repeat(10_000)).await;
        }
        other.exit(0);
    });
    let (stdout, ended) = timeout(LIMIT, ran).await.unwrap();
    let kept = "x".repeat(CHUNK);
    let cut = 100_000 - CHUNK;
    assert_eq!(
        stdout,
        format!("{kept}\n({cut} more bytes of output are not shown)\n")
    );
    assert_eq!(ended, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_check_is_killed_after_its_timeout_which_begins_with_the_command() {
    let start = tokio::time::Instant::now();
    let ran = run(starting, 2, async |other| {
        tokio::time::sleep(Duration::from_secs(20)).await;
        other.report(&SessionEvent::Running);
        write(&mut other.stdout, "slow").await;
        other.ended().await;
        // What its processes have written before they were killed.
        write(&mut other.stderr, " rest").await;
        other.kill();
    });
    let (stdout, ended) = ran.await;
    assert_eq!(
        stdout,
        "slow rest\nthe command was killed after its timeout of 2s\n"
    );
    assert_eq!(ended, (137, 9));
    assert_eq!(start.elapsed().as_secs(), 22);
}

#[tokio::test(start_paused = true)]
async fn without_a_timeout_a_check_runs_on() {
    let ran = run(piped, 0, async |other| {
        tokio::time::sleep(Duration::from_secs(10_000)).await;
        other.exit(0);
    });
    assert_eq!(ran.await, (String::new(), (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_a_check_leaves_is_not_waited_for() {
    let start = tokio::time::Instant::now();
    let ran = run(piped, 60, async |other| {
        write(&mut other.stdout, "done").await;
        other.report(&SessionEvent::Ended { status: 0 });
        // It still has the pipes open, and is killed.
        other.ended().await;
        other.rest = None;
    });
    assert_eq!(ran.await, ("done".to_owned(), (0, 0)));
    assert_eq!(start.elapsed().as_secs(), 1);
}

#[tokio::test]
async fn a_check_that_does_not_run_has_failed() {
    let ran = run(starting, 1, async |other| {
        other.report(&SessionEvent::Failed(not_found()));
        other.kill();
    });
    let text = "command \"nope\" not found\n".to_owned();
    assert_eq!(timeout(LIMIT, ran).await.unwrap(), (text.clone(), (127, 0)));

    let (driver, _end) = running(refusing(|| ExecError::NotRun(not_found()))).await;
    let answer = driver.exec_task(request(1)).await.unwrap().into_inner();
    assert_eq!(answer.stdout, text.as_bytes());
    assert_eq!(answer.result.unwrap().exit_code, 127);
}

/// The error of a call whose session is played by `command`.
async fn failed(
    make: fn() -> (Session, OtherSide),
    command: impl AsyncFnOnce(&mut OtherSide, watch::Sender<Option<Exit>>),
) -> (Code, String) {
    let (mock, mut others) = sessions(make);
    let (driver, end) = running(mock).await;
    let other = async {
        let mut other = others.recv().await.unwrap().1;
        command(&mut other, end).await;
        other
    };
    let (answer, _other) = tokio::join!(driver.exec_task(request(1)), other);
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test(start_paused = true)]
async fn what_prevents_a_check_is_an_error() {
    let never = failed(starting, async |other, _| other.rest = None).await;
    let text = "the command could not be started within 30 s";
    assert_eq!(never, (Code::Internal, text.to_owned()));
    let lost = failed(piped, async |other, _| other.kill()).await;
    assert_eq!(lost.0, Code::Aborted);
    let ended = failed(piped, async |other, end| {
        other.kill();
        end.send_replace(Some(exit(0, 0)));
    });
    assert_eq!(ended.await.1, "the task has ended");

    let (driver, _end) = running(starts()).await;
    let mut empty = request(1);
    empty.get_mut().command.clear();
    let empty = driver.exec_task(empty).await.unwrap_err();
    assert_eq!(
        (empty.code(), empty.message()),
        (Code::InvalidArgument, "the command is empty")
    );
    let mut unknown = request(1);
    "nobody".clone_into(&mut unknown.get_mut().task_id);
    assert_eq!(
        driver.exec_task(unknown).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn a_check_ends_with_its_call_and_with_the_plugin() {
    let (mock, mut others) = sessions(piped);
    let (driver, _end) = running(mock).await;
    let mut call = Box::pin(driver.exec_task(request(0)));
    let other = tokio::select! {
        _ = &mut call => panic!("it runs"),
        other = others.recv() => other.unwrap().1,
    };
    drop(call);
    timeout(LIMIT, other.ended()).await.unwrap();

    let call = tokio::spawn({
        let driver = driver.clone();
        async move { driver.exec_task(request(0)).await }
    });
    let other = timeout(LIMIT, others.recv()).await.unwrap().unwrap().1;
    driver.root().cancel();
    let status = timeout(LIMIT, call).await.unwrap().unwrap().unwrap_err();
    assert_eq!(status.message(), "the plugin is shutting down");
    timeout(LIMIT, other.ended()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn many_checks_at_once_report_correctly() {
    let (mock, mut others) = sessions(piped);
    let (driver, _end) = running(mock).await;
    let commands = tokio::spawn(async move {
        let mut hanging = Vec::new();
        for number in 0..20 {
            let mut other = others.recv().await.unwrap().1;
            match number % 2 {
                0 => other.exit(7),
                _ => other.rest = None,
            }
            hanging.push(other);
        }
        hanging
    });
    let calls = (0..20).map(|_| driver.exec_task(request(1)));
    let answers = futures_util::future::join_all(calls).await;
    let codes = answers.into_iter().map(|answer| {
        let answer = answer.unwrap().into_inner();
        answer.result.unwrap().exit_code
    });
    let mut codes: Vec<_> = codes.collect();
    codes.sort_unstable();
    assert_eq!(codes, [[7; 10], [137; 10]].concat());
    drop(commands.await);
}
