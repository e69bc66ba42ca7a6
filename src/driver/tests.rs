//! The RPCs against a mock backend, called as Nomad calls them.

use std::time::Duration;

use mockall::predicate::{always, eq};
use prost::Message as _;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

use super::*;
use crate::backend::{BackendError, MockContainerBackend, MockUsageReader};
use crate::container::{CgroupLayout, Exit, Probe, Reading, Usage};
use crate::proto::driver as proto;
use crate::proto::driver::driver_server::Driver as DriverService;
use crate::proto::driver::fingerprint_response::HealthState;
use crate::proto::hclspec;
use crate::signal::Signal;
use crate::task::handle;
use crate::task::tests::{TestBackend, exit, info, spec, started, starts};

mod configure;
pub(crate) mod exec;
mod start;
mod statistics;

pub(crate) const ID: &str = "a/t/1";
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn plugin_config() -> PluginConfig {
    PluginConfig {
        enabled: true,
        volumes: true,
        volumes_allow: Default::default(),
        devices: true,
        require_limits: false,
        exec_unfiltered: false,
        seccomp_cache: true,
        private_network: false,
        network_pool: Default::default(),
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
        controllers: ["cpu", "cpuset", "memory"].map(str::to_owned).into(),
        idmapped_mounts: true,
        openat2: Ok(()),
        seccomp_cache: Ok(()),
        state_dir: Ok(()),
    }
}

/// A configured driver with this backend.
pub(crate) fn driver(backend: Arc<dyn ContainerBackend>) -> Driver {
    let search_path = ImageSearchPath {
        plugin_dir: "/opt/nomad/plugins".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(move |_, _| Arc::clone(&backend), search_path);
    driver.configure(plugin_config(), None);
    driver
}

/// A driver with one running task, and the sender that ends the task.
async fn running(mock: MockContainerBackend) -> (Driver, watch::Sender<Option<Exit>>) {
    let (stage, end) = TestBackend::new(mock);
    let driver = driver(stage.clone());
    driver.tasks.start(stage, info(ID), spec(ID)).await.unwrap();
    (driver, end)
}

pub(crate) fn kept(version: i32, id: &str) -> Request<proto::RecoverTaskRequest> {
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
            driver_state: handle::encode(&started(ID), None).unwrap(),
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
async fn capabilities_have_the_golden_bytes() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    let response = driver
        .capabilities(Request::new(proto::CapabilitiesRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(hex(&response.encode_to_vec()), "0a0a08011001180222020001");
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
async fn a_stored_handle_is_enough_to_recover_the_task() {
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .times(1)
        .returning(|started| Ok(started.clone().into()));
    let (stage, end) = TestBackend::new(mock);
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
async fn a_foreign_handle_is_refused_and_can_be_destroyed() {
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
async fn a_failed_recovery_leaves_no_task() {
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
async fn inspection_is_complete_in_every_state() {
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
    assert_eq!(up.completed_at, Some(convert::ZERO_TIME));
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
async fn a_lost_supervisor_is_a_result_with_an_error() {
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
async fn unknown_ids_are_answered_as_nomad_expects() {
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
async fn a_stop_passes_signal_and_timeout() {
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
async fn events_have_the_fields_by_which_nomad_routes_them() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
    driver.events.publish(&info(ID), "early");
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

#[tokio::test]
async fn unimplemented_calls_are_reported_as_such() {
    let driver = driver(Arc::new(MockContainerBackend::new()));
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

#[tokio::test(start_paused = true)]
async fn reconciliation_is_repeated_after_the_first_task_of_the_agent() {
    let (asked, mut received) = tokio::sync::mpsc::unbounded_channel();
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .returning(|started| Ok(started.clone().into()));
    mock.expect_wait().returning(|_| Ok(exit(0, 0)));
    mock.expect_reconcile()
        .returning(move |roots| asked.send(roots.clone()).unwrap());
    let backend: Arc<dyn ContainerBackend> = Arc::new(mock);
    let search_path = ImageSearchPath {
        plugin_dir: "/".into(),
        machine_dirs: Vec::new(),
    };
    let driver = Driver::new(move |_: &PluginConfig, _| Arc::clone(&backend), search_path);
    let after = Some(Duration::from_secs(60));
    driver.configure(
        PluginConfig {
            reconcile_after: after,
            ..plugin_config()
        },
        None,
    );
    assert!(received.recv().await.unwrap().is_empty());
    let handle = |alloc_dir: &str| {
        let mut request = kept(handle::VERSION, ID);
        let handle = request.get_mut().handle.as_mut().unwrap();
        handle.config.as_mut().unwrap().alloc_dir = alloc_dir.to_owned();
        request
    };
    driver.recover_task(handle("/data/alloc/a")).await.unwrap();
    let root = std::path::PathBuf::from("/data/alloc");
    let want = std::collections::BTreeSet::from([root]);
    assert_eq!(received.recv().await.unwrap(), want);
    // Another allocation in the same directory triggers nothing.
    driver.recover_task(handle("/data/alloc/b")).await.unwrap();
    let hour = Duration::from_secs(3600);
    assert!(timeout(hour, received.recv()).await.is_err());
}
