//! `nomad-driver-nspawn exec`: commands in a running task as a person runs them, found in the state directory.

use std::process::{Output, Stdio};
use std::sync::Arc;

use serde_json::json;
use support::Sleep;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use super::exec::{done, running};
use super::*;

/// The exit code of an `exec` that has run no command or does not know its end.
const FAILED: i32 = 125;

/// `exec` with these options, ID and command. Its input is empty.
fn exec(world: &impl World, words: &[&str]) -> Command {
    let mut command = Command::new(world.launch().binary);
    command
        .args(["exec", "--state-dir"])
        .arg(world.state())
        .args(words)
        .current_dir(world.path())
        .env_remove("NOMAD_PLUGIN_MAGIC_COOKIE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// The same with a shell script as the command.
fn shell(world: &impl World, options: &[&str], id: &str, script: &str) -> Command {
    let command = ["--", "/bin/sh", "-c", script];
    exec(world, &[options, &[id], &command].concat())
}

async fn output(mut command: Command) -> Output {
    within("exec", command.output()).await.unwrap()
}

async fn finish(child: Child) -> Output {
    within("the end of exec", child.wait_with_output())
        .await
        .unwrap()
}

/// The outcome as (stdout, stderr, exit code).
fn seen(output: &Output) -> (&str, &str, Option<i32>) {
    let text = |bytes| std::str::from_utf8(bytes).unwrap();
    (
        text(&output.stdout),
        text(&output.stderr),
        output.status.code(),
    )
}

/// Checks that no command was run, or that its end is not known, for a reason with these words.
#[track_caller]
fn failed(output: &Output, words: &[&str]) {
    let (stdout, stderr, code) = seen(output);
    assert_eq!((stdout, code), ("", Some(FAILED)), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no {word}: {stderr}");
    }
}

/// Reads its stdout until it has printed this line.
async fn prints(child: &mut Child, line: &str) {
    let mut printed = vec![0; line.len()];
    let read = child.stdout.as_mut().unwrap().read_exact(&mut printed);
    within(line, read).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&printed), line);
}

#[rstest]
#[tokio::test]
async fn a_command_has_the_streams_and_the_exit_code_of_exec(world: impl World) {
    let (plugin, task) = running(&world).await;
    for (script, wanted) in [
        ("echo out; echo err >&2; exit 43", ("out\n", "err\n", 43)),
        ("exit 0", ("", "", 0)),
        ("exit 255", ("", "", 255)),
        ("kill -USR1 $$", ("", "", 128 + 10)),
        ("cat; echo end", ("end\n", "", 0)),
        ("(sleep 0.3; echo late) & exit 3", ("late\n", "", 3)),
        ("test -t 0 || echo no terminal", ("no terminal\n", "", 0)),
    ] {
        let output = output(shell(&world, &[], &task.id, script)).await;
        let (stdout, stderr, code) = wanted;
        assert_eq!(seen(&output), (stdout, stderr, Some(code)), "{script}");
    }
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn input_reaches_the_command_and_ends(world: impl World) {
    let (plugin, task) = running(&world).await;
    let script = "echo up; read line; echo got $line; cat; echo end; exit 7";
    let mut command = shell(&world, &[], &task.id, script);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Output arrives while the input is still open.
    prints(&mut child, "up\n").await;
    stdin.write_all(b"one\n").await.unwrap();
    prints(&mut child, "got one\n").await;
    stdin.write_all(b"two\n").await.unwrap();
    drop(stdin);
    assert_eq!(seen(&finish(child).await), ("two\nend\n", "", Some(7)));
    done(world, plugin, task).await;
}

/// As in `exec ID -- yes | head`; the other stream stays open.
#[rstest]
#[case::output(false)]
#[case::errors(true)]
#[tokio::test]
async fn a_command_whose_output_nobody_reads_gets_sigpipe(world: impl World, #[case] errors: bool) {
    let (plugin, task) = running(&world).await;
    let stream = if errors { ">&2" } else { "" };
    let script = format!("echo up; while echo on {stream}; do :; done; exit 9");
    let mut child = shell(&world, &[], &task.id, &script).spawn().unwrap();
    prints(&mut child, "up\n").await;
    match errors {
        true => drop(child.stderr.take()),
        false => drop(child.stdout.take()),
    }
    assert_eq!(finish(child).await.status.code(), Some(128 + 13));
    done(world, plugin, task).await;
}

/// As much in both directions at once as fills every buffer on the way many times.
#[rstest]
#[tokio::test]
async fn much_data_passes_unchanged(world: impl World) {
    const TOTAL: usize = 16 << 20;
    let (plugin, task) = running(&world).await;
    let data: Vec<u8> = (0..=250).cycle().take(TOTAL).collect();
    let mut command = shell(&world, &[], &task.id, "exec cat");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = data.clone();
    let sending = tokio::spawn(async move { stdin.write_all(&input).await });
    let output = finish(child).await;
    sending.await.unwrap().unwrap();
    assert!(output.status.success(), "{}", seen(&output).1);
    assert!(output.stdout == data, "{} bytes", output.stdout.len());
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn directory_and_variables_can_be_chosen(world: impl World) {
    let (plugin, task) = running(&world).await;
    let show = "echo $OF_THE_JOB; echo $NEW; echo $GIVEN; echo ${NOT_GIVEN-none}";
    let with = async |options: &[&str], script| {
        let mut command = shell(&world, options, &task.id, script);
        command.env("GIVEN", "a b=c").env("NOT_GIVEN", "x");
        output(command).await
    };
    let plain = with(&[], show).await;
    assert_eq!(seen(&plain), ("its value\n\n\nnone\n", "", Some(0)));
    let options = [
        "--environment=OF_THE_JOB=another",
        "--environment",
        "NEW=x=y",
        "-e",
        "GIVEN",
        "--directory",
        "/usr",
    ];
    let chosen = with(&options, &format!("{show}; pwd")).await;
    assert_eq!(
        seen(&chosen),
        ("another\nx=y\na b=c\nnone\n/usr\n", "", Some(0))
    );
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn the_user_can_be_chosen(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    for (user, wanted) in [
        ("bob", "1000 1000 /srv\n"),
        ("1000", "1000 1000 /srv\n"),
        ("bob:root", "1000 0 /srv\n"),
        ("33:44", "33 44 /\n"),
    ] {
        let script = "echo $(id -u) $(id -g) $HOME";
        let output = output(shell(&world, &["--user", user], &task.id, script)).await;
        assert_eq!(seen(&output), (wanted, "", Some(0)), "{user}");
    }
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_command_that_can_not_be_run_ends_as_in_a_shell(world: impl World) {
    let (plugin, task) = running(&world).await;
    let id = &*task.id;
    for (words, code, reason) in [
        (
            &[id, "--", "/nowhere/at/all"][..],
            127,
            "\"/nowhere/at/all\" not found",
        ),
        (&[id, "--", "/usr"], 126, "\"/usr\" can't be executed"),
        (
            &["--directory=/nowhere", id, "--", "/bin/sh"],
            126,
            "working directory \"/nowhere\"",
        ),
        (
            &["--user=nobody-here", id, "--", "/bin/sh"],
            126,
            "user \"nobody-here\" does not exist",
        ),
    ] {
        let output = output(exec(&world, words)).await;
        let (stdout, stderr, seen_code) = seen(&output);
        assert_eq!((stdout, seen_code), ("", Some(code)), "{stderr}");
        assert!(
            stderr.starts_with("error: ") && stderr.contains(reason),
            "{stderr}"
        );
    }
    done(world, plugin, task).await;
}

/// The second task is one of the same allocation, and its name begins with that of the first.
#[rstest]
#[tokio::test]
async fn a_task_is_found_by_its_names(world: impl World) {
    let plugin = world.plugin().await;
    let first = world.shell(ON_AND_ON);
    let names = [first.spec.task.clone(), format!("{}-two", first.spec.task)];
    let first = world.up(&plugin, first.env("WHICH", "one")).await;
    let alloc = first.allocation.id().to_owned();
    let found = async |id: &str| output(shell(&world, &[], id, "echo $WHICH")).await;
    assert_eq!(seen(&found(&alloc[..8]).await), ("one\n", "", Some(0)));

    // A tree is locked while a container runs in it.
    let job = world
        .shell(ON_AND_ON)
        .with("image", json!(world.tree("two")));
    let job = job.named(&names[1]).env("WHICH", "two");
    let allocation = Arc::new(world.allocation(job));
    let second = world.start_edited(&plugin, allocation, |task| {
        task.id = task.id.replace(&task.alloc_id, &alloc);
        task.alloc_id.clone_from(&alloc);
    });
    let second = second.await.unwrap();
    second.stdout.contains("up").await;
    for (task, name, wanted) in [(&first, &names[0], "one\n"), (&second, &names[1], "two\n")] {
        let machine = task.state(&["machine"]);
        for id in [
            &*task.id,
            &format!("{alloc}/{name}"),
            machine.as_str().unwrap(),
        ] {
            let output = found(id).await;
            assert_eq!(seen(&output), (wanted, "", Some(0)), "{id}");
        }
    }
    let both = names.clone().map(|name| format!("{alloc}/{name}"));
    let all: Vec<_> = both.iter().map(String::as_str).collect();
    for ambiguous in [&alloc[..8], &alloc, &format!("{alloc}/")] {
        let words = [&[ambiguous, "is more than one task"], &*all].concat();
        failed(&found(ambiguous).await, &words);
    }
    for unknown in ["nowhere", "", &alloc[1..], &format!("{}x", first.id)] {
        let no_task = format!("no task {unknown:?} runs here");
        let words = [&[&*no_task], &*all].concat();
        failed(&found(unknown).await, &words);
    }

    second.stop(&plugin, Duration::ZERO, "").await;
    assert_eq!(seen(&found(&alloc).await), ("one\n", "", Some(0)));
    failed(&found(&second.id).await, &[&second.id, all[0]]);
    first.stop(&plugin, Duration::ZERO, "").await;
    let state = world.state().display().to_string();
    failed(&found(&alloc).await, &["no task runs", &state]);
    second.destroy(&plugin).await;
    done(world, plugin, first).await;
}

#[rstest]
#[tokio::test]
async fn no_plugin_is_needed(world: impl World) {
    let task = world.orphan(ON_AND_ON).await;
    let output = output(shell(&world, &[], &task.id, "echo on; exit 3")).await;
    assert_eq!(seen(&output), ("on\n", "", Some(3)));
    let plugin = world.recovered(&task).await;
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn the_end_of_the_task_is_an_error_of_exec(world: impl World) {
    // The fake has no pid namespace that ends with the task, only a cgroup.
    if !world.has(&[Need::Root]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let sleep = Sleep::new();
    let script = format!("echo up; {sleep}");
    let mut child = shell(&world, &[], &task.id, &script).spawn().unwrap();
    prints(&mut child, "up\n").await;
    task.stop(&plugin, Duration::ZERO, "").await;
    failed(&finish(child).await, &["the task has ended"]);
    assert_eq!(sleep.running(), 0);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_command_ends_with_exec_and_with_everything_that_it_has_started(world: impl World) {
    let (plugin, task) = running(&world).await;
    let sleep = Sleep::new();
    let script = format!("trap '' HUP TERM; setsid {sleep} & {sleep} & echo up; wait");
    let mut child = shell(&world, &[], &task.id, &script).spawn().unwrap();
    prints(&mut child, "up\n").await;
    eventually("both run", || sleep.running() == 2).await;
    within("the kill", child.kill()).await.unwrap();
    eventually("both are killed", || sleep.running() == 0).await;
    let output = output(shell(&world, &[], &task.id, "echo on")).await;
    assert_eq!(seen(&output), ("on\n", "", Some(0)));
    done(world, plugin, task).await;
}

/// One of the container, whatever `exec` itself has.
#[rstest]
#[tokio::test]
async fn a_terminal_can_be_asked_for(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let script = "tty; echo err >&2; cat; exit 5";
    let mut command = shell(&world, &["--tty"], &task.id, script);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    prints(&mut child, "/dev/pts/").await;
    stdin.write_all(b"hello\n").await.unwrap();
    // Its end is typed as the character that ends the input of a terminal.
    drop(stdin);
    let output = finish(child).await;
    let (stdout, stderr, code) = seen(&output);
    assert!(stdout.contains("err\r\n"), "{stdout:?}");
    // Once as an echo, once from the command.
    assert_eq!(stdout.matches("hello\r\n").count(), 2, "{stdout:?}");
    assert_eq!((stderr, code), ("", Some(5)));
    done(world, plugin, task).await;
}
