//! Many concurrent requests.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroy_during_a_recovery_ends_the_task() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    plugin.kill().await;
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), Failpoint::Recovering);
    let (line, stored) = (Arc::clone(&plugin), task.stored());
    let recover = tokio::spawn(async move { line.recover(stored).await });
    reached(&mut trap).await;
    let (line, id) = (Arc::clone(&plugin), task.id.clone());
    let destroy = tokio::spawn(async move { line.destroy(&id, true).await });
    // Sent after DestroyTask on the same connection.
    assert!(task.inspect(&plugin).await.is_ok());
    drop(trap);
    // The order of the two is not defined; both return, and the task is gone.
    let _ = within("RecoverTask", recover).await.unwrap();
    within("DestroyTask", destroy).await.unwrap().unwrap();
    nothing_left(&host, &plugin).await;
    assert!(within("WaitTask", plugin.wait(&task.id)).await.is_err());
}

#[tokio::test]
async fn three_plugins_can_share_a_state_directory() {
    let host = Host::new();
    let (one, two, three) = tokio::join!(host.plugin(), host.plugin(), host.plugin());
    let plugins = [one, two, three];
    let gate = host.join("gate");
    let start = async |index: usize| {
        let image = host.tree(&format!("tree{index}"));
        let task = host.shell(&gated(&gate)).named(&format!("web{index}"));
        host.up(&plugins[index], task.with("image", json!(image)))
            .await
    };
    let tasks = <[Running; 3]>::from(tokio::join!(start(0), start(1), start(2)));
    for plugin in &plugins {
        for task in &tasks {
            within("RecoverTask", plugin.recover(task.stored()))
                .await
                .unwrap();
        }
    }
    fs::write(&gate, "").unwrap();
    for plugin in &plugins {
        for task in &tasks {
            assert_eq!(task.wait(plugin).await.code, 5);
        }
    }
    for plugin in &plugins {
        for task in &tasks {
            task.destroy(plugin).await;
        }
    }
    let pids = plugins.each_ref().map(Plugin::pid);
    host.quiet(&pids).await;
    assert_eq!(fs::read_dir(host.state()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_starts_at_once() {
    const MANY: usize = 200;
    let host = Arc::new(Host::new());
    let plugin = Arc::new(host.plugin().await);
    let lives = (0..MANY).map(|index| {
        let (host, plugin) = (Arc::clone(&host), Arc::clone(&plugin));
        tokio::spawn(async move {
            let task = host
                .shell(&format!("echo {index}; exit {}", index % 100))
                .named(&format!("t{index}"))
                .with("ephemeral", json!(true));
            let task = host.start(&plugin, task).await;
            let exit = task.wait(&plugin).await;
            assert_eq!(
                (exit.code, exit.error),
                (i32::try_from(index % 100).unwrap(), None)
            );
            assert_eq!(task.stdout.all().await, format!("{index}\n"));
            task.destroy(&plugin).await;
        })
    });
    for life in lives.collect::<Vec<_>>() {
        life.await.unwrap();
    }
    assert_eq!(host.starts().len(), MANY);
    nothing_left(&host, &plugin).await;
}
