//! When a task accepts further commands.

use std::future::ready;
use std::os::fd::OwnedFd;

use nspawn_init::session_spec::SessionEvent;
use tokio::net::unix::pipe;

use super::*;
use crate::exec::{Control, End, Ended, Streams};

/// A session with three pipes, and the other end of its channel.
fn session() -> (Session, OwnedFd) {
    let (ours, theirs) = packets::pair().unwrap();
    let streams = Streams::Pipes {
        stdin: pipe::pipe().unwrap().0,
        stdout: pipe::pipe().unwrap().1,
        stderr: pipe::pipe().unwrap().1,
    };
    let control = Control::new(ours, ready(())).unwrap();
    (Session { streams, control }, theirs)
}

fn request() -> ExecRequest {
    ExecRequest {
        command: vec!["true".to_owned()],
        ..ExecRequest::default()
    }
}

fn is_not_running(result: Result<Session, TaskError>) -> bool {
    matches!(result, Err(TaskError::NotRunning))
}

#[tokio::test]
async fn a_command_runs_only_while_its_task_does() {
    let mut mock = starts();
    mock.expect_exec().times(1).returning(|_, request| {
        assert_eq!(request, super::exec::request());
        let (session, channel) = session();
        for event in [
            SessionEvent::Running,
            SessionEvent::Ended { status: 3 << 8 },
        ] {
            packets::send(&channel, &packets::encode(&event), &[]).unwrap();
        }
        Ok(session)
    });
    mock.expect_stop().returning(|_, _, _| Ok(()));
    mock.expect_remove().returning(|_| Ok(()));
    let (stage, end) = TestBackend::new(mock);
    let permits = stage.gate.forget_permits(Semaphore::MAX_PERMITS);
    let tasks = tasks();
    let start = {
        let (tasks, stage) = (tasks.clone(), stage.clone());
        tokio::spawn(async move { tasks.start(stage, info(ID), spec(ID)).await })
    };
    let task = known(&tasks).await;
    let before = in_time(task.exec(request())).await;
    assert!(is_not_running(before), "while it starts");
    stage.gate.add_permits(permits);
    in_time(start).await.unwrap().unwrap();

    let mut session = in_time(task.exec(request())).await.unwrap();
    let exited = End::Exited(Ended { code: 3, signal: 0 });
    assert_eq!(in_time(session.control.ended()).await, exited);

    let stop = {
        let task = task.clone();
        tokio::spawn(async move { task.stop(None, LIMIT).await })
    };
    // The commands of one task are handled in their order.
    tokio::task::yield_now().await;
    assert!(
        is_not_running(in_time(task.exec(request())).await),
        "while it is being stopped"
    );
    end.send_replace(Some(exit(0, 0)));
    in_time(stop).await.unwrap().unwrap();
    assert!(
        is_not_running(in_time(task.exec(request())).await),
        "after its end"
    );
    in_time(task.destroy(false)).await.unwrap();
    let gone = in_time(task.exec(request())).await;
    assert!(matches!(gone, Err(TaskError::Unknown)), "{gone:?}");
}

#[tokio::test]
async fn an_empty_command_is_refused_before_anything_is_started() {
    let (stage, _end) = TestBackend::new(starts());
    let (_tasks, task) = running(&stage).await;
    let refused = in_time(task.exec(ExecRequest::default())).await;
    assert_eq!(refused.unwrap_err().to_string(), "the command is empty");
}

#[tokio::test(start_paused = true)]
async fn the_start_of_a_session_has_a_time_limit() {
    let (stage, _end) = TestBackend::new(starts());
    let (_tasks, task) = running(&stage).await;
    stage.gate.forget_permits(Semaphore::MAX_PERMITS);
    let late = task.exec(request()).await;
    assert!(matches!(late, Err(TaskError::ExecTimeout(_))), "{late:?}");
}

#[tokio::test]
async fn a_panic_in_the_start_of_a_session_is_an_error_of_this_call_alone() {
    let mut mock = starts();
    mock.expect_exec().returning(|_, _| panic!("a bug"));
    let (stage, end) = TestBackend::new(mock);
    let (_tasks, task) = running(&stage).await;
    let failed = in_time(task.exec(request())).await;
    assert!(matches!(failed, Err(TaskError::Panicked)), "{failed:?}");
    end.send_replace(Some(exit(0, 0)));
    in_time(task.wait()).await.unwrap().unwrap();
}
