//! How the plugin process exits, what it leaves running, and the calls that return "not implemented".

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::proto::driver as proto;
use nomad_driver_nspawn::proto::plugin::Empty;
use nomad_driver_nspawn::proto::plugin::grpc_stdio_client::GrpcStdioClient;
use tonic::Code;

use crate::harness::{Host, refusal, within};

const TRAPS: &str = "trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done";

#[tokio::test] // Conformance check 11.
async fn a_shutdown_with_everything_open() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(TRAPS)).await;
    let (_print, _fingerprints) = plugin.fingerprint().await.unwrap();
    let _events = plugin.events().await.unwrap();
    let _stdio = GrpcStdioClient::new(plugin.channel())
        .stream_stdio(())
        .await
        .unwrap();
    let mut client = plugin.driver();
    let request = proto::WaitTaskRequest {
        task_id: task.id.clone(),
    };
    let wait = tokio::spawn(async move { client.wait_task(request).await });
    let socket = plugin.address().to_owned();
    // The plugin may exit before its response is sent.
    let _ = plugin.controller().shutdown(Empty {}).await;
    let status = within("the plugin's end", plugin.gone()).await.unwrap();
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
    let cut_off = within("WaitTask", wait).await.unwrap();
    assert!(
        cut_off.is_err(),
        "an answer would be taken for the end of the task: {cut_off:?}"
    );
    let plugin = host.recovered(&task).await;
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn a_terminated_plugin_exits_cleanly_and_keeps_its_tasks() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(TRAPS)).await;
    let socket = plugin.address().to_owned();
    kill(Pid::from_raw(plugin.pid()), Signal::SIGTERM).unwrap();
    assert!(
        within("the plugin's end", plugin.gone())
            .await
            .unwrap()
            .success()
    );
    assert!(!socket.exists());
    let plugin = host.recovered(&task).await;
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn init_and_shutdown_succeed() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut driver = plugin.driver();
    driver.init(proto::InitRequest {}).await.unwrap();
    let task = host.up(&plugin, host.shell(TRAPS)).await;
    driver.shutdown(proto::ShutdownRequest {}).await.unwrap();
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    assert!(
        status.message().contains("shutting down"),
        "{}",
        status.message()
    );
    assert_eq!(
        task.inspect(&plugin).await.unwrap().task.unwrap().state(),
        proto::TaskState::Running
    );
    // A returning agent is served again.
    driver.init(proto::InitRequest {}).await.unwrap();
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
    let next = host.start(&plugin, host.shell("exit 0")).await;
    assert_eq!(next.wait(&plugin).await.code, 0);
    next.destroy(&plugin).await;
    let stopped = plugin.shutdown().await;
    assert!(
        !stopped.killed && stopped.driver_shutdown.is_none(),
        "{stopped:?}"
    );
    assert!(stopped.status.unwrap().success());
}

#[tokio::test]
async fn unimplemented_calls_are_reported_as_such() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut driver = plugin.driver();
    let capabilities = driver
        .capabilities(proto::CapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner()
        .capabilities
        .unwrap();
    assert!(!capabilities.must_create_network);
    let answers = [
        driver
            .create_network(proto::CreateNetworkRequest::default())
            .await
            .map(drop),
        driver
            .destroy_network(proto::DestroyNetworkRequest::default())
            .await
            .map(drop),
    ];
    for answer in answers {
        let status = answer.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
        assert!(
            status
                .message()
                .ends_with("is not supported by this driver"),
            "{}",
            status.message()
        );
    }
}

#[tokio::test]
async fn a_session_without_setup_is_refused() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let heartbeat = proto::ExecTaskStreamingRequest::default();
    let messages = tokio_stream::once(heartbeat);
    let refused = plugin.driver().exec_task_streaming(messages).await;
    let status = refused.unwrap_err();
    let seen = (status.code(), status.message());
    assert_eq!(seen, (Code::InvalidArgument, "the request has no setup"));
}

#[tokio::test]
async fn incomplete_requests_are_refused() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut driver = plugin.driver();
    let answers = [
        driver
            .start_task(proto::StartTaskRequest::default())
            .await
            .map(drop),
        driver
            .start_task(proto::StartTaskRequest {
                task: Some(proto::TaskConfig::default()),
            })
            .await
            .map(drop),
        driver
            .recover_task(proto::RecoverTaskRequest::default())
            .await
            .map(drop),
    ];
    for answer in answers {
        assert_eq!(answer.unwrap_err().code(), Code::InvalidArgument);
    }
    let status = driver
        .wait_task(proto::WaitTaskRequest::default())
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "task not found for given id")
    );
}
