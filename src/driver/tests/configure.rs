//! Tests of SetConfig and Fingerprint, and of what follows from them.

use super::*;

#[tokio::test]
async fn an_unchanged_configuration_keeps_its_backend() {
    let made = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&made);
    let search_path = ImageSearchPath {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let factory = move |_: &PluginConfig, _| -> Arc<dyn ContainerBackend> {
        counter.fetch_add(1, Ordering::Relaxed);
        Arc::new(MockContainerBackend::new())
    };
    let driver = Driver::new(factory, search_path);
    assert_eq!(made.load(Ordering::Relaxed), 0);
    driver.configure(plugin_config(), None);
    driver.configure(plugin_config(), None);
    assert_eq!(made.load(Ordering::Relaxed), 1);
    let off = PluginConfig {
        enabled: false,
        ..plugin_config()
    };
    driver.configure(off.clone(), None);
    assert_eq!(made.load(Ordering::Relaxed), 2);
    assert_eq!(
        driver.config().unwrap().plugin_config,
        off,
        "the last one wins"
    );
}

#[tokio::test(start_paused = true)]
async fn a_fingerprint_is_sent_at_once_on_change_and_periodically() {
    let mut mock = MockContainerBackend::new();
    mock.expect_probe().returning(probe);
    let driver = driver(Arc::new(mock));
    let mut prints = driver
        .fingerprint(Request::new(proto::FingerprintRequest {}))
        .await
        .unwrap()
        .into_inner();
    let begin = tokio::time::Instant::now();
    let first = prints.next().await.unwrap().unwrap();
    assert_eq!(
        (first.health(), first.health_description.as_str()),
        (HealthState::Healthy, "Healthy")
    );
    assert_eq!(begin.elapsed(), Duration::ZERO, "of the paused clock");

    let again = prints.next().await.unwrap().unwrap();
    assert_eq!(again, first);
    assert_eq!(
        begin.elapsed(),
        Duration::from_secs(30),
        "of the paused clock"
    );

    let off = PluginConfig {
        enabled: false,
        ..plugin_config()
    };
    driver.configure(off, None);
    let changed = prints.next().await.unwrap().unwrap();
    assert_eq!(
        begin.elapsed(),
        Duration::from_secs(30),
        "of the paused clock"
    );
    assert_eq!(changed.health(), HealthState::Undetected);
    assert_eq!(
        changed.attributes.len(),
        first.attributes.len(),
        "emptied, not forgotten"
    );
}

#[tokio::test]
async fn a_failed_probe_is_reported_and_does_not_end_the_stream() {
    let mut mock = MockContainerBackend::new();
    mock.expect_probe().returning(|| panic!("on purpose"));
    let driver = driver(Arc::new(mock));
    let mut prints = driver
        .fingerprint(Request::new(proto::FingerprintRequest {}))
        .await
        .unwrap()
        .into_inner();
    let print = timeout(LIMIT, prints.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(print.health(), HealthState::Undetected);
}

#[tokio::test]
async fn after_shutdown_nothing_starts_until_the_next_set_config() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    driver
        .shutdown(Request::new(proto::ShutdownRequest {}))
        .await
        .unwrap();
    let task = proto::TaskConfig {
        id: ID.to_owned(),
        ..Default::default()
    };
    let refused = driver
        .start_task(Request::new(proto::StartTaskRequest { task: Some(task) }))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(!refused.details().is_empty(), "may be retried");
    driver
        .init(Request::new(proto::InitRequest {}))
        .await
        .unwrap();
    assert!(driver.refuse_when_closing().is_ok());
}

#[tokio::test]
async fn a_second_configuration_may_lack_nomads_part() {
    use crate::proto::base;
    use crate::proto::base::base_plugin_server::BasePlugin as _;
    let driver = driver(Arc::new(MockContainerBackend::new()));
    let set = |msgpack_config: Vec<u8>, nomad_config| {
        driver.set_config(Request::new(base::SetConfigRequest {
            msgpack_config,
            nomad_config,
            plugin_api_version: "v0.1.0".to_owned(),
        }))
    };
    let off = b"\x81\xa7enabled\xc2".to_vec();
    for _ in 0..2 {
        set(off.clone(), None).await.unwrap();
    }
    assert!(!driver.config().unwrap().plugin_config.enabled);
    let refused = set(b"\x81\xa7enabled\xa5maybe".to_vec(), None)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("enabled"),
        "{}",
        refused.message()
    );
    assert!(
        !driver.config().unwrap().plugin_config.enabled,
        "a refused one changes nothing"
    );

    let nomad = base::NomadConfig {
        driver: Some(base::NomadDriverConfig {
            topology: Some(base::ClientTopology {
                cores: vec![base::ClientTopologyCore {
                    base_speed: 2000,
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
    };
    set(off.clone(), Some(nomad)).await.unwrap();
    set(off, None).await.unwrap();
    assert!(driver.config().unwrap().compute.is_some(), "kept");
}

#[tokio::test]
async fn before_any_configuration_the_defaults_apply() {
    let search_path = ImageSearchPath {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let factory = |_: &PluginConfig, _| -> Arc<dyn ContainerBackend> {
        Arc::new(MockContainerBackend::new())
    };
    let driver = Driver::new(factory, search_path);
    assert!(driver.config().unwrap().plugin_config.enabled);
}

/// How long after the start of the test, on the paused clock, this backend was asked to reconcile; `None` if never within an hour.
async fn reconciled(after: Option<Duration>, life: impl AsyncFnOnce(&Driver)) -> Option<Duration> {
    let (asked, mut received) = tokio::sync::mpsc::unbounded_channel();
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .returning(|started| Ok(started.clone().into()));
    mock.expect_wait().returning(|_| Ok(exit(0, 0)));
    mock.expect_reconcile()
        .returning(move |_| asked.send(tokio::time::Instant::now()).unwrap());
    let backend: Arc<dyn ContainerBackend> = Arc::new(mock);
    let chosen = after;
    let factory =
        move |plugin_config: &PluginConfig, _| match plugin_config.reconcile_after == chosen {
            true => Arc::clone(&backend),
            false => Arc::new(MockContainerBackend::new()),
        };
    let search_path = ImageSearchPath {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(factory, search_path);
    let begin = tokio::time::Instant::now();
    driver.configure(
        PluginConfig {
            reconcile_after: after,
            ..plugin_config()
        },
        None,
    );
    life(&driver).await;
    let hour = Duration::from_secs(3600);
    let first = timeout(hour, received.recv()).await.ok().flatten();
    let again = timeout(hour, received.recv()).await;
    assert!(!matches!(again, Ok(Some(_))), "once in a life");
    first.map(|at| at - begin)
}

#[tokio::test(start_paused = true)]
async fn unclaimed_tasks_are_removed_after_reconcile_after() {
    let minute = Duration::from_secs(60);
    assert_eq!(reconciled(Some(minute), async |_| {}).await, Some(minute));
    assert_eq!(reconciled(None, async |_| {}).await, None);
    // Every recovered task shows that the agent has not finished recovering.
    let late = reconciled(Some(minute), async |driver| {
        for _ in 0..3 {
            tokio::time::sleep(minute / 2).await;
            driver
                .recover_task(kept(handle::VERSION, ID))
                .await
                .unwrap();
        }
    });
    assert_eq!(late.await, Some(minute * 5 / 2));
    // A backend that has been replaced is not asked, and neither is one of a process that shuts down.
    let replaced = reconciled(Some(minute), async |driver| {
        driver.configure(plugin_config(), None)
    });
    assert_eq!(replaced.await, None);
    let ended = reconciled(Some(minute), async |driver| driver.root().cancel());
    assert_eq!(ended.await, None);
}
