//! Calls to the plugin, and processes and cgroups on this host.

use super::*;

pub(super) async fn attach<W: World>(world: &W, process: &Plugin) -> Arc<Plugin> {
    within("the agent's connection", async {
        let line = Plugin::reattach(process.address(), process.pid())
            .await
            .unwrap();
        line.configure(&world.config()).await.unwrap();
        Arc::new(line)
    })
    .await
}

pub(super) async fn signal(line: &Plugin, task_id: String) -> Result<(), HostError> {
    let request = SignalTaskRequest {
        task_id,
        signal: "SIGUSR1".to_owned(),
    };
    let answer = line.driver().signal_task(request).await;
    answer.map(drop).map_err(|status| HostError::Call {
        method: "SignalTask",
        status: Box::new(status),
    })
}

/// Cancels a call that must not have returned; its connection is closed with it.
pub(super) async fn hang_up<T: std::fmt::Debug>(call: Call<T>) {
    hang_up_or(call, |answer| {
        panic!("it was answered before the agent died: {answer:?}")
    })
    .await;
}

/// The same for a call that may already have returned in this way.
pub(super) async fn hang_up_or<T>(call: Call<T>, answered: impl FnOnce(Result<T, HostError>)) {
    call.abort();
    match call.await {
        Ok(answer) => answered(answer),
        Err(error) => assert!(error.is_cancelled(), "{error}"),
    }
}

pub(super) fn own_end(exit: &TaskExit) {
    assert_eq!(
        (exit.code, exit.signal, exit.oom_killed, &exit.error),
        (CODE, 0, false, &None),
        "{exit:?}"
    );
}

/// The same for a task that was killed for its memory.
pub(super) fn out_of_memory(exit: &TaskExit) {
    assert_eq!(
        (exit.code, exit.signal, exit.oom_killed, &exit.error),
        (137, 9, true, &None),
        "{exit:?}"
    );
}

/// Kills a process and waits until it is dead.
pub(super) fn strike(pid: i32) {
    let held = ProcessHandle::open(pid).unwrap();
    held.signal(Signal::KILL).unwrap();
    assert!(held.wait(DEADLINE), "it does not die");
}

/// Whether a process exists and is not a zombie.
pub(super) fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Whether a process runs the driver's own init.
pub(super) fn is_our_program(pid: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.to_string_lossy().contains("nspawn-init"))
}

/// Whether the driver can limit the memory of a task here.
pub(super) fn limits_memory() -> bool {
    let controllers = Layout::of_this_host().usable_controllers();
    nix::unistd::geteuid().is_root() && controllers.contains("memory")
}

/// The limits of a task, by the driver state in its handle.
pub(super) fn limits_of(started: &StartedTask) -> Dump {
    let state: serde_json::Value = serde_json::from_slice(&started.handle.driver_state).unwrap();
    let started = &state["started"];
    let path = |group: &serde_json::Value| group.as_str().map(PathBuf::from);
    let own = path(&started["cgroup"]);
    let payload = own.as_ref().map(|group| group.join("payload"));
    let controllers = started["controllers"].as_object().into_iter().flatten();
    let controllers = controllers.filter_map(|(_, group)| path(group));
    Dump::of(own.into_iter().chain(payload).chain(controllers))
}

/// The supervisor of a start with its task directory below this state directory.
pub(super) fn supervisor_below(state: &Path) -> Option<i32> {
    let below = format!("{}/", state.display());
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let mut words = line.split(|byte| *byte == 0).skip(1);
            (words.next()? == b"supervise" && words.next()?.starts_with(below.as_bytes()))
                .then_some(pid)
        })
}

/// Collects the task's output from now on, as Nomad does.
pub(super) fn collect(allocation: &Allocation) -> watch::Receiver<String> {
    let (sender, printed) = watch::channel(String::new());
    for fifo in [allocation.stdout_path(), allocation.stderr_path()] {
        // Opened for writing too, so that there is no end of file between one writer and the next.
        let mut pipe = tokio::net::unix::pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(fifo)
            .unwrap();
        let sender = sender.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                sender.send_modify(|all| all.push_str(&text));
            }
        });
    }
    printed
}
