//! The network of another task.

use super::*;
use crate::container::NetworkNamespace;

const OTHER: &str = "a/other/1";

fn other() -> TaskInfo {
    TaskInfo {
        name: "other".to_owned(),
        ..info(OTHER)
    }
}

/// A start in the network of the task `other`.
fn joining() -> ContainerSpec {
    spec(ID).with(|spec| {
        spec.network.namespace = NetworkNamespace::OfTask {
            task: "other".to_owned(),
            leader: None,
        };
    })
}

/// A backend that accepts a start in the network of this process only.
fn expects(leader: Process) -> MockContainerBackend {
    let mut mock = MockContainerBackend::new();
    mock.expect_start().returning(move |spec| {
        if let NetworkNamespace::OfTask { leader: found, .. } = spec.network.namespace {
            assert_eq!(found, Some(leader));
        }
        Ok(started(&spec.identity.id).into())
    });
    mock
}

/// The tasks of a group start at the same time.
#[tokio::test]
async fn a_task_that_is_being_started_is_waited_for() {
    let (mut stage, _end) = TestBackend::new(expects(started(OTHER).leader));
    Arc::get_mut(&mut stage).unwrap().gate = Semaphore::new(0);
    let events = EventBus::default();
    let mut messages = events.subscribe();
    let tasks = Tasks::new(events, CancellationToken::new());
    let start = |info, spec| {
        let (tasks, stage) = (tasks.clone(), Arc::clone(&stage));
        tokio::spawn(async move { tasks.start(stage, info, spec).await })
    };
    let second = start(info(ID), joining());
    let event = in_time(messages.recv()).await.unwrap();
    assert_eq!(
        event.message,
        "waiting for the task \"other\", whose network this task joins"
    );
    let first = start(other(), spec(OTHER));
    stage.gate.add_permits(2);
    in_time(first).await.unwrap().unwrap();
    in_time(second).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_task_that_does_not_run_is_named() {
    let (stage, end) = TestBackend::new(starts());
    let (tasks, _) = running(&stage).await;
    let refused = |tasks: Tasks, stage| async move {
        let start = tasks.start(stage, info("a/t/2"), joining()).await;
        start.unwrap_err().to_string()
    };
    let wanted = "the task \"other\" of this allocation does not run in a container of this driver, and was not started within 10 s";
    let text = refused(tasks.clone(), stage.clone()).await;
    assert!(text.contains(wanted), "{text}");
    // That of another allocation is not meant, nor one that has ended.
    let elsewhere = TaskInfo {
        alloc_id: "b".to_owned(),
        ..other()
    };
    tasks
        .start(stage.clone(), elsewhere, spec(OTHER))
        .await
        .unwrap();
    let ended = TaskInfo {
        id: "a/other/2".to_owned(),
        ..other()
    };
    tasks
        .start(stage.clone(), ended, spec("a/other/2"))
        .await
        .unwrap();
    end.send_replace(Some(exit(0, 0)));
    tasks
        .get("a/other/2")
        .unwrap()
        .wait()
        .await
        .unwrap()
        .unwrap();
    let text = refused(tasks, stage).await;
    assert!(text.contains(wanted), "{text}");
}
