//! The go-plugin handshake, the services that the plugin serves besides Nomad's own, and that it keeps serving.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use dev_agent::Plugin;
use dev_agent::handshake::{COOKIE_KEY, COOKIE_VALUE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::proto::plugin::grpc_broker_client::GrpcBrokerClient;
use nomad_driver_nspawn::proto::plugin::grpc_stdio_client::GrpcStdioClient;
use rstest::rstest;
use serde_json::{Value, json};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{Host, refusal, within};

/// The program with an empty environment except `TMPDIR`.
fn bare(host: &Host) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-driver-nspawn"));
    command
        .env_clear()
        .env("TMPDIR", host.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A plugin process of which only the first line was read. It is killed on drop.
struct Raw {
    child: Child,
    line: String,
}

impl Raw {
    fn launch(host: &Host, more: &[(&str, &str)]) -> Self {
        let mut child = bare(host)
            .env(COOKIE_KEY, COOKIE_VALUE)
            .envs(more.iter().copied())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self { child, line }
    }

    fn fields(&self) -> Vec<&str> {
        self.line.trim_end_matches('\n').split('|').collect()
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // It has exited already if the test itself ended it.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// The message for a person who starts the program by hand.
fn assert_a_notice(output: &Output) {
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("plugin"), "{text}");
}

#[test] // Conformance check 1.
fn without_a_cookie_there_is_a_notice() {
    assert_a_notice(&bare(&Host::new()).output().unwrap());
}

#[test] // Conformance check 2.
fn a_wrong_cookie_counts_as_none() {
    let output = bare(&Host::new())
        .env(
            COOKIE_KEY,
            "d602bf8f470bc67ca7faa0386276bbdd4330efaf76d1a219cb4d6991ca9872b2",
        )
        .output()
        .unwrap();
    assert_a_notice(&output);
}

#[test] // Conformance check 3.
fn handshake_line() {
    let host = Host::new();
    let raw = Raw::launch(&host, &[("PLUGIN_PROTOCOL_VERSIONS", "2")]);
    let fields = raw.fields();
    assert_eq!(fields[..3], ["1", "2", "unix"], "{:?}", raw.line);
    assert!(Path::new(fields[3]).is_absolute());
    assert!(
        matches!(fields[4..], ["grpc"] | ["grpc", ""]),
        "{:?}",
        raw.line
    );
}

#[tokio::test] // Conformance check 4.
async fn it_serves_immediately() {
    let host = Host::new();
    let raw = Raw::launch(&host, &[]);
    // The connection speaks HTTP/2 with prior knowledge and the authority "unused", as Nomad's does.
    let plugin = Plugin::reattach(Path::new(raw.fields()[3]), raw.pid())
        .await
        .unwrap();
    within("PluginInfo", plugin.identify()).await.unwrap();
}

#[test] // Conformance check 5.
fn the_socket_is_where_the_host_says() {
    let host = Host::new();
    let dir = host.join("alloc").display().to_string();
    let raw = Raw::launch(&host, &[("PLUGIN_UNIX_SOCKET_DIR", &dir)]);
    assert_eq!(Path::new(raw.fields()[3]).parent(), Some(Path::new(&dir)));
    assert!(Path::new(raw.fields()[3]).exists());
}

#[rstest] // Conformance check 6.
#[case(&[])]
#[case(&[("PLUGIN_PROTOCOL_VERSIONS", "1,2,3")])]
fn version_2_is_announced(#[case] environment: &[(&str, &str)]) {
    let host = Host::new();
    assert_eq!(Raw::launch(&host, environment).fields()[1], "2");
}

#[rstest] // Conformance check 7.
#[case(&[], None)]
#[case(&[("PLUGIN_MULTIPLEX_GRPC", "true")], Some("false"))]
fn the_seventh_field_is_sent_only_on_request(
    #[case] environment: &[(&str, &str)],
    #[case] field: Option<&str>,
) {
    let host = Host::new();
    let raw = Raw::launch(&host, environment);
    assert_eq!(raw.fields().get(6).copied(), field);
}

#[tokio::test] // Conformance check 8.
async fn an_empty_connection_is_harmless() {
    let host = Host::new();
    let plugin = host.plugin().await;
    for _ in 0..20 {
        drop(UnixStream::connect(plugin.address()).unwrap());
    }
    within("PluginInfo", plugin.identify()).await.unwrap();
    let again = Plugin::reattach(plugin.address(), plugin.pid())
        .await
        .unwrap();
    within("PluginInfo", again.identify()).await.unwrap();
}

#[tokio::test] // Conformance check 9.
async fn health() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let service = "plugin".to_owned();
    let answer = within("Check", async {
        plugin.health().check(HealthCheckRequest { service }).await
    })
    .await;
    assert_eq!(
        answer.unwrap().into_inner().status(),
        ServingStatus::Serving
    );
}

#[tokio::test] // Conformance check 10.
async fn stdio_and_broker_stay_open() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut stdio = GrpcStdioClient::new(plugin.channel())
        .stream_stdio(())
        .await
        .unwrap()
        .into_inner();
    let requests = tokio_stream::pending();
    let mut broker = GrpcBrokerClient::new(plugin.channel())
        .start_stream(requests)
        .await
        .unwrap()
        .into_inner();
    let whole_life = async {
        let task = host.start(&plugin, host.shell("exit 0")).await;
        task.wait(&plugin).await;
        task.destroy(&plugin).await;
    };
    tokio::select! {
        () = whole_life => {}
        message = stdio.message() => panic!("{message:?}"),
        message = broker.message() => panic!("{message:?}"),
    }
    drop((stdio, broker));
    within("PluginInfo", plugin.identify()).await.unwrap();
}

#[tokio::test] // Conformance check 12.
async fn the_plugin_ignores_sigint() {
    let host = Host::new();
    let plugin = host.plugin().await;
    for _ in 0..3 {
        kill(Pid::from_raw(plugin.pid()), Signal::SIGINT).unwrap();
        within("PluginInfo", plugin.identify()).await.unwrap();
    }
    assert!(!plugin.has_exited());
}

#[tokio::test] // Conformance check 13.
async fn closed_output_pipes_do_not_end_the_plugin() {
    let host = Host::new();
    let mut raw = Raw::launch(&host, &[]);
    drop((raw.child.stdout.take(), raw.child.stderr.take()));
    let plugin = Plugin::reattach(Path::new(raw.fields()[3]), raw.pid())
        .await
        .unwrap();
    plugin.configure(&host.config()).await.unwrap();
    for _ in 0..3 {
        let task = host.start(&plugin, host.shell("exit 3")).await;
        // A recovery is always logged.
        plugin.recover(task.stored()).await.unwrap();
        assert_eq!(task.wait(&plugin).await.code, 3);
        task.destroy(&plugin).await;
    }
    assert!(!plugin.has_exited());
}

#[tokio::test] // Conformance check 14.
async fn no_task_holds_the_plugins_pipes() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    // `kill` returns once the process is reaped and no process holds its stdout and stderr.
    within("the end of the pipes", plugin.kill()).await;
    host.recovered(&task)
        .await
        .destroy(&task.id, true)
        .await
        .unwrap();
}

#[tokio::test] // Conformance check 15.
async fn the_log_is_the_agents_json() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exec sleep 1000")).await;
    plugin.kill().await;
    let plugin = host.recovered(&task).await;
    refusal(plugin.set_config(b"nonsense".to_vec()).await);
    task.destroy(&plugin).await;
    host.log().contains("recovered").await;
    for line in host.log().text() {
        let value: Value = serde_json::from_str(&line).unwrap();
        assert!(
            value["@level"].is_string() && value["@message"].is_string(),
            "{line}"
        );
        let time = value["@timestamp"].as_str().unwrap();
        let fraction = time.split_once('.').unwrap().1;
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        assert_eq!(digits, 6, "{time}");
    }
}

#[tokio::test] // Conformance check 16.
async fn a_large_request() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exit 5")).into();
    let task = host
        .start_edited(&plugin, allocation, |task| {
            task.job_name = "j".repeat(8 << 20)
        })
        .await
        .unwrap();
    assert_eq!(task.wait(&plugin).await.code, 5);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn the_plugin_prints_nothing_after_the_line() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .start(&plugin, host.shell("echo out; echo err >&2"))
        .await;
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
    refusal(
        plugin
            .set_config(rmp_serde::to_vec(&json!({"volumes": "x"})).unwrap())
            .await,
    );
    assert!(plugin.stray_stdout().is_empty());
}

/// Each task uses two descriptors of the plugin, so the usual soft limit would be reached at about five hundred tasks.
#[tokio::test]
async fn the_limit_of_open_files_is_raised_as_far_as_it_goes() {
    let host = Host::new();
    let mut launch = host.launch();
    let plugin = std::mem::replace(&mut launch.binary, "/bin/sh".into());
    let script = "ulimit -Sn 64; exec \"$0\"".to_owned();
    launch.args = vec!["-c".into(), script.into(), plugin.into()];
    let plugin = within("the plugin's start", Plugin::launch(launch))
        .await
        .unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", plugin.pid())).unwrap();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .unwrap();
    let values: Vec<_> = line.split_whitespace().take(2).collect();
    assert_eq!(values[0], values[1]);
    assert_ne!(values[0], "64");
}
