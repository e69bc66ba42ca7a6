//! What the command of a task gets: its arguments, its variables and its standard streams.

use serde_json::json;
use support::secrecy::{self, Marker};

use super::*;

#[rstest]
#[tokio::test]
async fn the_arguments_of_the_command_arrive_unchanged(world: impl World) {
    let plugin = world.plugin().await;
    let words = [
        "/bin/sh",
        "-c",
        "printf '[%s]\\n' \"$@\"",
        "sh",
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
    let task = world.start(&plugin, world.task(&words)).await;
    let want: String = words[4..]
        .iter()
        .map(|word| format!("[{word}]\n"))
        .collect();
    assert_eq!(task.finish(&plugin).await.said(), want);
    world.leave(plugin).await;
}

#[rstest] // Conformance check 71.
#[tokio::test]
async fn environment_values_arrive_unchanged(world: impl World) {
    let plugin = world.plugin().await;
    let values = [
        ("LINES2", "a\nb\n"),
        ("QUOTES", "it's \"so\" \\n $X"),
        ("EQUALS", "a=b=c"),
        ("OTHER", " ü ☃ "),
        ("EMPTY", ""),
    ];
    // Shells drop such names; a command executed directly has it.
    let dotted = world.task(&["env"]).env("with.dot", "x");
    let script =
        "for n in LINES2 QUOTES EQUALS OTHER EMPTY; do eval printf '%s=%s\\;' $n '\"$'$n'\"'; done";
    let job = values
        .iter()
        .fold(world.shell(script), |job, (name, value)| {
            job.env(name, value)
        });
    let task = world.start(&plugin, job).await;
    let want: String = values
        .iter()
        .map(|(name, value)| format!("{name}={value};"))
        .collect();
    assert_eq!(task.finish(&plugin).await.said(), want);
    let task = world.start(&plugin, dotted).await;
    let ended = task.finish(&plugin).await;
    assert!(
        ended.said().lines().any(|line| line == "with.dot=x"),
        "{ended:?}"
    );
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn the_environment_option_overrides_the_job_and_nomad(world: impl World) {
    let plugin = world.plugin().await;
    let job = world
        .shell("printf '%s\\n' \"$A\" \"$B\" \"$NOMAD_TASK_NAME\" \"$NOMAD_TASK_DIR\"")
        .env("A", "job")
        .env("B", "job's own = with\nlines")
        .with(
            "environment",
            json!([{ "A": "config", "NOMAD_TASK_NAME": "mine" }]),
        );
    let task = world.start(&plugin, job).await;
    assert_eq!(
        task.finish(&plugin).await.said(),
        "config\njob's own = with\nlines\nmine\n/local\n"
    );
    world.leave(plugin).await;
}

/// Variables of the job and of the config, while the task runs and after starts that fail. Every user of the host can read command lines.
#[rstest]
#[tokio::test]
async fn no_variable_is_in_a_command_line_a_record_or_a_log(
    world: impl World,
    #[values(false, true)] process_two: bool,
) {
    let marker = Marker::new();
    let since = secrecy::now();
    let launch = world.launch().set("NOMAD_LOG_LEVEL", "TRACE");
    let plugin = world.launched(launch, &json!({})).await;
    let secret = marker.secret("value");
    let job = || {
        world
            .shell("echo $A$B | wc -c; echo up; exec sleep 1000")
            .with("process_two", process_two)
            .env("A", &secret)
            .with("environment", json!([{ "B": secret.clone() }]))
    };
    let task = world.up(&plugin, job()).await;
    let length = format!("{}\n", 2 * secret.len() + 1);
    task.stdout.contains(&length).await;
    let nowhere = |when: &str| {
        assert_eq!(marker.in_command_lines(), [].into(), "{when}");
        let files = marker.in_files(&[(&world.state(), usize::MAX)], &[], since);
        assert_eq!(files, Vec::<std::path::PathBuf>::new(), "{when}");
    };
    // A process that is about to execute another program shows none for a moment.
    let has_them = || !marker.in_environments().is_empty();
    eventually("the payload's variables", has_them).await;
    nowhere("while it runs");
    marker.not_in("the handle", &task.state(&[]).to_string());
    task.destroy(&plugin).await;
    let empty = world.join("empty");
    std::fs::create_dir(&empty).unwrap();
    for job in [
        job().with("volatile", "maybe"),
        job().with("image", json!(empty)),
    ] {
        let status = refusal(world.try_start(&plugin, job).await);
        marker.not_in("the error", status.message());
        nowhere("after a start that failed");
    }
    marker.not_in("the plugin's log", &world.log().text().join("\n"));
    std::fs::remove_dir(empty).unwrap();
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn dev_stdout_can_be_opened_again_by_any_user_and_in_a_user_namespace(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let plugin = world.plugin().await;
    let text = "echo one; echo two > /dev/stdout; echo three > /dev/stderr; \
        su bob -c 'echo four > /dev/stdout; echo five > /dev/stderr'; echo six";
    for (users, process_two) in [(false, false), (false, true), (true, false), (true, true)] {
        let tree = world.tree(&format!("tree{users}{process_two}"));
        let job = world
            .shell(text)
            .with("image", json!(tree))
            .with("user_namespacing", users)
            .with("process_two", process_two);
        let ended = world.start(&plugin, job).await.finish(&plugin).await;
        let got = (ended.said(), &*ended.stderr);
        assert_eq!(
            got,
            ("one\ntwo\nfour\nsix\n", "three\nfive\n"),
            "{users} {process_two}"
        );
    }
    let job = world
        .shell("echo one > /dev/stdout; echo two > /dev/stderr")
        .with("user", "bob");
    let ended = world.start(&plugin, job).await.finish(&plugin).await;
    assert_eq!((ended.said(), &*ended.stderr), ("one\n", "two\n"));
    world.leave(plugin).await;
}
