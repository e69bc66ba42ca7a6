//! Commands that do not run, and sessions that end in another way than by the exit of the command.

use nspawn_init::Step;

use super::other_side::starting;
use super::*;

fn error(received: &Received) -> (Code, &str) {
    let (code, message) = received.error.as_ref().unwrap();
    (*code, message)
}

const TASK_ENDED: (Code, &str) = (Code::FailedPrecondition, "the task has ended");

#[tokio::test(start_paused = true)]
async fn the_end_of_the_task_ends_the_session() {
    let mut exec = Exec::start([]).await;
    exec.other
        .stdout
        .as_mut()
        .unwrap()
        .write_all(b"before")
        .await
        .unwrap();
    exec.other.kill();
    exec.task_end.send_replace(Some(exit(0, 0)));
    let received = exec.received().await;
    assert_eq!(error(&received), TASK_ENDED);
    assert_eq!(received.text(), ("before", ""));
}

/// Even if its processes do not.
#[tokio::test(start_paused = true)]
async fn a_session_that_outlives_its_task_is_ended() {
    let mut exec = Exec::start([]).await;
    exec.task_end.send_replace(Some(exit(0, 0)));
    exec.other.rest = None;
    let other = std::mem::replace(&mut exec.other, piped().1);
    let (received, ()) = tokio::join!(exec.received(), other.ended());
    assert_eq!(error(&received), TASK_ENDED);
}

#[tokio::test(start_paused = true)]
async fn the_exit_of_a_command_is_reported_although_its_task_has_ended() {
    let mut exec = Exec::start([]).await;
    exec.task_end.send_replace(Some(exit(0, 0)));
    exec.other
        .stdout
        .as_mut()
        .unwrap()
        .write_all(b"last")
        .await
        .unwrap();
    exec.other.exit(4);
    let received = exec.received().await;
    assert_eq!(received.ends.last().unwrap(), "exit 4 0");
    assert_eq!(received.text().0, "last");
}

#[tokio::test(start_paused = true)]
async fn a_command_that_is_killed_with_its_watcher_while_the_task_runs_is_an_error() {
    let mut exec = Exec::start([]).await;
    exec.other.kill();
    let mut events = exec.driver.events.subscribe();
    let text = "the command was killed from outside, or the task is being stopped";
    assert_eq!(error(&exec.received().await), (Code::Aborted, text));
    let event = events.recv().await.unwrap();
    assert_eq!(event.message, format!("exec failed: {text}"));
}

/// The container may have passed the pipes to a process that is not killed.
#[tokio::test(start_paused = true)]
async fn the_output_of_a_killed_command_is_not_waited_for() {
    let mut exec = Exec::start([]).await;
    exec.other.channel = None;
    exec.other.rest = None;
    let (code, _) = exec.received().await.error.unwrap();
    assert_eq!(code, Code::Aborted);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_ends_before_the_command_runs_is_reported() {
    let mut exec = Exec::of(starting, false, []).await;
    exec.other.kill();
    exec.task_end.send_replace(Some(exit(0, 0)));
    assert_eq!(error(&exec.received().await), TASK_ENDED);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_never_runs_is_an_error() {
    let mut exec = Exec::of(starting, false, []).await;
    exec.other.rest = None;
    let other = std::mem::replace(&mut exec.other, piped().1);
    let received = exec.received().await;
    let text = "the command could not be started within 30 s";
    assert_eq!(error(&received), (Code::Internal, text));
    drop(other);
}

#[tokio::test]
async fn a_command_that_does_not_run_is_explained_as_a_shell_does() {
    let not_executable = || nspawn_init::StartError {
        step: Step::Execute,
        file: "/etc/passwd".to_owned(),
        errno: 13,
    };
    let text = "command \"nope\" not found\n";
    let (mock, mut others) = sessions(starting);
    let (driver, _end) = running(mock).await;
    let (_messages, responses) = open(&driver, [setup(&["nope"], false)]).await;
    let (_, mut other) = others.recv().await.unwrap();
    other.report(&SessionEvent::Failed(not_found()));
    other.kill();
    let received = received(responses.unwrap()).await;
    assert_eq!(received.text(), ("", text));
    assert_eq!(received.ends, ["stdout", "stderr", "exit 127 0"]);

    let driver = running(refusing(move || ExecError::NotRun(not_executable())))
        .await
        .0;
    let (_messages, responses) = open(&driver, [setup(&["/etc/passwd"], false)]).await;
    let received = super::received(responses.unwrap()).await;
    let (stdout, stderr) = received.text();
    assert_eq!(stdout, "");
    assert!(
        stderr.starts_with("command \"/etc/passwd\" can't be executed: Permission denied"),
        "{stderr}"
    );
    assert_eq!(received.ends, ["stdout", "stderr", "exit 126 0"]);

    let driver = running(refusing(|| ExecError::NotRun(not_found()))).await.0;
    let (_messages, responses) = open(&driver, [setup(&["nope"], true)]).await;
    let received = super::received(responses.unwrap()).await;
    assert_eq!(received.text(), ("command \"nope\" not found\r\n", ""));
    assert_eq!(received.ends, ["stdout", "exit 127 0"]);
    assert_eq!(received.error, None);
}

#[tokio::test]
async fn a_session_that_can_not_be_started_is_a_short_error_and_a_long_event() {
    let host = || ExecError::Host {
        step: "the cgroup of the session can't be created",
        source: std::io::Error::other(
            "a reason that is far too long for the frame that Nomad sends to its users",
        ),
    };
    let (driver, _end) = running(refusing(host)).await;
    let mut events = driver.events.subscribe();
    let (_messages, responses) = open(&driver, [setup(&["x"], false)]).await;
    let status = responses.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    let start = "the cgroup of the session can't be created: a reason that is far too long for";
    assert!(status.message().starts_with(start), "{status}");
    assert!(status.message().len() <= 85);
    let event = timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    assert_eq!(event.message, format!("exec failed: {}", chain_of(host())));
    assert_eq!(event.task.id, ID);
}

fn chain_of(error: ExecError) -> String {
    crate::backend::chain(&error)
}

#[tokio::test]
async fn what_the_client_can_see_by_itself_is_no_event() {
    let (driver, end) = running(starts()).await;
    let refused = async |task_id: &str, command: &[&str]| {
        let mut message = setup(command, false);
        message.setup.as_mut().unwrap().task_id = task_id.to_owned();
        let (_messages, responses) = open(&driver, [message]).await;
        let status = responses.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let unknown = refused("nobody", &["x"]).await;
    assert_eq!(
        unknown,
        (Code::NotFound, "task not found for given id".to_owned())
    );
    let empty = refused(ID, &[]).await;
    assert_eq!(
        empty,
        (Code::InvalidArgument, "the command is empty".to_owned())
    );
    end.send_replace(Some(exit(0, 0)));
    timeout(LIMIT, driver.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap();
    let ended = refused(ID, &["x"]).await;
    assert_eq!(
        ended,
        (
            Code::FailedPrecondition,
            "the task is not running".to_owned()
        )
    );
    let mut events = driver.events.subscribe();
    assert!(events.try_recv().is_err());
}

#[tokio::test]
async fn a_session_ends_with_the_plugin() {
    let mut exec = Exec::start([]).await;
    exec.other.rest = None;
    let other = std::mem::replace(&mut exec.other, piped().1);
    exec.driver.root().cancel();
    let (received, ()) = timeout(LIMIT, async {
        tokio::join!(exec.received(), other.ended())
    })
    .await
    .unwrap();
    assert_eq!(
        error(&received),
        (Code::FailedPrecondition, "the plugin is shutting down")
    );
}

struct Panics;

impl tokio_stream::Stream for Panics {
    type Item = Result<Message, Status>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        panic!("a bug")
    }
}

#[tokio::test]
async fn a_panic_ends_the_session_with_an_error() {
    let (mock, mut others) = sessions(piped);
    let (driver, _end) = running(mock).await;
    let messages = tokio_stream::iter([Ok(setup(&["x"], false))]).chain(Panics);
    let responses = driver.exec_stream(messages).await.unwrap();
    let (_, other) = others.recv().await.unwrap();
    let received = timeout(LIMIT, received(responses)).await.unwrap();
    assert_eq!(
        error(&received),
        (Code::Internal, "internal error, see the agent's log")
    );
    timeout(LIMIT, other.ended()).await.unwrap();
}
