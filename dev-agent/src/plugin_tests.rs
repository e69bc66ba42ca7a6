//! Launch and shutdown of shell scripts that print the handshake of a server in this process.

use std::os::unix::process::ExitStatusExt;

use rstest::rstest;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic_health::ServingStatus;

use super::*;

/// A server that only implements the health service, and the directory of its socket.
async fn server() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let (health, service) = tonic_health::server::health_reporter();
    health
        .set_service_status("plugin", ServingStatus::Serving)
        .await;
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    dir
}

fn script(text: &str) -> Launch {
    let mut launch = Launch::new("/bin/sh");
    launch.args = vec!["-c".into(), text.into()];
    launch
}

fn greeting(dir: &TempDir) -> String {
    format!("echo '1|2|unix|{}/s|grpc|'", dir.path().display())
}

#[tokio::test]
async fn a_launched_plugin_has_nomads_environment_and_its_log_is_received() {
    let dir = server().await;
    let (sender, mut lines) = mpsc::unbounded_channel();
    let text = format!(
        "{}; echo stray; echo \"$PLUGIN_PROTOCOL_VERSIONS $PLUGIN_MIN_PORT $PLUGIN_MAX_PORT $X ${{HOME-no home}}\" >&2; exec tail -f /dev/null",
        greeting(&dir)
    );
    let mut launch = script(&text).set("X", "x").unset("HOME");
    launch.log = Some(sender);
    let mut plugin = Plugin::launch(launch).await.unwrap();
    assert_eq!(
        lines.recv().await.as_deref(),
        Some("2 10000 25000 x no home")
    );
    let request = tonic_health::pb::HealthCheckRequest {
        service: "plugin".to_owned(),
    };
    let health = plugin.health().check(request).await.unwrap().into_inner();
    assert_eq!(
        health.status(),
        tonic_health::pb::health_check_response::ServingStatus::Serving
    );
    assert_eq!(
        plugin.kill().await.and_then(|status| status.signal()),
        Some(9)
    );
    assert!(plugin.has_exited());
    assert_eq!(plugin.stray_stdout(), b"stray\n");
}

#[rstest]
#[case(
    "echo oh no >&2; exit 3",
    "the plugin exited without a handshake line (exit status: 3); the last lines of its stderr: oh no"
)]
#[case("echo hello", "not a handshake line")]
#[case("printf '1|2|unix|/s|grpc|'", "in the middle of the line")]
#[tokio::test]
async fn a_bad_handshake_kills_the_process_and_is_explained(
    #[case] text: &str,
    #[case] part: &str,
) {
    let error = Plugin::launch(script(text)).await.unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[tokio::test]
async fn a_plugin_without_a_handshake_is_killed() {
    let mut launch = script("exec tail -f /dev/null");
    launch.start_timeout = Duration::from_millis(50);
    launch.grace = Duration::from_millis(50);
    let error = Plugin::launch(launch).await.unwrap_err().to_string();
    assert!(
        error.contains("no handshake line within 0.05 s (killed)"),
        "{error}"
    );
}

#[tokio::test]
async fn a_missing_socket_is_named() {
    let error = Plugin::launch(script(
        "echo '1|2|unix|/nonexistent/s|grpc|'; exec tail -f /dev/null",
    ))
    .await
    .unwrap_err();
    assert!(matches!(error, HostError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_plugin_that_does_not_exit_is_killed() {
    let dir = server().await;
    let mut launch = script(&format!("{}; exec tail -f /dev/null", greeting(&dir)));
    // The server answers at once, and the script never exits.
    launch.grace = Duration::from_secs(1);
    let plugin = Plugin::launch(launch).await.unwrap();
    let stopped = plugin.shutdown().await;
    assert!(stopped.killed);
    assert_eq!(stopped.status.and_then(|status| status.signal()), Some(9));
    assert!(
        stopped.driver_shutdown.is_none(),
        "{:?}",
        stopped.driver_shutdown
    );
}

#[tokio::test]
async fn a_plugin_can_be_reattached() {
    let dir = server().await;
    let first = Plugin::launch(script(&format!(
        "{}; exec tail -f /dev/null",
        greeting(&dir)
    )))
    .await
    .unwrap();
    let mut again = Plugin::reattach(first.address(), first.pid())
        .await
        .unwrap();
    assert!(!again.has_exited());
    assert_eq!(again.kill().await, None);
    assert!(again.has_exited());
    let error = Plugin::reattach(Path::new("/nonexistent/s"), i32::MAX)
        .await
        .unwrap_err();
    assert!(matches!(error, HostError::Io { .. }), "{error}");
}
