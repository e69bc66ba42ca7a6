//! RecoverTask: plugins recover tasks that they did not start, and nothing else.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::{TaskConfig, TaskHandle, TaskState};
use nomad_driver_nspawn::state::task_dir::TaskDir;
use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::{Host, Running, eventually, refusal, within};

const TRAPS: &str = "trap 'echo got; exit 12' USR1; echo up; while :; do sleep 0.05; done";

/// A started task whose plugin is dead.
async fn orphan(host: &Host, script: &str) -> Running {
    let mut plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell(script)).await;
    task.stdout.contains("up").await;
    plugin.kill().await;
    task
}

#[tokio::test] // Conformance check 78.
async fn recovering_twice() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell(TRAPS)).await;
    task.stdout.contains("up").await;
    for _ in 0..3 {
        plugin.recover(task.stored()).await.unwrap();
    }
    let (one, two) = tokio::join!(task.wait(&plugin), async {
        task.signal(&plugin, "SIGUSR1").await.unwrap();
        task.wait(&plugin).await
    });
    assert_eq!((one.code, two.code), (12, 12));
    plugin.recover(task.stored()).await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
}

/// A handle with a modified driver state.
fn changed(task: &Running, change: impl FnOnce(&mut Value)) -> TaskHandle {
    let mut handle = task.stored();
    let mut state: Value = serde_json::from_slice(&handle.driver_state).unwrap();
    change(&mut state["started"]);
    handle.driver_state = serde_json::to_vec(&state).unwrap();
    handle
}

/// A handle that belongs to something else is refused and the task is not affected; a later DestroyTask of the refused task succeeds.
async fn refused(host: &Host, handle: TaskHandle, words: &str) -> Plugin {
    let plugin = host.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(handle)).await);
    assert!(status.message().contains(words), "{}", status.message());
    plugin
}

/// A user who can change what Nomad stores must not be able to direct the driver to forged records.
#[tokio::test]
async fn records_where_others_can_write_are_not_believed() {
    let host = Host::new();
    let task = orphan(&host, TRAPS).await;
    let own = TaskDir::for_task(&host.state(), &task.id);
    let theirs = host.join("theirs");
    let forged = theirs.join(own.path().file_name().unwrap());
    std::fs::create_dir_all(&forged).unwrap();
    for name in ["order", "running"] {
        std::fs::copy(own.path().join(name), forged.join(name)).unwrap();
    }
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    let handle = || {
        changed(&task, |started| {
            started["state"] = json!(forged);
        })
    };
    open(&forged, 0o700);
    open(&theirs, 0o777);
    drop(refused(&host, handle(), "can be written by others (mode 0777)").await);
    open(&theirs, 0o700);
    open(&forged, 0o770);
    let plugin = refused(&host, handle(), "not for the driver's own user alone").await;
    plugin.recover(task.stored()).await.unwrap();
    task.destroy(&plugin).await;
    assert!(forged.join("running").exists(), "it was touched");
}

#[rstest] // Conformance check 81.
#[case::version_0(0, None, "handle version 0 is not known")]
#[case::later(3, None, "handle version 3 is not known")]
#[case::empty(2, Some(&b""[..]), "can't be read")]
#[case::nonsense(2, Some(&b"\xff\x00{"[..]), "can't be read")]
#[case::later_form(2, Some(&br#"{"schema":99}"#[..]), "schema 99 is newer")]
#[case::half(2, Some(&br#"{"schema":1,"started":{"id":"x"}}"#[..]), "can't be read")]
#[tokio::test]
async fn handles_that_can_not_be_read(
    #[case] version: i32,
    #[case] state: Option<&[u8]>,
    #[case] words: &str,
) {
    let host = Host::new();
    let handle = TaskHandle {
        version,
        config: Some(TaskConfig {
            id: "a/t/1".to_owned(),
            name: "t".to_owned(),
            alloc_id: "a".to_owned(),
            ..TaskConfig::default()
        }),
        state: TaskState::Running.into(),
        driver_state: state.unwrap_or_default().to_vec(),
    };
    let plugin = refused(&host, handle, words).await;
    within("DestroyTask", plugin.destroy("a/t/1", true))
        .await
        .unwrap();
    let status = refusal(plugin.recover(TaskHandle::default()).await);
    assert!(
        status.message().contains("no handle.config"),
        "{}",
        status.message()
    );
    assert!(!plugin.has_exited() && host.call_log().is_empty());
}

#[tokio::test]
async fn a_handle_of_the_go_driver_is_refused_by_name() {
    const STATE: &str = "83ab4d616368696e654e616d65a87765622d30663165ae5265617474616368436f6e66696784a441646472ae2f746d702f706c7567696e313233a74e6574776f726ba4756e6978a3506964d11092a850726f746f636f6ca467727063a9537461727465644174af010000000edce5e8000754d4c0ffff";
    let host = Host::new();
    let bytes = (0..STATE.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&STATE[at..at + 2], 16).unwrap());
    let id = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0/web/00c0ffee";
    let handle = TaskHandle {
        version: 1,
        config: Some(TaskConfig {
            id: id.to_owned(),
            name: "web".to_owned(),
            ..TaskConfig::default()
        }),
        state: TaskState::Running.into(),
        driver_state: bytes.collect(),
    };
    let plugin = refused(&host, handle, "Go driver").await;
    within("DestroyTask", plugin.destroy(id, true))
        .await
        .unwrap();
    assert!(!plugin.has_exited());
}

#[tokio::test] // Conformance check 82.
async fn a_second_connection_is_served_fully() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell(TRAPS)).await;
    task.stdout.contains("up").await;
    let mut events = plugin.events().await.unwrap();
    // The agent was killed: its connection is closed and another agent connects to the same plugin.
    let again = Plugin::reattach(plugin.address(), plugin.pid())
        .await
        .unwrap();
    again.configure(&host.config()).await.unwrap();
    again.recover(task.stored()).await.unwrap();
    let mut received = again.events().await.unwrap();
    let second = host
        .start(
            &again,
            host.shell("exit 2")
                .named("second")
                .with("image", json!(host.tree("other")))
                .env("a=b", ""),
        )
        .await;
    for stream in [&mut events, &mut received] {
        let hear = async {
            loop {
                let event = stream.message().await.unwrap().unwrap();
                if event.task_name == "second" {
                    return;
                }
            }
        };
        within("the event of the second task", hear).await;
    }
    assert_eq!(second.wait(&again).await.code, 2);
    second.destroy(&again).await;
    task.signal(&again, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&again).await.code, 12);
    task.destroy(&again).await;
}

#[tokio::test] // Conformance check 83.
async fn ten_deaths_and_the_same_task() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell(TRAPS)).await;
    task.stdout.contains("up").await;
    for _ in 0..10 {
        plugin.kill().await;
        plugin = host.recovered(&task).await;
        let attributes = task
            .inspect(&plugin)
            .await
            .unwrap()
            .driver
            .unwrap()
            .attributes;
        assert_eq!(attributes["pid"], task.leader().to_string());
    }
    assert_eq!(host.starts().len(), 1);
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn a_plugin_that_dies_during_a_start_leaves_nothing() {
    let host = Host::new();
    host.scenario(&json!({"calls": [{"never_notify": true}, {}]}));
    let mut plugin = host.plugin().await;
    let allocation = std::sync::Arc::new(host.allocation(host.shell("exit 2")));
    let logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let mut client = plugin.driver();
    let request = nomad_driver_nspawn::proto::driver::StartTaskRequest {
        task: Some(config.clone()),
    };
    let start = tokio::spawn(async move { client.start_task(request).await });
    eventually("systemd-nspawn was called", || !host.starts().is_empty()).await;
    plugin.kill().await;
    assert!(within("StartTask", start).await.unwrap().is_err());
    host.quiet(&[]).await;
    // Nomad starts the same id with the next plugin.
    let plugin = host.plugin().await;
    within("StartTask", plugin.start(config.clone()))
        .await
        .unwrap();
    assert_eq!(
        within("WaitTask", plugin.wait(&config.id))
            .await
            .unwrap()
            .code,
        2
    );
    within("DestroyTask", plugin.destroy(&config.id, true))
        .await
        .unwrap();
    drop(logs);
}
