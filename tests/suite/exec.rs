//! Commands in a running task, over the plugin's socket.

use std::fs;

use dev_agent::{ExecOutput, ExecSession};
use support::Sleep;

use super::*;

/// Runs a shell script in the task without a terminal. Its input is empty.
async fn shell(plugin: &Plugin, task: &Running, script: &str) -> ExecOutput {
    let session = open(plugin, task, script, None).await;
    session.close().await;
    finish(session).await
}

/// Starts a shell script in the task.
async fn open(
    plugin: &Plugin,
    task: &Running,
    script: &str,
    terminal: Option<(i32, i32)>,
) -> ExecSession {
    let command = ["/bin/sh", "-c", script];
    let session = plugin.exec_streaming(&task.id, &command, terminal);
    within("ExecTaskStreaming", session).await.unwrap()
}

async fn finish(session: ExecSession) -> ExecOutput {
    within("the end of the command", session.finish())
        .await
        .unwrap()
}

/// Reads stdout until it contains these words. Returns everything that was read.
async fn until(session: &mut ExecSession, words: &str) -> String {
    let mut output = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&output);
        if text.contains(words) {
            return text.into_owned();
        }
        let response = within(words, session.next()).await.unwrap();
        let response = response.unwrap_or_else(|| panic!("no {words}: {text}"));
        output.extend(response.stdout.unwrap_or_default().data);
    }
}

/// The outcome as (stdout, stderr, code, signal).
fn seen(output: &ExecOutput) -> (&str, &str, i32, i32) {
    let text = |bytes| std::str::from_utf8(bytes).unwrap();
    (
        text(&output.stdout),
        text(&output.stderr),
        output.code,
        output.signal,
    )
}

/// A plugin and a task that runs on.
pub(super) async fn running(world: &impl World) -> (Plugin, Running) {
    let plugin = world.plugin().await;
    let job = world.shell(ON_AND_ON).env("OF_THE_JOB", "its value");
    let task = world.up(&plugin, job).await;
    (plugin, task)
}

pub(super) async fn done(world: impl World, plugin: Plugin, task: Running) {
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

#[rstest]
#[tokio::test]
async fn a_command_without_a_terminal_has_its_streams_and_its_exit(world: impl World) {
    let (plugin, task) = running(&world).await;
    for (script, wanted) in [
        ("echo out; echo err >&2; exit 43", ("out\n", "err\n", 43, 0)),
        ("exit 0", ("", "", 0, 0)),
        ("exit 255", ("", "", 255, 0)),
        ("kill -KILL $$", ("", "", 137, 9)),
        ("echo $OF_THE_JOB", ("its value\n", "", 0, 0)),
        ("cat; echo end", ("end\n", "", 0, 0)),
        (
            "echo out >/dev/stdout; echo err >/dev/stderr",
            ("out\n", "err\n", 0, 0),
        ),
    ] {
        let output = shell(&plugin, &task, script).await;
        assert_eq!(seen(&output), wanted, "{script}");
    }
    let session = open(
        &plugin,
        &task,
        "read line; echo got $line; cat; exit 7",
        None,
    )
    .await;
    session.heartbeat().await;
    session.input("one\ntwo").await;
    session.close().await;
    assert_eq!(seen(&finish(session).await), ("got one\ntwo", "", 7, 0));
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn output_arrives_before_the_end(world: impl World) {
    let (plugin, task) = running(&world).await;
    let script = "echo 1; read x; echo 2; read x; echo 3; stty size; exit 4";
    let mut session = open(&plugin, &task, script, None).await;
    for line in ["1\n", "2\n"] {
        assert_eq!(until(&mut session, line).await, line);
        session.input("\n").await;
    }
    let output = finish(session).await;
    let (stdout, stderr, code, _) = seen(&output);
    assert_eq!((stdout, code), ("3\n", 4));
    assert!(!stderr.is_empty(), "there is no terminal");
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_file_of_a_command_stays_in_the_container(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let directory = shell(&plugin, &task, "test -d $NOMAD_TASK_DIR").await;
    assert_eq!(directory.code, 0, "{directory:?}");
    let made = shell(&plugin, &task, "f=$(mktemp) && echo kept >$f && echo $f").await;
    let path = seen(&made).0.trim();
    assert!(
        path.starts_with('/') && !fs::exists(path).unwrap(),
        "{made:?}"
    );
    let again = shell(&plugin, &task, &format!("cat {path}")).await;
    assert_eq!(seen(&again), ("kept\n", "", 0, 0));
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_command_that_does_not_run_ends_as_in_a_shell(world: impl World) {
    let (plugin, task) = running(&world).await;
    for (command, code) in [("/nowhere/at/all", 127), ("/", 126)] {
        let command = [command];
        let session = plugin.exec_streaming(&task.id, &command, None);
        let output = finish(within("the start", session).await.unwrap()).await;
        let (stdout, stderr, seen_code, _) = seen(&output);
        assert_eq!((stdout, seen_code), ("", code));
        assert!(stderr.contains(command[0]), "{stderr}");
        let check = plugin.exec(&task.id, &command, None);
        let check = within("ExecTask", check).await.unwrap();
        assert_eq!(check.code, code);
    }
    let empty = within("the start", plugin.exec_streaming(&task.id, &[], None)).await;
    assert_eq!(refusal(empty).message(), "the command is empty");
    done(world, plugin, task).await;
}

/// As much in both directions at once as fills every buffer on the way many times.
#[rstest]
#[tokio::test]
async fn much_data_passes_in_both_directions(world: impl World) {
    const TOTAL: usize = 64 << 20;
    const CHUNK: usize = 32 << 10;
    let (plugin, task) = running(&world).await;
    let mut session = open(&plugin, &task, "exec cat", None).await;
    let messages = session.messages();
    let chunk: Vec<u8> = (0..=250).cycle().take(CHUNK).collect();
    let input = chunk.clone();
    let sending = tokio::spawn(async move {
        use nomad_driver_nspawn::proto::driver as proto;
        let message = |data, close| proto::ExecTaskStreamingRequest {
            stdin: Some(proto::ExecTaskStreamingIoOperation { data, close }),
            ..Default::default()
        };
        for _ in 0..TOTAL / CHUNK {
            messages.send(message(input.clone(), false)).await.unwrap();
        }
        messages.send(message(Vec::new(), true)).await.unwrap();
    });
    let mut seen = 0;
    let exit = loop {
        let response = within("output", session.next()).await.unwrap().unwrap();
        for byte in response.stdout.unwrap_or_default().data {
            assert_eq!(byte, chunk[seen % CHUNK], "at {seen}");
            seen += 1;
        }
        if response.exited {
            break response.result.unwrap();
        }
    };
    assert_eq!((seen, exit.exit_code), (TOTAL, 0));
    sending.await.unwrap();
    drop(session);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_command_that_does_not_read_its_input_delays_nothing(world: impl World) {
    let (plugin, task) = running(&world).await;
    let mut session = open(&plugin, &task, "sleep 1000 & echo up; wait", None).await;
    until(&mut session, "up").await;
    let send = async || session.input(vec![b'x'; 32 << 10]).await;
    while tokio::time::timeout(Duration::from_millis(100), send())
        .await
        .is_ok()
    {}
    let output = shell(&plugin, &task, "echo another").await;
    assert_eq!(seen(&output), ("another\n", "", 0, 0));
    drop(session);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn without_a_terminal_all_output_is_waited_for(world: impl World) {
    let (plugin, task) = running(&world).await;
    let output = shell(&plugin, &task, "(sleep 0.3; echo late) & exit 3").await;
    assert_eq!(seen(&output), ("late\n", "", 3, 0));
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_check_reports_its_output_and_its_exit(world: impl World) {
    let (plugin, task) = running(&world).await;
    let check = async |script: &str, limit| {
        let command = ["/bin/sh", "-c", script];
        let answer = plugin.exec(&task.id, &command, limit);
        within("ExecTask", answer).await.unwrap()
    };
    let ok = check("echo out; cat", None).await;
    assert_eq!(seen(&ok), ("out\n", "", 0, 0));
    let failed = check("echo err >&2; exit 2", Some(DEADLINE)).await;
    assert_eq!(seen(&failed), ("err\n", "", 2, 0));
    let second = Some(Duration::from_secs(1));
    let sleep = Sleep::new();
    let script = format!("echo begun; setsid {sleep} & {sleep}");
    let late = check(&script, second).await;
    let text = "begun\nthe command was killed after its timeout of 1s\n";
    assert_eq!(seen(&late), (text, "", 137, 9));
    assert_eq!(sleep.running(), 0);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_cancelled_call_ends_everything_that_the_command_has_started(world: impl World) {
    let (plugin, task) = running(&world).await;
    let sleep = Sleep::new();
    let script = format!("setsid {sleep} & echo up; {sleep}");
    let mut session = open(&plugin, &task, &script, None).await;
    until(&mut session, "up").await;
    eventually("both run", || sleep.running() == 2).await;
    drop(session);
    eventually("both are killed", || sleep.running() == 0).await;
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_session_ends_with_its_task(world: impl World) {
    let (plugin, task) = running(&world).await;
    let sleep = Sleep::new();
    let script = format!("echo up; {sleep}");
    let mut session = open(&plugin, &task, &script, None).await;
    until(&mut session, "up").await;
    task.stop(&plugin, Duration::ZERO, "").await;
    let ended = refusal(within("the end of the session", session.finish()).await);
    assert_eq!(format!("{:?}", ended.code()), "FailedPrecondition");
    assert_eq!(ended.message(), "the task has ended");
    assert_eq!(sleep.running(), 0);
    let later = within("the start", plugin.exec_streaming(&task.id, &["x"], None)).await;
    assert_eq!(refusal(later).message(), "the task is not running");
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_terminal_has_a_size_and_echoes(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let script = "stty size; read line; echo got $line; stty size; echo err >&2; exit 5";
    let mut session = open(&plugin, &task, script, Some((31, 41))).await;
    until(&mut session, "31 41\r\n").await;
    session.resize(50, 60).await;
    session.resize(100, 101).await;
    session.input("hello\n").await;
    let output = finish(session).await;
    let wanted = "hello\r\ngot hello\r\n100 101\r\nerr\r\n";
    assert_eq!(seen(&output), (wanted, "", 5, 0));
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_terminal_interrupts_and_ends_the_input(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let script = "trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 0.05; done";
    let mut session = open(&plugin, &task, script, Some((24, 80))).await;
    until(&mut session, "up").await;
    session.input([3]).await;
    let output = finish(session).await;
    assert!(seen(&output).0.contains("interrupted"), "{output:?}");
    assert_eq!(output.code, 9);
    let session = open(&plugin, &task, "cat; echo end", Some((24, 80))).await;
    session.close().await;
    let output = finish(session).await;
    assert!(seen(&output).0.ends_with("end\r\n"), "{output:?}");
    done(world, plugin, task).await;
}

/// What is in the background still has the terminal open, and is killed.
#[rstest]
#[tokio::test]
async fn a_session_with_a_terminal_ends_with_its_command(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let sleep = Sleep::new();
    let script = format!("setsid {sleep} & echo done");
    let session = open(&plugin, &task, &script, Some((24, 80))).await;
    assert_eq!(seen(&finish(session).await), ("done\r\n", "", 0, 0));
    assert_eq!(sleep.running(), 0);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_shell_in_a_terminal_has_job_control(world: impl World) {
    if !world.has(&[Need::MountNamespace]) {
        return world.unused();
    }
    let (plugin, task) = running(&world).await;
    let session = plugin.exec_streaming(&task.id, &["/bin/sh", "-i"], Some((24, 80)));
    let session = within("the start", session).await.unwrap();
    session
        .input("set -m; sleep 1000 & jobs; kill %1; exit 6\n")
        .await;
    let output = finish(session).await;
    let (text, ..) = seen(&output);
    assert!(text.contains("Running"), "{text}");
    assert!(!text.contains("job control turned off"), "{text}");
    assert_eq!(output.code, 6);
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn many_checks_at_once_are_right(world: impl World) {
    let (plugin, task) = running(&world).await;
    let second = Some(Duration::from_secs(1));
    let (plugin_of, id) = (&plugin, &*task.id);
    let checks = (0..20).map(|number| async move {
        let script = match number % 2 {
            0 => format!("exit {number}"),
            _ => "sleep 1000".to_owned(),
        };
        let command = ["/bin/sh", "-c", &script];
        let ended = within("ExecTask", plugin_of.exec(id, &command, second)).await;
        ended.unwrap().code
    });
    let codes = futures_util::future::join_all(checks).await;
    for (number, code) in (0..).zip(codes) {
        let wanted = if number % 2 == 0 { number } else { 137 };
        assert_eq!(code, wanted, "{number}");
    }
    done(world, plugin, task).await;
}

#[rstest]
#[tokio::test]
async fn a_hundred_sessions_run_at_once(world: impl World) {
    let (plugin, task) = running(&world).await;
    let opened = (0..100).map(|_| open(&plugin, &task, "read line; echo $line", None));
    let sessions = futures_util::future::join_all(opened).await;
    for (number, session) in sessions.iter().enumerate() {
        session.input(format!("{number}\n")).await;
    }
    for (number, session) in sessions.into_iter().enumerate() {
        let output = finish(session).await;
        assert_eq!(seen(&output), (&*format!("{number}\n"), "", 0, 0));
    }
    done(world, plugin, task).await;
}
