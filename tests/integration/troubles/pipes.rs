//! Pipes without a reader.

use super::*;

#[tokio::test]
async fn a_log_pipe_without_a_reader_fails_the_start_with_a_reason() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exit 5"));
    let config = plugin.task_config(&allocation).await.unwrap();
    let status = refusal(within("StartTask", plugin.start(config)).await);
    let why = "no process has opened it for reading";
    assert!(status.message().contains(why), "{status:?}");
    assert!(host.starts().is_empty());
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_late_reader_gets_everything() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let allocation = host.allocation(host.shell("echo said; exit 5"));
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(&plugin));
    let start = tokio::spawn(async move { line.start(config).await });
    // A second thread of the supervisor blocks in the kernel until the reader opens the FIFO.
    let supervise = format!("supervise {}", host.state().display());
    eventually("a supervisor that waits for a reader", || {
        let found = host.processes();
        let found = found.iter().find(|one| one.command.contains(&supervise));
        found.is_some_and(|one| {
            fs::read_dir(format!("/proc/{}/task", one.pid)).is_ok_and(|all| all.count() == 2)
        })
    })
    .await;
    let logs = allocation.open_logs().unwrap();
    within("StartTask", start).await.unwrap().unwrap();
    assert_eq!(within("WaitTask", plugin.wait(&id)).await.unwrap().code, 5);
    let mut said = String::new();
    let mut stdout = logs.stdout;
    let read = tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut said);
    within("the output", read).await.unwrap();
    assert_eq!(said, "said\n");
    within("DestroyTask", plugin.destroy(&id, false))
        .await
        .unwrap();
    nothing_left(&host, &plugin).await;
}

#[rstest]
#[case::stopped(true)]
#[case::destroyed(false)]
#[tokio::test]
async fn a_stuck_reader_blocks_only_its_own_task(#[case] stopped: bool) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exec cat /dev/zero"));
    // Opened, and never read.
    let _logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let id = config.id.clone();
    within("StartTask", plugin.start(config)).await.unwrap();
    let pipe = fs::File::options()
        .write(true)
        .open(allocation.stdout_path());
    let pipe = pipe.unwrap();
    let full = || {
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        poll(&mut ready, PollTimeout::ZERO).unwrap() == 0
    };
    eventually("a full pipe", full).await;
    let other = host
        .shell("echo said; exit 5")
        .with("image", json!(host.tree("other")));
    let other = host.start(&plugin, other).await;
    assert_eq!(other.wait(&plugin).await.code, 5);
    other.destroy(&plugin).await;
    if stopped {
        within("StopTask", plugin.stop(&id, Duration::ZERO, ""))
            .await
            .unwrap();
        let exit = within("WaitTask", plugin.wait(&id)).await.unwrap();
        assert_eq!((exit.code, exit.signal), (137, 9));
    }
    within("DestroyTask", plugin.destroy(&id, true))
        .await
        .unwrap();
    nothing_left(&host, &plugin).await;
}
