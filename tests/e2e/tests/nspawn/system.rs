//! A complete system, booted.

use rstest::rstest;

use super::*;

/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_tree_boots_in_a_user_namespace_and_stops_cleanly() {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(
        &tree,
        "echo started >> /local/said; cat /proc/1/comm /proc/1/uid_map >> /local/said",
        "echo stopped >> /local/said",
    );
    let plugin = stage.plugin().await;
    let mut task = stage.words(&[]).with("image", json!(tree));
    // All other options keep their defaults.
    let config = task.spec.config.as_object_mut().unwrap();
    config.retain(|option, _| option == "image");
    let running = stage.start(&plugin, task).await;
    let said = running.allocation.task_dir().join("local/said");
    let read = || fs::read_to_string(&said).unwrap_or_default();
    tokio::task::block_in_place(|| {
        until("the unit's start", || {
            read().contains("65536\n").then_some(())
        })
    });
    assert!(read().starts_with("started\nsystemd\n"), "{}", read());
    let exit = running.stop(&plugin, AMPLE, "").await;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    assert!(read().ends_with("stopped\n"), "{}", read());
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// Boots a Debian tree with a unit whose stop command is `stop_by`, ends it with `end_it`, and returns the exit and what the unit has
/// written.
async fn shut_down(
    stop_by: &str,
    end_it: impl AsyncFnOnce(&Plugin, &Running) -> TaskExit,
) -> (i32, i32, String) {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(
        &tree,
        "echo started >> /local/said",
        &format!("echo stopping >> /local/said; {stop_by}"),
    );
    let plugin = stage.plugin().await;
    let task = stage.words(&[]).with("image", json!(tree));
    let task = task.with("boot", json!(true));
    let running = stage.start(&plugin, task).await;
    let said = running.allocation.task_dir().join("local/said");
    let read = || fs::read_to_string(&said).unwrap_or_default();
    tokio::task::block_in_place(|| {
        until("the unit's start", || (read() == "started\n").then_some(()))
    });
    let exit = end_it(&plugin, &running).await;
    let said = read();
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
    (exit.code, exit.signal, said)
}

/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_shutdown_is_killed_after_the_timeout() {
    let grace = Duration::from_secs(4);
    let ended = shut_down("sleep 600", async |plugin, running| {
        running.stop(plugin, grace, "").await
    });
    assert_eq!(ended.await, (137, 9, "started\nstopping\n".to_owned()));
}

/// The job's own signal replaces the signal for power-off: this one makes systemd re-execute itself. Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_init_gets_a_named_signal() {
    let ended = shut_down("true", async |plugin, running| {
        running
            .stop(plugin, Duration::from_secs(2), "SIGTERM")
            .await
    });
    assert_eq!(ended.await, (137, 9, "started\n".to_owned()));
}

/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_reaches_the_init() {
    let ended = shut_down("true", async |plugin, running| {
        running.signal(plugin, "SIGRTMIN+4").await.unwrap();
        running.wait(plugin).await
    });
    assert_eq!(ended.await, (0, 0, "started\nstopping\n".to_owned()));
}

/// systemd-nspawn reports the start while PID 1 is still systemd-nspawn's own child process, and the kernel drops signals to it that it has
/// no handler for. Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_right_after_the_start_reaches_the_init() {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(&tree, "true", "true");
    let plugin = stage.plugin().await;
    for signal in [None, Some("SIGRTMIN+4")] {
        let task = stage.words(&[]).with("image", json!(tree));
        let running = stage.start(&plugin, task.with("boot", json!(true))).await;
        let exit = match signal {
            None => running.stop(&plugin, AMPLE, "").await,
            Some(name) => {
                running.signal(&plugin, name).await.unwrap();
                running.wait(&plugin).await
            }
        };
        assert_eq!((exit.code, exit.signal), (0, 0), "{signal:?}: {exit:?}");
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: a real init, which makes and stores machine ids.
#[rstest]
#[case::an_id("11112222333344445555666677778888\n")]
#[case::empty("")]
#[case::first_boot("uninitialized\n")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_share_an_image_do_not_share_a_machine_id(#[case] of_image: &str) {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(
        &tree,
        "{ cat /etc/machine-id; systemctl is-failed systemd-machine-id-commit; echo end; } >> /local/said 2>&1",
        "true",
    );
    fs::remove_file(tree.join("etc/machine-id")).unwrap();
    fs::write(tree.join("etc/machine-id"), of_image).unwrap();
    let plugin = stage.plugin().await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let task = stage.words(&[]).with("image", json!(tree));
        let task = task.with("boot", true).with("ephemeral", true);
        let running = stage.start(&plugin, task).await;
        let said = running.allocation.task_dir().join("local/said");
        let said = tokio::task::block_in_place(|| {
            until("the unit's start", || {
                let text = fs::read_to_string(&said).unwrap_or_default();
                text.ends_with("end\n").then_some(text)
            })
        });
        let [id, "active" | "activating" | "inactive", "end"] =
            said.lines().collect::<Vec<_>>()[..]
        else {
            panic!("{said}");
        };
        let script = [
            "/bin/sh",
            "-c",
            "cat /etc/machine-id; tr '\\0' '\\n' </proc/1/environ | grep ^container_uuid=",
        ];
        let seen = plugin.exec(&running.id, &script, None).await.unwrap();
        let seen = String::from_utf8_lossy(&seen.stdout).replace('-', "");
        assert_eq!(seen, format!("{id}\ncontainer_uuid={id}\n"));
        ids.push(id.to_owned());
        let exit = running.stop(&plugin, AMPLE, "").await;
        assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
        running.destroy(&plugin).await;
    }
    assert_ne!(ids[0], ids[1]);
    assert!(!ids.contains(&of_image.trim().to_owned()), "{ids:?}");
    assert_eq!(
        fs::read_to_string(tree.join("etc/machine-id")).unwrap(),
        of_image
    );
    end(plugin).await;
    stage.leave();
}

/// systemd says "System cannot boot: Missing /etc/machine-id and /etc is mounted read-only", and goes on without a journal. Real only: a real
/// init.
#[rstest]
#[case::with_user_namespace("read_only", json!(true), true)]
#[case::without("read_only", json!(true), false)]
#[case::with_a_writable_var("volatile", json!("state"), true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_system_without_a_machine_id_boots(
    #[case] option: &str,
    #[case] value: Value,
    #[case] users: bool,
) {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(&tree, "true", "true");
    // It would make a directory in `/var`.
    symlink(
        "/dev/null",
        tree.join("etc/systemd/system/systemd-logind.service"),
    )
    .unwrap();
    for file in ["etc/machine-id", "var/lib/dbus/machine-id"] {
        fs::remove_file(tree.join(file)).unwrap();
    }
    let plugin = stage.plugin().await;
    let task = stage.words(&[]).with("image", json!(tree));
    let task = task
        .with("boot", true)
        .with("ready", "notify")
        .with("user_namespacing", users);
    let running = stage.start(&plugin, task.with(option, value)).await;
    let script = [
        "/bin/sh",
        "-c",
        "systemctl is-system-running; systemctl list-units --state=failed --plain --no-legend; \
         tr '\\0' '\\n' </proc/1/environ | sed -n s/container_uuid=//p; cat /etc/machine-id; \
         ls /run/log/journal",
    ];
    let seen = plugin.exec(&running.id, &script, None).await.unwrap();
    let seen = String::from_utf8_lossy(&seen.stdout).replace('-', "");
    let lines: Vec<_> = seen.lines().collect();
    let [state, id, file, journal] = lines[..] else {
        panic!("{seen}");
    };
    assert_eq!((state, file, journal), ("running", id, id), "{seen}");
    assert!(!tree.join("etc/machine-id").exists());
    running.stop(&plugin, AMPLE, "").await;
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}
