//! `ready = "notify"`: a task has started when it says so. Real only: systemd-nspawn passes on what the system says, and mounts the socket of a
//! command.

use rstest::rstest;

use super::*;

/// A Debian tree whose system is ready only after the unit `slow.service` has done this.
fn slow_tree(stage: &Stage, does: &str) -> PathBuf {
    let tree = debian_tree(stage, "true", "true");
    let units = tree.join("etc/systemd/system");
    let unit = format!(
        "[Unit]\nDescription=the slow one\nBefore=multi-user.target\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c '{does}'\n"
    );
    fs::write(units.join("slow.service"), unit).unwrap();
    symlink(
        "../slow.service",
        units.join("multi-user.target.wants/slow.service"),
    )
    .unwrap();
    tree
}

fn notifies(task: Task, limit: &str) -> Task {
    task.with("ready", "notify").with("ready_timeout", limit)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_has_started_when_its_units_have() {
    let stage = Stage::new();
    let tree = slow_tree(&stage, "sleep 7; touch /local/done; echo slow-is-done");
    let plugin = stage.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let task = booted(&stage, &tree);
    let running = stage.start(&plugin, notifies(task, "40s")).await;
    assert!(running.allocation.task_dir().join("local/done").exists());
    running.stdout.contains("slow-is-done").await;
    let note = next_event(&mut events).await.unwrap();
    assert!(
        note.starts_with("the task is not ready after 5 s. The last it said: ")
            && note.contains("slow"),
        "{note:?}"
    );
    let exit = running.stop(&plugin, AMPLE, "").await;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_units_of_a_system_that_is_ready_are_an_event() {
    let stage = Stage::new();
    let tree = slow_tree(&stage, "exit 3");
    let plugin = stage.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let task = booted(&stage, &tree);
    let running = stage.start(&plugin, notifies(task, "40s")).await;
    let note = next_event(&mut events).await.unwrap();
    assert_eq!(
        note,
        "the system is up, and these units have failed: slow.service"
    );
    running.stop(&plugin, AMPLE, "").await;
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// Also of a task that has started before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn units_that_the_job_names_and_the_system_does_not_have_are_an_event() {
    let stage = Stage::new();
    let tree = slow_tree(&stage, "exit 3");
    let plugin = stage.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let task =
        booted(&stage, &tree).with("journal_units", json!(["slow", "nginx", "getty@x.service"]));
    let running = stage.start(&plugin, task).await;
    let mut notes = Vec::new();
    for _ in 0..2 {
        notes.push(next_event(&mut events).await.unwrap());
    }
    let expected = [
        "the system is up, and these units have failed: slow.service",
        "config.journal_units: the system has no units with these names: nginx.service",
    ];
    assert_eq!(notes, expected);
    running.stop(&plugin, AMPLE, "").await;
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_that_is_not_ready_in_time_has_not_started() {
    let stage = Stage::new();
    let tree = slow_tree(&stage, "sleep 600");
    let plugin = stage.plugin().await;
    let task = booted(&stage, &tree);
    let error = stage.refused(&plugin, notifies(task, "6s")).await;
    let expected = "the task was not ready within 6 s (config.ready_timeout). The last it said: ";
    assert!(
        error.contains(expected) && error.contains("slow"),
        "{error}"
    );
    end(plugin).await;
    stage.leave();
}

/// As root of the host, as root of a user namespace, as another user, and below an init.
#[rstest]
#[case(&[])]
#[case(&[("user_namespacing", true)])]
#[case(&[("process_two", true)])]
#[case(&[("process_two", true), ("user_namespacing", true)])]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_started_when_it_says_so(#[case] options: &[(&str, bool)]) {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy_tree(&debian::tree(), &tree);
    let plugin = stage.plugin().await;
    for user in ["root", "www-data"] {
        let text = "sleep 1; echo said; systemd-notify --status=hello --ready; exec sleep 1000";
        let mut task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("user", user);
        for (option, on) in options {
            task = task.with(option, *on);
        }
        let running = stage.start(&plugin, notifies(task, "30s")).await;
        running.stdout.contains("said").await;
        running.stop(&plugin, AMPLE, "SIGKILL").await;
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_never_says_so_has_not_started() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = notifies(stage.shell("exec sleep 1000"), "500ms");
    let error = stage.refused(&plugin, task).await;
    let expected = "the task was not ready within 0.5 s (config.ready_timeout)";
    assert!(error.contains(expected), "{error}");
    let task = notifies(stage.shell("exit 7"), "30s");
    let error = stage.refused(&plugin, task).await;
    let expected = "the task has ended before it was ready, with exit code 7";
    assert!(error.contains(expected), "{error}");
    end(plugin).await;
    stage.leave();
}

/// Nomad asks for the start again, so the first one must not go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_whose_plugin_dies_before_the_task_is_ready_is_undone() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = notifies(stage.shell("echo up; exec sleep 1000"), "5s");
    let allocation = stage.allocation(&task);
    let pid = plugin.pid();
    let start = stage.start_in(&plugin, &task, std::sync::Arc::clone(&allocation));
    let killed = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
    };
    let (started, ()) = tokio::join!(start, killed);
    assert!(started.is_err());
    drop(plugin);
    let up = || {
        stage
            .marks()
            .processes()
            .iter()
            .filter(|one| one.command.contains("sleep 1000"))
            .count()
    };
    tokio::task::block_in_place(|| until("the end of the container", || (up() == 0).then_some(())));
    let plugin = stage.plugin().await;
    let again = stage.start_in(&plugin, &task, allocation).await;
    let error = again.map(|_| ()).unwrap_err().error.to_string();
    assert!(error.contains("was not ready within 5 s"), "{error}");
    end(plugin).await;
    stage.leave();
}
