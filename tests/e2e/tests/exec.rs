//! Tier (b): a real Nomad agent runs commands in tasks, over the websocket of `nomad alloc exec` and for templates.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::panic;
use std::path::Path;

use e2e::agent::{Agent, Allocation, Exec, Message};
use e2e::debian::{self, Booted};
use e2e::{unique, until};
use serde_json::json;

/// Starts a job with this image, and waits until the agent has seen the start: it refuses commands before.
fn start<'a>(agent: &'a Agent, job: &str, variables: &[(&str, &str)]) -> Allocation<'a> {
    let jobs = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs");
    let task = agent.run(&jobs.join(format!("{job}.nomad.hcl")), variables);
    task.running();
    task
}

/// The job `exec`, once as its container's PID 1 and once as the child of an init.
fn start_both(agent: &Agent) -> [Allocation<'_>; 2] {
    ["false", "true"].map(|two| {
        let image = tree(agent);
        let task = start(agent, "exec", &[("image", &image), ("process_two", two)]);
        task.printed("up");
        task
    })
}

fn tree(agent: &Agent) -> String {
    let tree = agent.join(format!("tree-{}", unique()));
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    tree.to_str().unwrap().to_owned()
}

fn shell(task: &Allocation<'_>, script: &str, tty: bool) -> Exec {
    task.exec(&["/bin/sh", "-c", script], tty)
}

/// Reads stdout until it contains this text, and returns what has been read.
#[track_caller]
fn read_until(exec: &mut Exec, text: &str) -> String {
    let mut read = String::new();
    while !read.contains(text) {
        match exec.receive() {
            Message::Stdout(data) => read.push_str(&String::from_utf8(data).unwrap()),
            other => panic!("{other:?} after {read:?}"),
        }
    }
    read
}

/// Whether a process of this machine has this word in its arguments.
fn runs(word: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| fs::read(process.path().join("cmdline")).ok())
        .any(|arguments| {
            arguments
                .split(|byte| *byte == 0)
                .any(|argument| argument == word.as_bytes())
        })
}

/// Waits until no process has this word in its arguments. If one stays, says what it is doing, and what the agent knows of its session.
fn ends(agent: &Agent, word: &str) {
    let waited = panic::catch_unwind(|| until("the end", || (!runs(word)).then_some(())));
    if waited.is_ok() {
        return;
    }
    let mut found = vec!["the command goes on:".to_owned()];
    let processes = fs::read_dir("/proc").unwrap().flatten();
    for process in processes.map(|process| process.path()) {
        let read = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
        let arguments = read("cmdline").replace('\0', " ");
        if arguments.contains(word) {
            let [stat, blocked, cgroup] = ["stat", "wchan", "cgroup"].map(read);
            found.push(format!("{arguments}\n{stat}{blocked}\n{cgroup}"));
        }
    }
    panic!("{}\n{}", found.join("\n"), agent.log_tail());
}

#[test]
fn a_command_has_its_streams_environment_and_exit_code() {
    let agent = Agent::new();
    for task in start_both(&agent) {
        let script = "echo $TASK_WORD; cat; echo end; echo complaint >&2; exit 43";
        let mut exec = shell(&task, script, false);
        // Output arrives while the input is still open.
        assert_eq!(read_until(&mut exec, "task\n"), "of the task\n");
        exec.write(b"one\n");
        assert_eq!(read_until(&mut exec, "one\n"), "one\n");
        exec.write(b"two\n");
        exec.close_stdin();
        let (stdout, stderr, last) = exec.finish();
        assert_eq!((&*stdout, &*stderr), ("two\nend\n", "complaint\n"));
        assert_eq!(last, Message::Exited(43));
        assert_eq!(task.stop(), [0]);
    }
    agent.leave();
}

#[test]
fn a_command_in_a_terminal_is_resized_and_interrupted() {
    let agent = Agent::new();
    for task in start_both(&agent) {
        let script = "until test \"$(stty size)\" = '31 41'; do sleep 0.05; done
            trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT
            echo complaint >&2; while :; do sleep 0.05; done";
        let mut exec = shell(&task, script, true);
        // The command writes nothing before the terminal has this size.
        exec.resize(31, 41);
        assert_eq!(read_until(&mut exec, "complaint\r\n"), "complaint\r\n");
        exec.resize(50, 60);
        read_until(&mut exec, "50 60\r\n");
        exec.write(b"\x03");
        let (stdout, stderr, last) = exec.finish();
        assert!(stdout.ends_with("interrupted\r\n"), "{stdout:?}");
        assert_eq!((&*stderr, last), ("", Message::Exited(9)));
        assert_eq!(task.stop(), [0]);
    }
    agent.leave();
}

#[test]
fn a_missing_program_is_reported_as_by_a_shell() {
    let agent = Agent::new();
    for task in start_both(&agent) {
        for tty in [false, true] {
            let (stdout, stderr, last) = task.exec(&["/none/such", "x"], tty).finish();
            let (silent, reported) = if tty {
                (stderr, stdout)
            } else {
                (stdout, stderr)
            };
            assert_eq!((&*silent, last), ("", Message::Exited(127)));
            assert!(reported.contains("/none/such"), "{reported}");
        }
        assert_eq!(task.stop(), [0]);
    }
    agent.leave();
}

/// The agent notices a client that has gone when it can't pass output on.
#[test]
fn the_command_of_a_client_that_has_gone_is_killed() {
    let agent = Agent::new();
    for task in start_both(&agent) {
        for tty in [false, true] {
            let word = unique();
            // What the command has left in the background belongs to the session as well.
            let script = "trap '' HUP TERM; (while :; do sleep 1; done) & while :; do echo on; sleep 0.1; done";
            let mut exec = task.exec(&["/bin/sh", "-c", script, &word], tty);
            exec.heartbeat();
            read_until(&mut exec, "on");
            assert!(runs(&word));
            drop(exec);
            ends(&agent, &word);
        }
        assert_eq!(task.task()["State"], "running");
        assert_eq!(task.stop(), [0]);
    }
    agent.leave();
}

#[test]
fn a_command_ends_with_its_task() {
    let agent = Agent::new();
    for task in start_both(&agent) {
        let mut exec = shell(
            &task,
            "trap '' TERM; echo up; while :; do sleep 0.1; done",
            false,
        );
        read_until(&mut exec, "up\n");
        assert_eq!(task.stop(), [0]);
        let Message::Failed(reason) = exec.finish().2 else {
            panic!("the session has a result");
        };
        assert!(reason.contains("the task has ended"), "{reason}");
    }
    agent.leave();
}

#[test]
fn a_changed_template_runs_its_script() {
    let agent = Agent::new();
    let set = |word: &str| {
        let items = json!({ "Path": "nomad/jobs", "Items": { "word": word } });
        // The agent's keys may be ready a moment after its node.
        until("the variable", || {
            agent.call("PUT", "/v1/var/nomad/jobs", Some(&items)).ok()
        });
    };
    set("first");
    let image = tree(&agent);
    let task = start(&agent, "change-script", &[("image", &image)]);
    task.printed("up");
    let said = task.dir().join("../alloc/data/said");
    assert!(!said.exists(), "a script of the first rendering");
    set("second");
    let said = until("the script's output", || fs::read_to_string(&said).ok());
    assert_eq!(said, "second of the task\n");
    let event = until("the event", || task.event("Task hook message"));
    let shown = event["DisplayMessage"].as_str().unwrap();
    assert!(shown.contains("successfully ran script"), "{shown}");
    assert_eq!(task.starts(), 1);
    assert_eq!(task.stop(), [0]);
    agent.leave();
}

/// A shell that is open and ignores signals does not delay the shutdown.
#[test]
fn commands_run_in_a_booted_debian() {
    let agent = Agent::new();
    let debian = Booted::start(&agent);
    let task = &debian.task;
    task.running();

    let script = "cat /proc/1/comm; id -un; echo $NOMAD_TASK_NAME; cat; exit 44";
    let mut exec = shell(task, script, false);
    exec.write(b"input\n");
    exec.close_stdin();
    let (stdout, stderr, last) = exec.finish();
    let name = task.task_name();
    assert_eq!(stdout, format!("systemd\nroot\n{name}\ninput\n"));
    assert_eq!((&*stderr, last), ("", Message::Exited(44)));

    let mut terminal = task.exec(&["/bin/bash", "--norc"], true);
    terminal.resize(31, 41);
    terminal.write(b"tty; trap '' TERM HUP; stty size; echo x | tr x y\n");
    let shown = read_until(&mut terminal, "31 41\r\ny\r\n");
    assert!(shown.contains("/dev/pts/"), "{shown}");
    assert_eq!(task.stop(), [0]);
    assert_eq!(debian.said(), "started\nstopped\n");
    assert!(matches!(terminal.finish().2, Message::Failed(_)));
    agent.leave();
}

/// The files outlive the task, and the next one has other ids of the host.
#[test]
fn the_example_of_a_database_reads_what_it_has_written_before() {
    let agent = Agent::new();
    let tree = agent.join("redis");
    debian::copy_tree(&debian::tree_with_redis(), &tree);
    let owner = fs::metadata(tree.join("var/lib/redis")).unwrap();
    let data = agent.join("database");
    chown(&data, Some(owner.uid()), Some(owner.gid())).unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/database.nomad.hcl");
    let text = fs::read_to_string(example).unwrap();
    let image = r#"image     = "debian""#;
    assert!(text.contains(image));
    let file = agent.join("database.nomad.hcl");
    fs::write(
        &file,
        text.replace(image, &format!("image = {:?}", tree.to_str().unwrap())),
    )
    .unwrap();
    let run = |command: &str| {
        let task = agent.run(&file, &[]);
        task.running();
        let client = "redis-cli -s /alloc/data/redis.sock";
        let script = format!(
            "until {client} ping 2> /dev/null; do sleep 0.1; done > /dev/null; {client} {command}; read inside outside count < /proc/self/uid_map; \
             echo $outside"
        );
        let (stdout, stderr, last) = shell(&task, &script, false).finish();
        assert_eq!((&*stderr, last), ("", Message::Exited(0)), "{stdout}");
        assert_eq!(task.stop(), [0]);
        let (answer, ids) = stdout.trim_end().split_once('\n').unwrap();
        (answer.to_owned(), ids.to_owned())
    };
    let (answer, first) = run("set greeting hello");
    assert_eq!(answer, "OK");
    let (answer, second) = run("get greeting");
    assert_eq!(answer, "hello");
    assert_ne!(first, second);
    let files = fs::read_dir(data.join("appendonlydir")).unwrap().flatten();
    for file in files {
        assert_eq!(file.metadata().unwrap().uid(), owner.uid(), "{file:?}");
    }
    agent.leave();
}
