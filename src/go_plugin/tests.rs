//! Tests of the go-plugin side, in this process and over a real socket.

use std::path::PathBuf;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::backend::{ContainerBackend, MockContainerBackend};
use crate::driver::tests::exec::other_side::piped;
use crate::driver::tests::exec::{data, sessions, setup};
use crate::driver::tests::{driver, kept};
use crate::proto::driver as wire;
use crate::proto::driver::driver_client::DriverClient;
use crate::proto::plugin::grpc_broker_client::GrpcBrokerClient;
use crate::proto::plugin::grpc_controller_client::GrpcControllerClient;
use crate::proto::plugin::grpc_stdio_client::GrpcStdioClient;
use crate::proto::plugin::{ConnInfo, Empty};
use crate::task::tests::TestBackend;

const LIMIT: Duration = Duration::from_secs(20);

struct Served {
    socket: PathBuf,
    ended: JoinHandle<Result<(), ServeError>>,
    _dir: tempfile::TempDir,
}

async fn served(mock: MockContainerBackend) -> Served {
    served_by(Arc::new(mock)).await
}

async fn served_by(backend: Arc<dyn ContainerBackend>) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let handshake_env = HandshakeEnv {
        socket_dir: dir.path().to_owned(),
        socket_group: None,
        multiplex_asked: false,
        workers: None,
    };
    let driver = driver(backend);
    let (print_handshake, announced) = oneshot::channel();
    let ended = tokio::spawn(async move {
        let print_handshake = |socket: &Path| {
            print_handshake.send(socket.to_owned()).unwrap();
            Ok(())
        };
        serve_and_print(driver, &handshake_env, None, print_handshake).await
    });
    Served {
        socket: announced.await.unwrap(),
        ended,
        _dir: dir,
    }
}

impl Served {
    async fn connect(&self) -> Channel {
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://unused")
            .connect_with_connector(connector)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn health_is_reported_for_the_plugin_and_the_server() {
    let served = served(MockContainerBackend::new()).await;
    let mut health = HealthClient::new(served.connect().await);
    for service in ["plugin", ""] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(
            answer.status(),
            tonic_health::pb::health_check_response::ServingStatus::Serving
        );
    }
}

#[tokio::test]
async fn shutdown_does_not_wait_for_streams_and_removes_the_socket() {
    let served = served(MockContainerBackend::new()).await;
    let channel = served.connect().await;
    let mut stdio = GrpcStdioClient::new(channel.clone())
        .stream_stdio(())
        .await
        .unwrap()
        .into_inner();
    let broker = tokio_stream::pending::<ConnInfo>();
    let mut broker = GrpcBrokerClient::new(channel.clone())
        .start_stream(broker)
        .await
        .unwrap()
        .into_inner();
    let mut events = DriverClient::new(channel.clone())
        .task_events(wire::TaskEventsRequest {})
        .await
        .unwrap()
        .into_inner();
    tokio::select! {
        biased;
        _ = stdio.message() => panic!("stdio ended"),
        _ = broker.message() => panic!("the broker ended"),
        _ = events.message() => panic!("the events ended"),
        () = std::future::ready(()) => {}
    }
    // The response may be lost with the connection.
    let _ = GrpcControllerClient::new(channel).shutdown(Empty {}).await;
    timeout(LIMIT, served.ended)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(!served.socket.exists());
}

#[tokio::test]
async fn a_silent_connection_is_harmless() {
    let served = served(MockContainerBackend::new()).await;
    drop(UnixStream::connect(&served.socket).await.unwrap());
    let mut driver = DriverClient::new(served.connect().await);
    assert!(
        driver
            .capabilities(wire::CapabilitiesRequest {})
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_large_request_is_accepted() {
    let served = served(MockContainerBackend::new()).await;
    let mut driver = DriverClient::new(served.connect().await);
    driver.shutdown(wire::ShutdownRequest {}).await.unwrap();
    let task = wire::TaskConfig {
        env: [("LARGE".to_owned(), "x".repeat(8 << 20))].into(),
        ..Default::default()
    };
    let refused = driver
        .start_task(wire::StartTaskRequest { task: Some(task) })
        .await
        .unwrap_err();
    assert_eq!(
        refused.message(),
        "the plugin is shutting down and does not start tasks"
    );
}

#[tokio::test]
async fn a_panic_fails_only_its_call() {
    let mut mock = MockContainerBackend::new();
    mock.expect_remove().returning(|_| panic!("on purpose"));
    let served = served(mock).await;
    let mut driver = DriverClient::new(served.connect().await);
    let request = wire::DestroyTaskRequest {
        task_id: "a/t/1".to_owned(),
        force: true,
    };
    let status = driver.destroy_task(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Internal);
    assert!(
        driver
            .capabilities(wire::CapabilitiesRequest {})
            .await
            .is_ok(),
        "on the same connection"
    );
}

/// It waits in the plugin's windows of HTTP/2, and that of the connection must not be used up by a few calls.
#[tokio::test]
async fn input_that_no_command_reads_delays_no_other_call() {
    const SESSIONS: usize = 20;
    const MESSAGE_BYTES: usize = 64 * 1024;
    let (mut mock, mut others) = sessions(piped);
    mock.expect_attach()
        .returning(|started| Ok(started.clone().into()));
    let (backend, _end) = TestBackend::new(mock);
    let served = served_by(backend).await;
    let mut driver = DriverClient::new(served.connect().await);
    driver
        .recover_task(kept(2, crate::driver::tests::ID))
        .await
        .unwrap();
    let mut open = Vec::new();
    for _ in 0..SESSIONS {
        let (input, messages) = tokio::sync::mpsc::channel(1);
        input.send(setup(&["sleep"], false)).await.unwrap();
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        let responses = timeout(LIMIT, driver.exec_task_streaming(messages)).await;
        let responses = responses.expect("another call is served").unwrap();
        let other = others.recv().await.unwrap();
        // Until the plugin accepts no more.
        let send = async || input.send(data(vec![0; MESSAGE_BYTES])).await.unwrap();
        while timeout(Duration::from_millis(20), send()).await.is_ok() {}
        open.push((input, responses, other));
    }
    let mut request = kept(2, crate::driver::tests::ID).into_inner();
    let config = request.handle.as_mut().unwrap().config.as_mut().unwrap();
    config.env.insert("LONG".to_owned(), "x".repeat(1 << 20));
    let answer = timeout(LIMIT, driver.recover_task(request)).await;
    answer.expect("another call is served").unwrap();
}
