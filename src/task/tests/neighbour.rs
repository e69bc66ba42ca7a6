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

/// Tries to join, and returns why it fails.
async fn refused(tasks: &Tasks, stage: &Arc<TestBackend>) -> String {
    let start = tasks.start(stage.clone(), info("a/t/2"), joining());
    start.await.unwrap_err().to_string()
}

#[tokio::test(start_paused = true)]
async fn a_task_that_does_not_run_is_named() {
    let wanted = "the task \"other\" of this allocation does not run in a container of this driver, and was not started within 60 s";
    let (stage, _end) = TestBackend::new(starts());
    let (tasks, _) = running(&stage).await;
    let text = refused(&tasks, &stage).await;
    assert!(text.contains(wanted), "{text}");
    let of_another_allocation = TaskInfo {
        alloc_id: "b".to_owned(),
        ..other()
    };
    let start = tasks.start(stage.clone(), of_another_allocation, spec(OTHER));
    start.await.unwrap();
    let text = refused(&tasks, &stage).await;
    assert!(text.contains(wanted), "{text}");
}

/// A restarted group: the other task is stopped at the same time, and takes longer.
#[tokio::test(start_paused = true)]
async fn a_task_that_ends_is_not_joined() {
    let mut mock = starts();
    mock.expect_stop().returning(|_, _, _| Ok(()));
    let (stage, end) = TestBackend::new(mock);
    let tasks = tasks();
    let start = tasks.start(stage.clone(), other(), spec(OTHER));
    start.await.unwrap();
    let ending = tasks.get(OTHER).unwrap();
    let stopping = ending.clone();
    let stop = tokio::spawn(async move { stopping.stop(None, LIMIT).await });
    let mut status = ending.status.clone();
    in_time(status.wait_for(|status| status.stopping))
        .await
        .unwrap();
    let text = refused(&tasks, &stage).await;
    assert!(text.contains("does not run"), "{text}");
    end.send_replace(Some(exit(0, 0)));
    stop.await.unwrap().unwrap();
    let text = refused(&tasks, &stage).await;
    assert!(text.contains("does not run"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_waited_for_when_the_plugin_shuts_down() {
    let (stage, _end) = TestBackend::new(starts());
    let token = CancellationToken::new();
    let tasks = Tasks::new(EventBus::default(), token.clone());
    token.cancel();
    let text = refused(&tasks, &stage).await;
    assert_eq!(text, "the plugin is shutting down");
}
