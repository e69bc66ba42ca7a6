//! The verbs against a mock of the backend, as Nomad would call them.

use std::time::Duration;

use mockall::predicate::{always, eq};
use prost::Message as _;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

use super::*;
use crate::backend::{BackendError, MockContainerBackend};
use crate::container::{CgroupLayout, Exit, Probe, Usage};
use crate::proto::driver as proto;
use crate::proto::driver::driver_server::Driver as DriverService;
use crate::proto::driver::fingerprint_response::HealthState;
use crate::proto::hclspec;
use crate::signal::Signal;
use crate::task::handle;
use crate::task::tests::{Stage, exit, identity, spec, started, starts};

const ID: &str = "a/t/1";
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn policy() -> PluginConfig {
    PluginConfig {
        enabled: true,
        volumes: true,
        state_dir: "/run/nomad-driver-nspawn".into(),
        nspawn_path: None,
        reconcile_after: None,
    }
}

pub(crate) fn probe() -> Probe {
    Probe {
        nspawn: Ok(252),
        root: true,
        cgroup: CgroupLayout::V2,
        user_namespaces: true,
        machined: false,
        idmapped_mounts: true,
        state_dir: Ok(()),
    }
}

/// A configured driver with this backend.
pub(crate) fn driver(backend: Arc<dyn ContainerBackend>) -> Driver {
    let places = Places {
        plugin_dir: "/opt/nomad/plugins".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(move |_| Arc::clone(&backend), places);
    driver.configure(policy(), None);
    driver
}

/// A driver with one running task, and the hand that ends it.
async fn running(mock: MockContainerBackend) -> (Driver, watch::Sender<Option<Exit>>) {
    let (stage, end) = Stage::new(mock);
    let driver = driver(stage.clone());
    driver
        .tasks
        .start(stage, identity(ID), spec(ID))
        .await
        .unwrap();
    (driver, end)
}

fn kept(version: i32, id: &str) -> Request<proto::RecoverTaskRequest> {
    Request::new(proto::RecoverTaskRequest {
        task_id: String::new(),
        handle: Some(proto::TaskHandle {
            version,
            config: Some(proto::TaskConfig {
                id: id.to_owned(),
                name: "t".to_owned(),
                alloc_id: "a".to_owned(),
                ..Default::default()
            }),
            state: proto::TaskState::Running.into(),
            driver_state: handle::encode(&started(ID)).unwrap(),
        }),
    })
}

fn wait_request() -> Request<proto::WaitTaskRequest> {
    Request::new(proto::WaitTaskRequest {
        task_id: ID.to_owned(),
    })
}

fn stop_request(id: &str, signal: &str, seconds: i64) -> Request<proto::StopTaskRequest> {
    Request::new(proto::StopTaskRequest {
        task_id: id.to_owned(),
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
        signal: signal.to_owned(),
    })
}

fn destroy_request(force: bool) -> Request<proto::DestroyTaskRequest> {
    Request::new(proto::DestroyTaskRequest {
        task_id: ID.to_owned(),
        force,
    })
}

fn inspect_request() -> Request<proto::InspectTaskRequest> {
    Request::new(proto::InspectTaskRequest {
        task_id: ID.to_owned(),
    })
}

#[tokio::test]
async fn capabilities_have_the_golden_bytes_but_for_exec() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    let response = driver
        .capabilities(Request::new(proto::CapabilitiesRequest {}))
        .await
        .unwrap()
        .into_inner();
    let given = response.capabilities.unwrap();
    assert!(!given.exec, "not built");
    let with_exec = proto::CapabilitiesResponse {
        capabilities: Some(proto::DriverCapabilities {
            exec: true,
            ..given
        }),
    };
    assert_eq!(hex(&with_exec.encode_to_vec()), "0a0a08011001180222020001");
}

#[test]
fn the_transcribed_messages_have_the_golden_bytes() {
    use hclspec::spec::Block;
    let spec = |block| hclspec::Spec { block: Some(block) };
    let enabled = spec(Block::Attr(hclspec::Attr {
        name: "enabled".to_owned(),
        r#type: "bool".to_owned(),
        required: false,
    }));
    let literal = spec(Block::Literal(hclspec::Literal {
        value: "true".to_owned(),
    }));
    let default = spec(Block::Default(Box::new(hclspec::Default {
        primary: Some(Box::new(enabled)),
        default: Some(Box::new(literal)),
    })));
    let object = spec(Block::Object(hclspec::Object {
        attributes: [("enabled".to_owned(), default)].into(),
    }));
    let golden = "0a2c0a2a0a07656e61626c6564121f4a1d0a111a0f0a07656e61626c65641204626f6f6c120852060a0474727565";
    assert_eq!(hex(&object.encode_to_vec()), golden);

    let exited = proto::ExecTaskStreamingResponse {
        exited: true,
        result: Some(proto::ExitResult {
            exit_code: 43,
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(hex(&exited.encode_to_vec()), "18012202082b");
    let closed = proto::ExecTaskStreamingResponse {
        stdout: Some(proto::ExecTaskStreamingIoOperation {
            close: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(hex(&closed.encode_to_vec()), "0a021001");
}

#[tokio::test]
async fn an_unchanged_configuration_keeps_its_backend() {
    let made = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&made);
    let places = Places {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let factory = move |_: &PluginConfig| -> Arc<dyn ContainerBackend> {
        counter.fetch_add(1, Ordering::Relaxed);
        Arc::new(MockContainerBackend::new())
    };
    let driver = Driver::new(factory, places);
    assert_eq!(made.load(Ordering::Relaxed), 0);
    driver.configure(policy(), None);
    driver.configure(policy(), None);
    assert_eq!(made.load(Ordering::Relaxed), 1);
    let off = PluginConfig {
        enabled: false,
        ..policy()
    };
    driver.configure(off.clone(), None);
    assert_eq!(made.load(Ordering::Relaxed), 2);
    assert_eq!(driver.settings().unwrap().policy, off, "the last one wins");
}

#[tokio::test]
async fn a_kept_handle_alone_finds_the_task_again() {
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .times(1)
        .returning(|started| Ok(started.clone()));
    let (stage, end) = Stage::new(mock);
    let driver = driver(stage);
    driver.recover_task(kept(2, ID)).await.unwrap();
    driver.recover_task(kept(2, ID)).await.unwrap();
    end.send_replace(Some(exit(7, 0)));
    let waited = timeout(LIMIT, driver.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap()
        .into_inner();
    assert_eq!(waited.result.unwrap().exit_code, 7);
    assert_eq!(waited.err, "");
}

#[tokio::test]
async fn a_handle_that_is_not_ours_is_refused_and_can_be_destroyed() {
    let mut mock = MockContainerBackend::new();
    mock.expect_remove()
        .with(eq(ID))
        .times(1)
        .returning(|_| Ok(()));
    let driver = driver(Arc::new(mock));
    let go = driver.recover_task(kept(1, ID)).await.unwrap_err();
    assert_eq!(go.code(), Code::FailedPrecondition);
    assert!(go.message().contains("Go driver"), "{}", go.message());
    let other = driver.recover_task(kept(2, "other")).await.unwrap_err();
    assert!(
        other.message().contains("belongs to"),
        "{}",
        other.message()
    );
    let none = driver
        .recover_task(Request::new(proto::RecoverTaskRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
    driver.destroy_task(destroy_request(true)).await.unwrap();
}

#[tokio::test]
async fn a_recovery_that_fails_leaves_nothing_known() {
    let mut mock = MockContainerBackend::new();
    mock.expect_attach().returning(|_| {
        Err(BackendError::Lost {
            machine: "t-a".to_owned(),
            reason: "the host was booted since".to_owned(),
        })
    });
    let driver = driver(Arc::new(mock));
    let lost = driver.recover_task(kept(2, ID)).await.unwrap_err();
    assert_eq!(
        lost.message(),
        "machine t-a is lost: the host was booted since"
    );
    assert_eq!(
        driver.wait_task(wait_request()).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn inspection_is_complete_at_every_moment() {
    let (driver, end) = running(starts()).await;
    let look = async || {
        driver
            .inspect_task(inspect_request())
            .await
            .unwrap()
            .into_inner()
            .task
            .unwrap()
    };
    let up = look().await;
    assert_eq!(
        (up.id.as_str(), up.name.as_str(), up.state()),
        (ID, "t", proto::TaskState::Running)
    );
    assert_eq!(up.started_at.unwrap().seconds, 1_700_000_000);
    assert_eq!(up.completed_at, Some(wire::NOT_YET));
    assert!(up.result.is_some());
    end.send_replace(Some(exit(137, 9)));
    timeout(LIMIT, driver.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap();
    let over = look().await;
    assert_eq!(over.state(), proto::TaskState::Exited);
    assert_eq!(over.completed_at.unwrap().seconds, 1_700_000_001);
    assert_eq!(over.result.unwrap().signal, 9);
}

#[tokio::test]
async fn a_lost_watch_is_an_answer_with_an_error_text() {
    let (driver, end) = running(starts()).await;
    end.send_replace(Some(Exit {
        error: Some("the watch was lost".to_owned()),
        ..exit(1, 0)
    }));
    let waited = timeout(LIMIT, driver.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap()
        .into_inner();
    assert!(waited.result.is_some());
    assert_eq!(waited.err, "the watch was lost");
}

#[tokio::test]
async fn unknown_ids_are_answered_as_nomad_needs_it() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    driver
        .stop_task(stop_request("nobody", "SIGNOPE", 5))
        .await
        .unwrap();
    for status in [
        driver.wait_task(wait_request()).await.unwrap_err(),
        driver.inspect_task(inspect_request()).await.unwrap_err(),
        driver
            .signal_task(Request::new(proto::SignalTaskRequest {
                task_id: ID.to_owned(),
                signal: "SIGHUP".to_owned(),
            }))
            .await
            .unwrap_err(),
    ] {
        assert_eq!(
            (status.code(), status.message()),
            (Code::NotFound, "task not found for given id")
        );
    }
    let mut stats = driver
        .task_stats(Request::new(proto::TaskStatsRequest::default()))
        .await
        .unwrap()
        .into_inner();
    assert!(
        timeout(LIMIT, stats.next()).await.unwrap().is_none(),
        "ends without an error"
    );
}

#[tokio::test]
async fn a_stop_hands_over_signal_and_patience() {
    let mut mock = starts();
    mock.expect_stop()
        .with(always(), eq(Some(Signal::TERM)), eq(Duration::from_secs(9)))
        .times(1)
        .returning(|_, _, _| Ok(()));
    let (driver, end) = running(mock).await;
    let unknown = driver
        .stop_task(stop_request(ID, "SIGNOPE", 9))
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    let stop = driver.stop_task(stop_request(ID, "sigterm", 9));
    let (stopped, _) = tokio::join!(stop, async { end.send_replace(Some(exit(143, 15))) });
    stopped.unwrap();
    driver
        .inspect_task(inspect_request())
        .await
        .expect("still known");
}

#[tokio::test]
async fn signals_reach_the_payload_by_name() {
    let mut mock = starts();
    mock.expect_signal()
        .with(always(), eq(Signal::INT))
        .times(1)
        .returning(|_, _| Ok(()));
    let (driver, _end) = running(mock).await;
    let signal = |name: &str| {
        driver.signal_task(Request::new(proto::SignalTaskRequest {
            task_id: ID.to_owned(),
            signal: name.to_owned(),
        }))
    };
    signal("SIGINT").await.unwrap();
    assert_eq!(
        signal("SIGNOPE").await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn only_force_destroys_a_running_task() {
    let mut mock = starts();
    mock.expect_remove().times(1).returning(|_| Ok(()));
    let (driver, end) = running(mock).await;
    let refused = driver
        .destroy_task(destroy_request(false))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    end.send_replace(Some(exit(0, 0)));
    timeout(LIMIT, driver.wait_task(wait_request()))
        .await
        .unwrap()
        .unwrap();
    driver.destroy_task(destroy_request(false)).await.unwrap();
    assert_eq!(
        driver
            .inspect_task(inspect_request())
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn statistics_come_at_once_and_end_with_the_task() {
    let mut mock = starts();
    mock.expect_usage().returning(|_| {
        Ok(Usage {
            memory_rss: Some(4096),
            ..Usage::default()
        })
    });
    let (driver, end) = running(mock).await;
    let request = proto::TaskStatsRequest {
        task_id: ID.to_owned(),
        collection_interval: Some(prost_types::Duration {
            seconds: 3600,
            nanos: 0,
        }),
    };
    let mut stats = driver
        .task_stats(Request::new(request))
        .await
        .unwrap()
        .into_inner();
    let first = timeout(LIMIT, stats.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .stats
        .unwrap();
    let usage = first.agg_resource_usage.unwrap();
    assert!(first.timestamp.is_some() && usage.cpu.is_some());
    assert_eq!(usage.memory.unwrap().rss, 4096);
    end.send_replace(Some(exit(0, 0)));
    assert!(timeout(LIMIT, stats.next()).await.unwrap().is_none());
}

#[tokio::test]
async fn events_carry_what_nomad_routes_them_by() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    driver.events.tell(&identity(ID), "early");
    let mut events = driver
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
        (
            event.task_id.as_str(),
            event.alloc_id.as_str(),
            event.task_name.as_str()
        ),
        (ID, "a", "t")
    );
    assert_eq!(event.message, "early");
    assert!(event.timestamp.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_fingerprint_comes_at_once_on_change_and_now_and_then() {
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
        ..policy()
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
async fn a_host_that_can_not_be_examined_is_told_not_dropped() {
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
async fn after_the_goodbye_nothing_starts_until_a_new_welcome() {
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
async fn what_is_not_built_says_so() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    let exec = driver
        .exec_task(Request::new(proto::ExecTaskRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(exec.code(), Code::Unimplemented);
    assert_eq!(
        exec.message(),
        "running a command in a task (exec) is not supported by this driver"
    );
    let made = driver
        .create_network(Request::new(proto::CreateNetworkRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(made.code(), Code::Unimplemented);
    let gone = driver
        .destroy_network(Request::new(proto::DestroyNetworkRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::Unimplemented);
}

/// An allocation on disk and a task in it whose root is an empty tree.
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
async fn a_start_gives_a_handle_that_finds_the_task_again() {
    let (stage, _end) = Stage::new(starts());
    let first = driver(stage);
    let task = Allocation::new().task(&[]);
    // The allocation is gone from disk by the time of the start; that is an error of the configuration.
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
        .returning(|started| Ok(started.clone()));
    let (stage, end) = Stage::new(mock);
    let second = driver(stage);
    // What Nomad keeps over its own restart lacks the job's config block.
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
async fn the_same_id_twice_leaves_the_first_alone() {
    let (stage, _end) = Stage::new(starts());
    let driver = driver(stage);
    let allocation = Allocation::new();
    let task = allocation.task(&[]);
    driver.start_task(start_request(&task)).await.unwrap();
    let second = driver.start_task(start_request(&task)).await.unwrap_err();
    assert_eq!(second.code(), Code::AlreadyExists);
    assert!(driver.inspect_task(inspect_request()).await.is_ok());
}

#[tokio::test]
async fn a_wrong_option_starts_nothing_and_is_named() {
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
async fn a_transient_failure_of_the_host_may_be_retried() {
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
async fn a_start_whose_caller_died_is_finished_and_taken_back() {
    let mut mock = starts();
    mock.expect_stop().times(1).returning(|_, _, _| Ok(()));
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
    let (stage, end) = Stage::new(mock);
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
    stage.gate.add_permits(1);
    end.send_replace(Some(exit(137, 9)));
    assert_eq!(timeout(LIMIT, removed).await.unwrap().unwrap(), ID);
}

#[tokio::test]
async fn a_configuration_may_come_twice_without_nomads_part() {
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
    assert!(!driver.settings().unwrap().policy.enabled);
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
        !driver.settings().unwrap().policy.enabled,
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
    assert!(driver.settings().unwrap().compute.is_some(), "kept");
}

#[tokio::test]
async fn before_any_configuration_the_defaults_hold() {
    let places = Places {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let factory =
        |_: &PluginConfig| -> Arc<dyn ContainerBackend> { Arc::new(MockContainerBackend::new()) };
    let driver = Driver::new(factory, places);
    assert!(driver.settings().unwrap().policy.enabled);
}

/// How long after the beginning, on the paused clock, this backend was asked to reconcile; `None` if never within an hour.
async fn reconciled(after: Option<Duration>, life: impl AsyncFnOnce(&Driver)) -> Option<Duration> {
    let (asked, mut told) = tokio::sync::mpsc::unbounded_channel();
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .returning(|started| Ok(started.clone()));
    mock.expect_wait().returning(|_| Ok(exit(0, 0)));
    mock.expect_reconcile()
        .returning(move |_| asked.send(tokio::time::Instant::now()).unwrap());
    let backend: Arc<dyn ContainerBackend> = Arc::new(mock);
    let chosen = after;
    let factory = move |policy: &PluginConfig| match policy.reconcile_after == chosen {
        true => Arc::clone(&backend),
        false => Arc::new(MockContainerBackend::new()),
    };
    let places = Places {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(factory, places);
    let begin = tokio::time::Instant::now();
    driver.configure(
        PluginConfig {
            reconcile_after: after,
            ..policy()
        },
        None,
    );
    life(&driver).await;
    let hour = Duration::from_secs(3600);
    let first = timeout(hour, told.recv()).await.ok().flatten();
    let again = timeout(hour, told.recv()).await;
    assert!(!matches!(again, Ok(Some(_))), "once in a life");
    first.map(|at| at - begin)
}

#[tokio::test(start_paused = true)]
async fn the_first_task_after_it_shows_whose_allocations_are_whose_and_it_is_done_again() {
    let (asked, mut told) = tokio::sync::mpsc::unbounded_channel();
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .returning(|started| Ok(started.clone()));
    mock.expect_wait().returning(|_| Ok(exit(0, 0)));
    mock.expect_reconcile()
        .returning(move |roots| asked.send(roots.clone()).unwrap());
    let backend: Arc<dyn ContainerBackend> = Arc::new(mock);
    let places = Places {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(move |_: &PluginConfig| Arc::clone(&backend), places);
    let after = Some(Duration::from_secs(60));
    driver.configure(
        PluginConfig {
            reconcile_after: after,
            ..policy()
        },
        None,
    );
    assert!(told.recv().await.unwrap().is_empty());
    let handle = |alloc_dir: &str| {
        let mut request = kept(handle::VERSION, ID);
        let handle = request.get_mut().handle.as_mut().unwrap();
        handle.config.as_mut().unwrap().alloc_dir = alloc_dir.to_owned();
        request
    };
    driver.recover_task(handle("/data/alloc/a")).await.unwrap();
    let root = std::path::PathBuf::from("/data/alloc");
    let want = std::collections::BTreeSet::from([root]);
    assert_eq!(told.recv().await.unwrap(), want);
    // Another allocation in the same directory is no news.
    driver.recover_task(handle("/data/alloc/b")).await.unwrap();
    let hour = Duration::from_secs(3600);
    assert!(timeout(hour, told.recv()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_nobody_asked_for_is_cleared_once_the_agent_had_time_to_ask() {
    let minute = Duration::from_secs(60);
    assert_eq!(reconciled(Some(minute), async |_| {}).await, Some(minute));
    assert_eq!(reconciled(None, async |_| {}).await, None);
    // Every task that is taken up shows that the agent is still at it.
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
    // A backend that was replaced meanwhile is not asked, and neither is one of a process that ends.
    let replaced = reconciled(Some(minute), async |driver| {
        driver.configure(policy(), None)
    });
    assert_eq!(replaced.await, None);
    let ended = reconciled(Some(minute), async |driver| driver.root().cancel());
    assert_eq!(ended.await, None);
}
