//! What a booted system prints is in the logs of its task. Real only: journald writes the files.

use rstest::rstest;

use super::*;

fn count(text: &str, word: &str) -> usize {
    text.matches(word).count()
}

/// Starts the task, waits until `last` is in its log, stops it, and returns what it has printed.
async fn run(stage: &Stage, plugin: &Plugin, task: Task, last: &str) -> (String, String) {
    let running = stage.start(plugin, task).await;
    running.stdout.contains(last).await;
    let exit = running.stop(plugin, AMPLE, "").await;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    let printed = (running.stdout.all().await, running.stderr.all().await);
    running.destroy(plugin).await;
    printed
}

#[rstest]
#[case::persistent("var/log/journal", true)]
#[case::volatile("var/log/journal", false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_a_unit_is_in_the_log_once(#[case] journal: &str, #[case] persistent: bool) {
    let stage = Stage::new();
    let start =
        "echo hello-from-unit; logger -p 3 bad-news; for i in 1 2 3; do echo line-$i-; done";
    let tree = debian_tree(&stage, start, "echo goodbye");
    match persistent {
        true => fs::create_dir_all(tree.join(journal)).unwrap(),
        false => fs::remove_dir_all(tree.join(journal)).unwrap(),
    }
    let plugin = stage.plugin().await;
    for ids in [true, false] {
        let task = booted(&stage, &tree).with("user_namespacing", ids);
        let (out, err) = run(&stage, &plugin, task, "line-3-").await;
        for word in [
            "hello-from-unit",
            "line-1-",
            "line-2-",
            "line-3-",
            ": goodbye\n",
        ] {
            assert_eq!(count(&out, word), 1, "{word}: {out}");
        }
        assert!(err.contains("bad-news"), "{err}");
        assert!(!out.contains("bad-news"), "{out}");
        // The first words of PID 1, before there was a journal, and the last ones.
        assert_eq!(count(&out, "Welcome to Debian"), 1, "{out}");
        assert!(out.contains("Powering off.\n"), "{out}");
        for unwanted in ["\r", "\x1b", "login:"] {
            assert!(!out.contains(unwanted), "{out}");
        }
        assert_eq!(count(&out, "Started e2e.service"), 0, "{out}");
        assert_eq!(count(&out, "Finished e2e.service"), 1, "{out}");
    }
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_have_the_format_that_the_job_asks_for() {
    let stage = Stage::new();
    let tree = debian_tree(&stage, "echo hello-from-unit", "true");
    let plugin = stage.plugin().await;
    let task = booted(&stage, &tree).with("journal_format", "cat");
    let (out, _) = run(&stage, &plugin, task, "hello-from-unit").await;
    assert!(out.contains("\nhello-from-unit\n"), "{out}");
    let task = booted(&stage, &tree).with("journal_format", "json");
    let (out, _) = run(&stage, &plugin, task, "hello-from-unit").await;
    let line = out
        .lines()
        .find(|line| line.contains("hello-from-unit"))
        .unwrap();
    let entry: Value = serde_json::from_str(line).unwrap();
    let of = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    assert_eq!(of("MESSAGE"), "hello-from-unit");
    assert_eq!(of("_SYSTEMD_UNIT"), "e2e.service");
    assert_eq!(of("PRIORITY"), "6");
    let task = booted(&stage, &tree).with("journal_units", json!(["e2e"]));
    let (out, _) = run(&stage, &plugin, task, "hello-from-unit").await;
    assert!(out.contains("e2e.service"), "{out}");
    assert!(!out.contains("dbus"), "{out}");
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_journal_only_the_console_is_in_the_log() {
    let stage = Stage::new();
    let tree = debian_tree(&stage, "echo hello-from-unit", "true");
    let plugin = stage.plugin().await;
    let task = booted(&stage, &tree).with("journal", false);
    let (out, _) = run(&stage, &plugin, task, "Finished e2e.service").await;
    assert!(!out.contains("hello-from-unit"), "{out}");
    assert!(out.contains("[  OK  ]"), "{out}");
    end(plugin).await;
    stage.leave();
}

/// What systemd says before it ends is the only reason there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_words_of_an_init_are_in_the_log() {
    let stage = Stage::new();
    let tree = debian_tree(&stage, "true", "true");
    let init = tree.join("usr/lib/systemd/systemd");
    fs::remove_file(&init).unwrap();
    fs::write(&init, "#!/bin/sh\necho last words >/dev/console; exit 9\n").unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let plugin = stage.plugin().await;
    let running = stage.start(&plugin, booted(&stage, &tree)).await;
    let exit = running.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal), (9, 0), "{exit:?}");
    assert_eq!(running.stdout.all().await, "last words\n");
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// The supervisor reads the journal, so a plugin that is killed or replaced changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_while_plugins_come_and_go() {
    const LINES: usize = 400;
    let stage = Stage::new();
    let start = format!("for i in $(seq {LINES}); do echo line-$i-; sleep 0.005; done");
    let tree = debian_tree(&stage, "true", "true");
    let unit = format!("[Service]\nType=simple\nExecStart=/bin/sh -c \"{start}\"\n");
    fs::write(
        tree.join("etc/systemd/system/e2e.service"),
        unit.replace('$', "$$"),
    )
    .unwrap();
    let mut plugin = stage.plugin().await;
    let running = stage.start(&plugin, booted(&stage, &tree)).await;
    for _ in 0..3 {
        plugin.kill().await;
        plugin = stage.recovered(&running).await;
    }
    let last = format!("line-{LINES}-");
    running.stdout.contains(&last).await;
    // Rotated meanwhile, and read to the end.
    let rotate = ["/bin/journalctl", "--rotate"];
    plugin.exec(&running.id, &rotate, None).await.unwrap();
    let say = ["/bin/sh", "-c", "echo after-the-rotation | systemd-cat"];
    plugin.exec(&running.id, &say, None).await.unwrap();
    running.stop(&plugin, AMPLE, "").await;
    let out = running.stdout.all().await;
    for line in 1..=LINES {
        assert_eq!(count(&out, &format!("line-{line}-")), 1, "{line}: {out}");
    }
    assert_eq!(count(&out, "after-the-rotation"), 1, "{out}");
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}
