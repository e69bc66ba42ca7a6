//! Unreadable records, and a clock that was set back.

use super::*;

#[rstest]
#[case::truncated(|text: &str| text[..text.len() / 2].to_owned())]
#[case::empty(|_: &str| String::new())]
#[case::of_a_later_driver(|text: &str| text.replacen("\"form\":1", "\"form\":99", 1))]
#[tokio::test]
async fn an_unreadable_record_is_refused_and_can_be_destroyed(#[case] spoil: fn(&str) -> String) {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    plugin.kill().await;
    let file = TaskDir::for_task(&host.state(), &task.id)
        .path()
        .join("running");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, spoil(&text)).unwrap();
    let plugin = host.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(task.stored())).await);
    assert!(
        status.message().contains("reading the running record"),
        "{status:?}"
    );
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn an_unreadable_exit_record_is_reported() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell("echo up; exit 5")).await;
    task.wait(&plugin).await;
    plugin.kill().await;
    host.quiet(&[]).await;
    let file = TaskDir::for_task(&host.state(), &task.id)
        .path()
        .join("exit");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..text.len() / 2]).unwrap();
    let plugin = host.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(task.stored())).await);
    assert!(
        status.message().contains("its exit record can't be read"),
        "{status:?}"
    );
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_clock_set_back_does_not_change_an_exit() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    plugin.kill().await;
    fs::write(gate, "").unwrap();
    host.quiet(&[]).await;
    // As if it had exited a day before it was started.
    let file = TaskDir::for_task(&host.state(), &task.id)
        .path()
        .join("exit");
    let text = fs::read_to_string(&file).unwrap();
    let mut exit: Value = serde_json::from_str(&text).unwrap();
    let seconds = exit["ended_at"]["secs_since_epoch"].as_u64().unwrap();
    exit["ended_at"]["secs_since_epoch"] = json!(seconds - 86400);
    fs::write(&file, exit.to_string()).unwrap();
    let plugin = host.recovered(&task).await;
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    let shown = task.inspect(&plugin).await.unwrap().task.unwrap();
    assert!(shown.completed_at.unwrap().seconds < shown.started_at.unwrap().seconds);
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}
