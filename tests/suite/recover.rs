//! RecoverTask: a plugin recovers the tasks that an earlier one has started, and nothing else.

use nomad_driver_nspawn::proto::driver::{TaskHandle, TaskState};
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::{Value, json};

use super::*;

const TRAPS: &str = "trap 'echo got; exit 12' USR1; echo up; while :; do sleep 0.05; done";

/// A started task whose plugin is dead.
async fn orphan(world: &impl World, script: &str) -> Running {
    let mut plugin = world.plugin().await;
    let task = world.up(&plugin, world.shell(script)).await;
    plugin.kill().await;
    task
}

#[rstest] // Conformance check 77.
#[tokio::test]
async fn a_new_plugin_takes_over(world: impl World) {
    let task = orphan(&world, TRAPS).await;
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
async fn a_new_plugin_stops_what_it_took_over(world: impl World) {
    let task = orphan(&world, DEAF).await;
    let plugin = world.recovered(&task).await;
    let exit = task.stop(&plugin, Duration::from_millis(100), "").await;
    assert_eq!((exit.code, exit.signal), (137, 9));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

/// Output before, between and after the plugins is complete.
#[rstest] // Conformance check 75.
#[tokio::test]
async fn output_flows_on_without_a_plugin(world: impl World) {
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
async fn an_end_while_no_plugin_ran(world: impl World) {
    let (gate, inside) = world.gate();
    let script = format!("echo up; until test -e {inside}; do sleep 0.01; done; echo bye; exit 21");
    let task = orphan(&world, &script).await;
    let supervisor = ProcessHandle::open(task.supervisor()).unwrap();
    std::fs::write(gate, "").unwrap();
    assert_eq!(task.stdout.all().await, "up\nbye\n");
    assert!(supervisor.wait(DEADLINE), "the supervisor is still there");
    let plugin = world.recovered(&task).await;
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (21, 0, None));
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

/// A handle with a modified driver state.
fn changed(task: &Running, change: impl FnOnce(&mut Value)) -> TaskHandle {
    let mut handle = task.stored();
    let mut state: Value = serde_json::from_slice(&handle.driver_state).unwrap();
    change(&mut state["started"]);
    handle.driver_state = serde_json::to_vec(&state).unwrap();
    handle
}

/// The handle as it would be after a reboot.
fn of_another_boot(task: &Running) -> TaskHandle {
    changed(task, |started| {
        started["boot"] = json!("00000000-0000-0000-0000-000000000000");
    })
}

/// A plugin that refuses this handle in these words.
async fn refused(world: &impl World, handle: TaskHandle, words: &str) -> Plugin {
    let plugin = world.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(handle)).await);
    assert!(status.message().contains(words), "{}", status.message());
    plugin
}

/// The task that the handle does not belong to is not affected.
#[rstest] // Conformance check 80.
#[tokio::test]
async fn another_boot_and_another_process(world: impl World) {
    let task = orphan(&world, TRAPS).await;
    drop(refused(&world, of_another_boot(&task), "started anew").await);
    let reused = changed(&task, |started| {
        let start = started["leader"]["start"].as_u64().unwrap();
        started["leader"]["start"] = json!(start + 1);
    });
    drop(refused(&world, reused, "another one's").await);
    let elsewhere = changed(&task, |started| {
        started["state"] = json!(world.state().join("gone"));
    });
    drop(refused(&world, elsewhere, "another one's place").await);
    // As if the operator had used another state directory before.
    let own = TaskDir::for_task(&world.state(), &task.id);
    let name = own.path().file_name().unwrap();
    let gone = changed(&task, |started| {
        started["state"] = json!(world.join("old").join(name));
    });
    let plugin = refused(&world, gone, "no record").await;
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
async fn what_was_refused_can_be_destroyed(world: impl World) {
    let task = orphan(&world, TRAPS).await;
    let plugin = refused(&world, of_another_boot(&task), "started anew").await;
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}
