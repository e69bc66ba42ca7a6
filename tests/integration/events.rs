//! TaskEvents: the stream stays open as long as the client reads it; the content of an event.

use std::time::SystemTime;

use crate::harness::{Host, within};

#[tokio::test] // Conformance check 60.
async fn the_stream_stays_open() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let (mut one, mut two) = (
        plugin.events().await.unwrap(),
        plugin.events().await.unwrap(),
    );
    let whole_life = async {
        let task = host.start(&plugin, host.shell("exit 0")).await;
        task.wait(&plugin).await;
        task.destroy(&plugin).await;
    };
    tokio::pin!(whole_life);
    // On a host without cgroups every task emits an event; nothing ends the stream.
    loop {
        tokio::select! {
            () = &mut whole_life => break,
            message = one.message() => assert!(message.unwrap().is_some(), "the stream ended"),
            message = two.message() => assert!(message.unwrap().is_some(), "the stream ended"),
        }
    }
}

#[tokio::test] // Conformance check 60.
async fn an_event_names_its_task() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let (mut one, mut two) = (
        plugin.events().await.unwrap(),
        plugin.events().await.unwrap(),
    );
    // A client that does not read must not block the others.
    let _deaf = plugin.events().await.unwrap();
    let before = SystemTime::now();
    let task = host
        .start(&plugin, host.shell("exit 0").env("a=b", "x"))
        .await;
    for stream in [&mut one, &mut two] {
        let event = within("an event", stream.message()).await.unwrap().unwrap();
        assert_eq!(event.alloc_id, task.allocation.id());
        assert_eq!(
            (event.task_id.as_str(), event.task_name.as_str()),
            (task.id.as_str(), "web")
        );
        assert!(event.message.contains("\"a=b\""), "{}", event.message);
        assert!(SystemTime::try_from(event.timestamp.unwrap()).unwrap() >= before);
    }
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
}
