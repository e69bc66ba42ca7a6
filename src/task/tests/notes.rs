//! What becomes an event of a task while it starts and runs.

use super::*;

#[tokio::test]
async fn a_restored_network_is_an_event_of_the_task() {
    let mut mock = MockContainerBackend::new();
    mock.expect_start().returning(|spec| {
        let network = StartedNetwork {
            address: [10, 213, 0, 1].into(),
            ports: BTreeMap::new(),
        };
        let started = Started {
            network: Some(Box::new(network)),
            ..started(&spec.identity.id)
        };
        Ok(started.into())
    });
    let (stage, _end) = TestBackend::new(mock);
    *stage.restored.lock().unwrap() = Some("restored".to_owned());
    let events = EventBus::default();
    let mut published = events.subscribe();
    let tasks = Tasks::new(events, CancellationToken::new());
    tasks.start(stage, info(ID), spec(ID)).await.unwrap();
    let event = in_time(published.recv()).await.unwrap();
    assert_eq!((event.task.id.as_str(), &*event.message), (ID, "restored"));
}

/// Also while it starts, and not once it is gone.
#[tokio::test]
async fn what_the_backend_says_about_a_container_is_an_event_of_the_task() {
    let (stage, _end) = TestBackend::new(MockContainerBackend::new());
    let stage = Arc::new(TestBackend {
        gate: Semaphore::new(0),
        ..Arc::into_inner(stage).unwrap()
    });
    let events = EventBus::default();
    let mut published = events.subscribe();
    let tasks = Tasks::new(events, CancellationToken::new());
    let start = tasks.start(Arc::clone(&stage) as _, info(ID), spec(ID));
    let notes = tasks.notes();
    let note = async {
        while tasks.get(ID).is_err() {
            tokio::task::yield_now().await;
        }
        notes.about("another").add("of no task".to_owned());
        notes.about(ID).add("it takes long".to_owned());
        in_time(published.recv()).await.unwrap()
    };
    let event = tokio::select! {
        event = note => event,
        _ = start => unreachable!("nothing lets it start"),
    };
    assert_eq!(
        (event.task.id.as_str(), &*event.message),
        (ID, "it takes long")
    );
}
