//! RecoverTask: a plugin recovers the tasks that an earlier one has started, and nothing else.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nomad_driver_nspawn::proto::driver::{TaskConfig, TaskHandle, TaskState};
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::json;

use super::*;

const TRAPS: &str = "trap 'echo got; exit 12' USR1; echo up; while :; do sleep 0.05; done";

#[rstest] // Conformance check 77.
#[tokio::test]
async fn a_new_plugin_recovers_the_task(world: impl World) {
    let task = world.orphan(TRAPS).await;
    assert!(
        task.stored()
            .config
            .unwrap()
            .msgpack_driver_config
            .is_empty()
    );
    let plugin = world.recovered(&task).await;
    let inspected = task.inspect(&plugin).await.unwrap();
    assert_eq!(inspected.task.unwrap().state(), TaskState::Running);
    assert_eq!(
        inspected.driver.unwrap().attributes["pid"],
        task.leader().to_string()
    );
    let mut stats = task.stats(&plugin, Duration::from_secs(10)).await;
    assert!(within("a sample", stats.message()).await.unwrap().is_some());
    drop(stats);
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    assert_eq!(task.stdout.all().await, "up\ngot\n");
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn a_new_plugin_stops_a_recovered_task(world: impl World) {
    let task = world.orphan(DEAF).await;
    let plugin = world.recovered(&task).await;
    let exit = task.stop(&plugin, Duration::from_millis(100), "").await;
    assert_eq!((exit.code, exit.signal), (137, 9));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

/// Output before, between and after the plugins is complete.
#[rstest] // Conformance check 75.
#[tokio::test]
async fn output_continues_without_a_plugin(world: impl World) {
    let mut plugin = world.plugin().await;
    let script = "trap 'echo last; exit 23' TERM; i=0; while :; do i=$((i+1)); echo line-$i-; sleep 0.002; done";
    let task = world.start(&plugin, world.shell(script)).await;
    task.stdout.contains("line-20-\n").await;
    plugin.kill().await;
    task.stdout.contains("line-200-\n").await;
    let plugin = world.recovered(&task).await;
    task.stdout.contains("line-400-\n").await;
    let exit = task.stop(&plugin, DEADLINE, "SIGTERM").await;
    assert_eq!((exit.code, exit.signal, exit.error), (23, 0, None));
    let all = task.stdout.all().await;
    let mut lines = all.lines();
    assert_eq!(lines.next_back(), Some("last"));
    for (number, line) in (1..).zip(lines) {
        assert_eq!(line, format!("line-{number}-"));
    }
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest] // Conformance check 79.
#[tokio::test]
async fn an_exit_while_no_plugin_ran(world: impl World) {
    let (gate, inside) = world.gate();
    let script = format!("echo up; until test -e {inside}; do sleep 0.01; done; echo bye; exit 21");
    let task = world.orphan(&script).await;
    let supervisor = ProcessHandle::open(task.supervisor()).unwrap();
    fs::write(gate, "").unwrap();
    assert_eq!(task.stdout.all().await, "up\nbye\n");
    assert!(supervisor.wait(DEADLINE), "the supervisor is still there");
    let plugin = world.recovered(&task).await;
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (21, 0, None));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

/// The handle as it would be after a reboot.
fn of_another_boot(task: &Running) -> TaskHandle {
    task.changed(|started| {
        started["boot"] = json!("00000000-0000-0000-0000-000000000000");
    })
}

/// The task that the handle does not belong to is not affected.
#[rstest] // Conformance check 80.
#[tokio::test]
async fn another_boot_and_another_process_are_refused(world: impl World) {
    let task = world.orphan(TRAPS).await;
    drop(
        world
            .not_recovered(of_another_boot(&task), "rebooted")
            .await,
    );
    let reused = task.changed(|started| {
        let start = started["leader"]["start"].as_u64().unwrap();
        started["leader"]["start"] = json!(start + 1);
    });
    drop(world.not_recovered(reused, "of another start").await);
    let elsewhere = task.changed(|started| {
        started["state"] = json!(world.state().join("gone"));
    });
    drop(
        world
            .not_recovered(elsewhere, "the name of another start")
            .await,
    );
    // As if the operator had used another state directory before.
    let own = TaskDir::for_task(&world.state(), &task.id);
    let name = own.path().file_name().unwrap();
    let gone = task.changed(|started| {
        started["state"] = json!(world.join("old").join(name));
    });
    let plugin = world.not_recovered(gone, "no running record").await;
    plugin.recover(task.stored()).await.unwrap();
    assert_eq!(
        task.inspect(&plugin).await.unwrap().task.unwrap().state(),
        TaskState::Running
    );
    task.destroy(&plugin).await;
    within("DestroyTask", plugin.destroy(&task.id, true))
        .await
        .unwrap();
    world.leave(plugin).await;
}

#[rstest] // Conformance check 80.
#[tokio::test]
async fn a_refused_handle_can_be_destroyed(world: impl World) {
    let task = world.orphan(TRAPS).await;
    let plugin = world
        .not_recovered(of_another_boot(&task), "rebooted")
        .await;
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest] // Conformance check 78.
#[tokio::test]
async fn recovering_twice(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(TRAPS)).await;
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
    world.leave(plugin).await;
}

/// A user who can change what Nomad stores must not be able to direct the driver to forged records.
#[rstest]
#[tokio::test]
async fn records_writable_by_others_are_not_trusted(world: impl World) {
    let task = world.orphan(TRAPS).await;
    let own = TaskDir::for_task(&world.state(), &task.id);
    let theirs = world.join("theirs");
    let forged = theirs.join(own.path().file_name().unwrap());
    fs::create_dir_all(&forged).unwrap();
    for name in ["order", "running"] {
        fs::copy(own.path().join(name), forged.join(name)).unwrap();
    }
    let open = |path: &Path, mode| {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    let handle = || {
        task.changed(|started| {
            started["state"] = json!(forged);
        })
    };
    open(&forged, 0o700);
    open(&theirs, 0o777);
    drop(
        world
            .not_recovered(handle(), "is writable by other users (mode 0777)")
            .await,
    );
    open(&theirs, 0o700);
    open(&forged, 0o770);
    let plugin = world
        .not_recovered(handle(), "other users can access it")
        .await;
    plugin.recover(task.stored()).await.unwrap();
    task.destroy(&plugin).await;
    assert!(forged.join("running").exists(), "it was touched");
    world.leave(plugin).await;
}

#[rstest] // Conformance check 81.
#[case::version_0(0, None, "handle version 0 is not supported")]
#[case::later(3, None, "handle version 3 is not supported")]
#[case::empty(2, Some(&b""[..]), "can't be parsed")]
#[case::nonsense(2, Some(&b"\xff\x00{"[..]), "can't be parsed")]
#[case::later_form(2, Some(&br#"{"schema":99}"#[..]), "schema 99 is newer")]
#[case::truncated(2, Some(&br#"{"schema":1,"started":{"id":"x"}}"#[..]), "can't be parsed")]
#[tokio::test]
async fn unreadable_handles_are_refused(
    world: impl World,
    #[case] version: i32,
    #[case] state: Option<&[u8]>,
    #[case] words: &str,
) {
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
    let plugin = world.not_recovered(handle, words).await;
    within("DestroyTask", plugin.destroy("a/t/1", true))
        .await
        .unwrap();
    let status = refusal(plugin.recover(TaskHandle::default()).await);
    assert!(
        status.message().contains("no handle.config"),
        "{}",
        status.message()
    );
    assert!(!plugin.has_exited());
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn a_handle_of_the_go_driver_is_refused_by_name(world: impl World) {
    const STATE: &str = "83ab4d616368696e654e616d65a87765622d30663165ae5265617474616368436f6e66696784a441646472ae2f746d702f706c7567696e313233a74e6574776f726ba4756e6978a3506964d11092a850726f746f636f6ca467727063a9537461727465644174af010000000edce5e8000754d4c0ffff";
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
    let plugin = world.not_recovered(handle, "Go driver").await;
    within("DestroyTask", plugin.destroy(id, true))
        .await
        .unwrap();
    assert!(!plugin.has_exited());
    world.leave(plugin).await;
}

#[rstest] // Conformance check 82.
#[tokio::test]
async fn a_second_connection_is_served_fully(world: impl World) {
    let plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(TRAPS)).await;
    let mut events = plugin.events().await.unwrap();
    // The agent was killed: its connection is closed and another agent connects to the same plugin.
    let again = Plugin::reattach(plugin.address(), plugin.pid())
        .await
        .unwrap();
    again.configure(&world.config()).await.unwrap();
    again.recover(task.stored()).await.unwrap();
    let mut received = again.events().await.unwrap();
    let second = world
        .start(
            &again,
            world
                .shell("exit 2")
                .named("second")
                .with("image", json!(world.tree("other")))
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
    drop((events, received, again));
    world.leave(plugin).await;
}

#[rstest] // Conformance check 83.
#[tokio::test]
async fn a_task_survives_ten_plugin_deaths(world: impl World) {
    let mut plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(TRAPS)).await;
    for _ in 0..10 {
        plugin.kill().await;
        plugin = world.recovered(&task).await;
        let attributes = task
            .inspect(&plugin)
            .await
            .unwrap()
            .driver
            .unwrap()
            .attributes;
        assert_eq!(attributes["pid"], task.leader().to_string());
    }
    task.signal(&plugin, "SIGUSR1").await.unwrap();
    assert_eq!(task.wait(&plugin).await.code, 12);
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
