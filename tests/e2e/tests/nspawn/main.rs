//! Tier (a): the real plugin binary and the real systemd-nspawn. Every option has the effect that `docs/configuration.md` describes, and
//! nothing is lost or left if the plugin dies. Each test gives the reason why the fake is not sufficient.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use dev_agent::{Plugin, TaskExit};
use e2e::stage::{Namespace, Running, Stage, end, within};
use e2e::{debian, until};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::{Value, json};

mod ends;
mod network;
mod root;
mod system;
mod users;

/// More time than any task needs that exits on request.
const AMPLE: Duration = Duration::from_secs(30);

/// The same small tree with everything below `/usr`, as systemd requires it.
fn merged_tree(stage: &Stage, name: &str) -> PathBuf {
    let tree = stage.tree(name);
    fs::remove_dir(tree.join("usr/bin")).unwrap();
    fs::rename(tree.join("bin"), tree.join("usr/bin")).unwrap();
    symlink("usr/bin", tree.join("bin")).unwrap();
    tree
}

fn bind(source: &Path, target: &str) -> Value {
    json!([{ (source.to_str().unwrap()): target }])
}

/// systemd-nspawn without the driver, to distinguish limits of this machine from errors of the driver.
fn bare(words: &[&str]) -> Output {
    // Two containers in one cgroup would share its child cgroups, so this one gets a cgroup of its own.
    let group = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(Path::new)
        .into_iter()
        .find(|mount| mount.join("cgroup.procs").exists())
        .expect("control groups of version 2")
        .join(format!("bare{}", e2e::unique()));
    fs::create_dir(&group).unwrap();
    let output = Command::new("sh")
        .args(["-c", "echo $$ > \"$0\"/cgroup.procs; exec \"$@\""])
        .arg(&group)
        .args([
            "systemd-nspawn",
            "--settings=no",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
        ])
        .args(words)
        .output()
        .unwrap();
    let named = Path::new("/sys/fs/cgroup/systemd").join(group.file_name().unwrap());
    for group in [group, named] {
        for below in ["payload", "supervisor", ""] {
            let _ = fs::remove_dir(group.join(below));
        }
        assert!(!group.exists(), "{} is left", group.display());
    }
    output
}

// Arguments, streams, processes.

/// Real only: the test is about the real parser's rules for quoting and specifiers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_words_of_the_command_arrive_unchanged() {
    let stage = Stage::new();
    let words = [
        "/bin/printf",
        "[%s]\n",
        "--help",
        "-D",
        "a b",
        "\"'`",
        "$HOME $(x) %n %%",
        "",
        "*",
        "ä\nb",
        "\\",
        "--",
    ];
    let ended = stage.run(stage.words(&words)).await;
    let want: String = words[2..]
        .iter()
        .map(|word| format!("[{word}]\n"))
        .collect();
    assert_eq!(ended.said(), want);
    stage.leave();
}

/// Real only: a pseudo terminal of systemd-nspawn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_console_pipe_keeps_the_streams_apart_and_unchanged() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "echo out; echo err >&2; test -t 1 && echo terminal; exit 3";
    for console in [None, Some("pipe"), Some("autopipe")] {
        let mut task = stage.shell(text);
        if let Some(console) = console {
            task = task.with("console", console);
        }
        let ended = stage.run_on(&plugin, task).await;
        let got = (&*ended.stdout, &*ended.stderr, ended.exit.code);
        assert_eq!(got, ("out\n", "err\n", 3), "{console:?}");
    }
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("console", "read-only"))
        .await;
    for word in ["out\r\n", "err\r\n", "terminal\r\n"] {
        assert!(ended.stdout.contains(word), "{ended:?}");
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: in a pid namespace orphans become children of PID 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_two_runs_below_an_init_that_reaps() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    assert_eq!(
        stage.run_on(&plugin, stage.shell("echo $$")).await.said(),
        "1\n"
    );
    let text = "echo $$; (sh -c 'echo $PPID > /tmp/parent; sleep 0.01' &); \
        until test -s /tmp/parent; do sleep 0.01; done; \
        while pgrep sleep >/dev/null; do sleep 0.02; done; exit 5";
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("process_two", true))
        .await;
    assert_eq!((&*ended.stdout, ended.exit.code), ("2\n", 5), "{ended:?}");
    end(plugin).await;
    stage.leave();
}

/// Real only: users are looked up in a real root, and switching to them needs root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_runs_as_the_user_of_the_config_or_of_the_task() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = || stage.words(&["/bin/id", "-un"]);
    let tasks = [
        (task(), "root\n"),
        (task().with("user", "bob"), "bob\n"),
        (task().user("bob"), "bob\n"),
        (task().user("bob").with("user", "root"), "root\n"),
    ];
    for (task, want) in tasks {
        assert_eq!(stage.run_on(&plugin, task).await.said(), want);
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: the directory is in the container's own root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_working_directory_is_where_the_command_starts() {
    let stage = Stage::new();
    let task = stage.words(&["/bin/pwd"]).with("working_directory", "/srv");
    assert_eq!(stage.run(task).await.said(), "/srv\n");
    stage.leave();
}

/// Real only: systemd-nspawn adds variables of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_of_the_config_wins_over_the_job_and_over_nomad() {
    let stage = Stage::new();
    let task = stage
        .shell("printf '%s\\n' \"$A\" \"$B\" \"$NOMAD_TASK_NAME\" \"$NOMAD_TASK_DIR\"")
        .env("A", "job")
        .env("B", "job's own = with\nlines")
        .with(
            "environment",
            json!([{ "A": "config", "NOMAD_TASK_NAME": "mine" }]),
        );
    assert_eq!(
        stage.run(task).await.said(),
        "config\njob's own = with\nlines\nmine\n/local\n"
    );
    stage.leave();
}

/// Every user on the host can read command lines. Real only: systemd-nspawn's helpers have command lines too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_value_of_the_environment_stands_in_a_command_line() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let secret = format!("secret{}", e2e::unique());
    for process_two in [false, true] {
        let task = stage
            .shell("trap 'exit 0' TERM; echo $A$B | wc -c; while :; do sleep 0.05; done")
            .env("A", &secret)
            .with("environment", json!([{ "B": secret }]))
            .with("process_two", process_two);
        let running = stage.start(&plugin, task).await;
        running
            .stdout
            .contains(&format!("{}\n", 2 * secret.len() + 1))
            .await;
        let mut looked = 0;
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(bytes) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let text = String::from_utf8_lossy(&bytes);
            looked += usize::from(text.contains("systemd-nspawn") && text.contains(stage.name()));
            assert!(!text.contains(&secret), "{text:?}");
        }
        assert!(looked > 0, "systemd-nspawn was not seen");
        assert_eq!(running.stop(&plugin, AMPLE, "SIGTERM").await.code, 0);
        running.destroy(&plugin).await;
    }
    assert!(!stage.log().contains(&secret), "it was logged");
    end(plugin).await;
    stage.leave();
}

// Logs.

/// Real only: users, and the container's own `/dev`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_stdout_can_be_opened_again_by_any_user_and_in_a_user_namespace() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "echo one; echo two > /dev/stdout; echo three > /dev/stderr; \
        su bob -c 'echo four > /dev/stdout; echo five > /dev/stderr'; echo six";
    for (users, process_two) in [(false, false), (false, true), (true, false), (true, true)] {
        let task = stage
            .shell(text)
            .with(
                "image",
                json!(stage.tree(&format!("tree{users}{process_two}"))),
            )
            .with("user_namespacing", users)
            .with("process_two", process_two);
        let ended = stage.run_on(&plugin, task).await;
        let got = (ended.said(), &*ended.stderr);
        assert_eq!(
            got,
            ("one\ntwo\nfour\nsix\n", "three\nfive\n"),
            "{users} {process_two}"
        );
    }
    let task = stage
        .shell("echo one > /dev/stdout; echo two > /dev/stderr")
        .with("user", "bob");
    let ended = stage.run_on(&plugin, task).await;
    assert_eq!((ended.said(), &*ended.stderr), ("one\n", "two\n"));
    end(plugin).await;
    stage.leave();
}

// The plugin dies.

/// Real only: the test is about systemd-nspawn's handling of a pipe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_writes_on_while_the_plugin_is_killed_and_found_by_the_next() {
    let stage = Stage::new();
    let mut plugin = stage.plugin().await;
    let text = "trap 'echo last; exit 23' TERM; i=0; while :; do i=$((i+1)); echo line-$i-; usleep 500; done";
    let running = stage.start(&plugin, stage.shell(text)).await;
    running.stdout.contains("line-50-\n").await;
    plugin.kill().await;
    running.stdout.contains("line-500-\n").await;
    let plugin = stage.plugin().await;
    within(
        "RecoverTask",
        plugin.recover(running.started.handle.clone()),
    )
    .await
    .unwrap();
    running.stdout.contains("line-1000-\n").await;
    let leader = running.leader();
    assert!(
        Path::new(&format!("/proc/{leader}")).exists(),
        "another process"
    );
    let exit = running.stop(&plugin, AMPLE, "SIGTERM").await;
    assert_eq!((exit.code, exit.signal, exit.error), (23, 0, None));
    let all = running.stdout.all().await;
    let mut lines = all.lines();
    assert_eq!(lines.next_back(), Some("last"));
    for (number, line) in (1..).zip(lines) {
        assert_eq!(line, format!("line-{number}-"));
    }
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// Real only: the exit code is passed on by systemd-nspawn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_ended_without_a_plugin_has_its_true_exit_code() {
    let stage = Stage::new();
    let mut plugin = stage.plugin().await;
    let task =
        stage.shell("echo up; until test -e /local/go; do sleep 0.02; done; echo bye; exit 42");
    let running = stage.start(&plugin, task).await;
    running.stdout.contains("up").await;
    plugin.kill().await;
    fs::write(running.allocation.task_dir().join("local/go"), "").unwrap();
    assert_eq!(running.stdout.all().await, "up\nbye\n");
    let plugin = stage.plugin().await;
    within(
        "RecoverTask",
        plugin.recover(running.started.handle.clone()),
    )
    .await
    .unwrap();
    let exit = running.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (42, 0, None));
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}
