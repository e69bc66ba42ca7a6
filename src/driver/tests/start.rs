//! Tests of StartTask.

use super::*;

/// An allocation on disk, with a task whose root is an empty tree.
struct Allocation {
    dir: tempfile::TempDir,
}

impl Allocation {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "root/usr",
            "alloc/alloc",
            "alloc/t/local",
            "alloc/t/secrets",
        ] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn task(&self, more: &[(&str, rmpv::Value)]) -> proto::TaskConfig {
        let path = |name| self.dir.path().join(name).to_str().unwrap().to_owned();
        let mut options = vec![
            ("image".into(), path("root").into()),
            ("boot".into(), false.into()),
            (
                "command".into(),
                rmpv::Value::Array(vec!["/bin/true".into()]),
            ),
        ];
        options.extend(
            more.iter()
                .map(|(name, value)| ((*name).into(), value.clone())),
        );
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &rmpv::Value::Map(options)).unwrap();
        proto::TaskConfig {
            id: ID.to_owned(),
            name: "t".to_owned(),
            alloc_id: "a".to_owned(),
            alloc_dir: path("alloc"),
            msgpack_driver_config: bytes,
            env: [("SECRET".to_owned(), "hush".to_owned())].into(),
            ..Default::default()
        }
    }
}

fn start_request(task: &proto::TaskConfig) -> Request<proto::StartTaskRequest> {
    Request::new(proto::StartTaskRequest {
        task: Some(task.clone()),
    })
}

#[tokio::test]
async fn a_start_returns_a_handle_that_recovers_the_task() {
    let (stage, _end) = TestBackend::new(starts());
    let first = driver(stage);
    let task = Allocation::new().task(&[]);
    // The allocation is gone from disk by the time of the start, which is a configuration error.
    let gone = first.start_task(start_request(&task)).await.unwrap_err();
    assert_eq!(gone.code(), Code::InvalidArgument);

    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    let response = first
        .start_task(start_request(&task))
        .await
        .unwrap()
        .into_inner();
    let handle = response.handle.unwrap();
    assert_eq!(
        (handle.version, handle.state()),
        (2, proto::TaskState::Running)
    );
    assert_eq!(handle.config.as_ref(), Some(&task), "unchanged");
    let state = String::from_utf8(handle.driver_state.clone()).unwrap();
    assert!(
        state.contains(r#""schema":1"#) && !state.contains("hush"),
        "{state}"
    );

    let mut events = first
        .task_events(Request::new(proto::TaskEventsRequest {}))
        .await
        .unwrap()
        .into_inner();
    let event = timeout(LIMIT, events.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(
        (event.alloc_id.as_str(), event.message.as_str()),
        ("a", "a note")
    );

    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .times(1)
        .returning(|started| Ok(started.clone().into()));
    let (stage, end) = TestBackend::new(mock);
    let second = driver(stage);
    // What Nomad stores across its own restart lacks the job's config block.
    let handle = proto::TaskHandle {
        config: Some(proto::TaskConfig {
            msgpack_driver_config: Vec::new(),
            ..task
        }),
        ..handle
    };
    let request = proto::RecoverTaskRequest {
        task_id: String::new(),
        handle: Some(handle),
    };
    second.recover_task(Request::new(request)).await.unwrap();
    end.send_replace(Some(exit(42, 0)));
    let waited = timeout(LIMIT, second.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap()
        .into_inner();
    assert_eq!(waited.result.unwrap().exit_code, 42);
}

#[tokio::test]
async fn a_second_start_of_an_id_does_not_affect_the_first() {
    let (stage, _end) = TestBackend::new(starts());
    let driver = driver(stage);
    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    driver.start_task(start_request(&task)).await.unwrap();
    let second = driver.start_task(start_request(&task)).await.unwrap_err();
    assert_eq!(second.code(), Code::AlreadyExists);
    assert!(driver.inspect_task(inspect_request()).await.is_ok());
}

#[tokio::test]
async fn an_invalid_option_starts_nothing_and_is_named() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    let allocation = Allocation::new();
    let task = allocation.task(&[("volatile", "maybe".into())]);
    let refused = driver.start_task(start_request(&task)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.details().is_empty());
    assert!(
        refused.message().starts_with("config.volatile: "),
        "{}",
        refused.message()
    );
}

#[tokio::test]
async fn a_transient_failure_is_recoverable() {
    let mut mock = MockContainerBackend::new();
    mock.expect_start().returning(|_| {
        Err(BackendError::Start {
            machine: "t-a".to_owned(),
            step: "start",
            reason: "machined is busy".to_owned(),
            cause: crate::container::Cause::Busy,
        })
    });
    let driver = driver(Arc::new(mock));
    let allocation = Allocation::new();
    let failed = driver
        .start_task(start_request(&allocation.task(&[])))
        .await
        .unwrap_err();
    assert_eq!(failed.code(), Code::FailedPrecondition);
    assert!(!failed.details().is_empty());
    assert!(matches!(
        driver.tasks.get(ID),
        Err(crate::task::TaskError::Unknown)
    ));
}

#[tokio::test]
async fn a_start_whose_caller_died_is_completed_and_undone() {
    let mut mock = starts();
    let (ends, heard) = std::sync::mpsc::channel::<watch::Sender<Option<Exit>>>();
    mock.expect_stop().times(1).returning(move |_, _, _| {
        heard.recv().unwrap().send_replace(Some(exit(137, 9)));
        Ok(())
    });
    let (tell, removed) = tokio::sync::oneshot::channel();
    let tell = std::sync::Mutex::new(Some(tell));
    mock.expect_remove()
        .with(eq(ID))
        .times(1)
        .returning(move |id| {
            let tell = tell.lock().unwrap().take().unwrap();
            tell.send(id.to_owned()).unwrap();
            Ok(())
        });
    let (stage, end) = TestBackend::new(mock);
    stage.gate.forget_permits(usize::MAX);
    let driver = driver(stage.clone());
    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    let caller = tokio::spawn({
        let driver = driver.clone();
        async move { driver.start_task(start_request(&task)).await.map(drop) }
    });
    while driver.tasks.get(ID).is_err() {
        tokio::task::yield_now().await;
    }
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    ends.send(end).unwrap();
    stage.gate.add_permits(1);
    assert_eq!(timeout(LIMIT, removed).await.unwrap().unwrap(), ID);
}

/// The call, which outlives its handler, and the actor; nothing is spawned for the backend's work.
#[tokio::test]
async fn a_start_is_two_tasks_of_the_runtime_and_a_running_one_is_one() {
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let (stage, _end) = TestBackend::new(starts());
    stage.gate.forget_permits(usize::MAX);
    let driver = driver(stage.clone());
    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    let before = alive();
    let call = driver.start_task(start_request(&task));
    tokio::pin!(call);
    while driver.tasks.get(ID).is_err() {
        assert!(poll_once(call.as_mut()).await.is_none());
    }
    assert!(poll_once(call.as_mut()).await.is_none());
    assert_eq!(alive() - before, 2);
    stage.gate.add_permits(1);
    timeout(LIMIT, call).await.unwrap().unwrap();
    // The call's own task ends after it has answered.
    driver.calls.close();
    timeout(LIMIT, driver.calls.wait()).await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(alive() - before, 1);
}

/// Nomad repeats a StartTask without a response once this process is gone; any error could fail the task.
#[tokio::test]
async fn a_start_that_a_shutdown_interrupts_gets_no_response() {
    let (stage, _end) = TestBackend::new(starts());
    stage.gate.forget_permits(usize::MAX);
    let driver = driver(stage);
    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    let call = driver.start_task(start_request(&task));
    tokio::pin!(call);
    while driver.tasks.get(ID).is_err() {
        assert!(poll_once(call.as_mut()).await.is_none());
    }
    driver.close(LIMIT).await;
    timeout(LIMIT, driver.calls.wait())
        .await
        .expect("the interrupted call ends");
    assert!(poll_once(call).await.is_none(), "no response");
}

/// The output of a future, if it is ready when polled once. Lets other tasks run first.
async fn poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    tokio::task::yield_now().await;
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
