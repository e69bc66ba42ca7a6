//! Further commands in a container that is up.

use nomad_driver_nspawn::container::Mount;
use nomad_driver_nspawn::exec::{End, Ended, ExecRequest, Session, Streams, TerminalSize};
use support::{Sleep, eventually};
use tokio::io::AsyncReadExt as _;

use super::*;

/// What a command has written, and how it ended.
struct Output {
    stdout: String,
    stderr: String,
    end: End,
}

fn shell(script: &str) -> ExecRequest {
    ExecRequest {
        command: vec!["/bin/sh".into(), "-c".into(), script.into()],
        ..ExecRequest::default()
    }
}

/// This container, in a user namespace of its own if `users` is set.
fn with_users(spec: ContainerSpec, users: bool) -> ContainerSpec {
    spec.with(|spec| {
        if users {
            spec.users = Users::Private {
                range: "pick".into(),
                ownership: None,
            };
        }
    })
}

async fn exec(world: &World, started: &Started, request: ExecRequest) -> Session {
    within(world.backend.exec(started, request)).await.unwrap()
}

/// Runs a command to its end and ends its session.
async fn run(world: &World, started: &Started, request: ExecRequest) -> Output {
    let mut session = exec(world, started, request).await;
    let Streams::Pipes {
        stdin,
        mut stdout,
        mut stderr,
    } = session.streams
    else {
        panic!("no pipes");
    };
    drop(stdin);
    let (mut out, mut err) = (String::new(), String::new());
    let read = async {
        tokio::try_join!(
            stdout.read_to_string(&mut out),
            stderr.read_to_string(&mut err)
        )
        .unwrap();
        session.control.ended().await
    };
    let end = within(read).await;
    within(session.control.end()).await;
    Output {
        stdout: out,
        stderr: err,
        end,
    }
}

fn exited(code: i32, signal: i32) -> End {
    End::Exited(Ended { code, signal })
}

/// Prints everything that restricts a process. What is its own alone is left out.
const RESTRICTIONS: &str = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters|Umask|Cpus_allowed_list|SigBlk|SigIgn):' /proc/self/status; \
    for name in user mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$name; done; \
    cat /proc/self/limits /proc/self/oom_score_adj; echo end";

#[rstest]
#[case::plain(Mode::Plain, false)]
#[case::plain_with_users(Mode::Plain, true)]
#[case::init(Mode::ProcessTwo, false)]
#[case::init_with_users(Mode::ProcessTwo, true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_as_restricted_as_the_payload(
    world: World,
    #[case] mode: Mode,
    #[case] users: bool,
) {
    let script = format!("{RESTRICTIONS}; exec sleep 1000");
    let spec = with_users(world.spec(&script), users).with(|spec| {
        spec.payload.mode = mode;
        spec.payload.capabilities = vec!["CAP_NET_ADMIN".into()];
    });
    let started = world.start(spec).await;
    world.received("end\n").await;
    let output = run(&world, &started, shell(RESTRICTIONS)).await;
    assert_eq!((output.end, &*output.stderr), (exited(0, 0), ""));
    assert_eq!(output.stdout, world.said("stdout"));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_its_own_streams_and_exit(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    for (script, stdout, stderr, end) in [
        ("echo out; echo err >&2", "out\n", "err\n", exited(0, 0)),
        ("exit 7", "", "", exited(7, 0)),
        ("exit 255", "", "", exited(255, 0)),
        ("kill -USR1 $$", "", "", exited(128 + 10, 10)),
        ("cat; echo end", "end\n", "", exited(0, 0)),
        (
            "echo a >/dev/stdout; echo b >/dev/stderr",
            "a\n",
            "b\n",
            exited(0, 0),
        ),
    ] {
        let output = run(&world, &started, shell(script)).await;
        assert_eq!(
            (&*output.stdout, &*output.stderr, output.end),
            (stdout, stderr, end),
            "{script}"
        );
    }
    world.leave(&[&started]).await;
}

/// Reads from the terminal until this text has appeared.
async fn read_until(session: &Session, text: &str) -> String {
    let Streams::Terminal(terminal) = &session.streams else {
        panic!("no terminal");
    };
    let mut seen = Vec::new();
    let read = async {
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&seen).contains(text) {
            let length = terminal.read(&mut buffer).await.unwrap();
            assert!(
                length > 0,
                "{:?} ended without {text:?}",
                String::from_utf8_lossy(&seen)
            );
            seen.extend_from_slice(&buffer[..length]);
        }
    };
    within(read).await;
    String::from_utf8(seen).unwrap()
}

async fn type_in(session: &Session, text: &[u8]) {
    let Streams::Terminal(terminal) = &session.streams else {
        panic!("no terminal");
    };
    assert_eq!(within(terminal.write(text)).await.unwrap(), text.len());
}

#[rstest]
#[case::root(false)]
#[case::with_users(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_one_of_the_container(world: World, #[case] users: bool) {
    let started = world.up(with_users(world.spec(DEAF), users)).await;
    let request = ExecRequest {
        terminal: Some(TerminalSize {
            rows: 41,
            columns: 113,
        }),
        ..shell(
            "stty size; ls -l $(tty) | cut -c1-10; trap 'echo interrupted' INT; (echo ready; exec sleep 1000); read line; stty size; cat; exit 9",
        )
    };
    let mut session = exec(&world, &started, request).await;
    let text = read_until(&session, "ready\r\n").await;
    assert_eq!(text, "41 113\r\ncrw--w----\r\nready\r\n");
    type_in(&session, b"\x03").await;
    read_until(&session, "interrupted\r\n").await;
    let Streams::Terminal(terminal) = &session.streams else {
        panic!("no terminal");
    };
    let size = TerminalSize {
        rows: 50,
        columns: 70,
    };
    terminal.resize(size).unwrap();
    type_in(&session, b"\r").await;
    read_until(&session, "50 70\r\n").await;
    type_in(&session, b"hello\r").await;
    read_until(&session, "hello\r\nhello\r\n").await;
    type_in(&session, b"\x04").await;
    assert_eq!(within(session.control.ended()).await, exited(9, 0));
    within(session.control.end()).await;
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_command_leaves_ends_with_the_session(world: World) {
    // Without children that come and go.
    let started = world.up(world.spec("echo up; exec sleep 1000")).await;
    let before = offspring(started.leader.pid).len();
    for dropped in [false, true] {
        let sleep = Sleep::new();
        let script = format!(
            "trap '' HUP TERM; (setsid {sleep} >/dev/null 2>&1 </dev/null &); (exec {sleep}) & echo up; wait"
        );
        let mut session = exec(&world, &started, shell(&script)).await;
        let Streams::Pipes { stdout, .. } = &mut session.streams else {
            panic!("no pipes");
        };
        let mut line = [0; 3];
        within(stdout.read_exact(&mut line)).await.unwrap();
        eventually("both run", || sleep.running() == 2).await;
        match dropped {
            true => drop(session),
            false => within(session.control.end()).await,
        }
        eventually("both are killed", || sleep.running() == 0).await;
    }
    // The command does not wait for children, so a zombie would stay.
    let gone = || offspring(started.leader.pid).len() == before;
    eventually("the end of every process of the sessions", gone).await;
    without_session_groups(&started).await;
    world.leave(&[&started]).await;
}

/// Waits until no cgroup of a session is left.
async fn without_session_groups(started: &Started) {
    let groups = started.cgroup.iter().chain(started.controllers.values());
    let parents: Vec<_> = groups
        .flat_map(|group| [group.clone(), group.join("payload")])
        .collect();
    let left = || {
        let entries = parents.iter().flat_map(fs::read_dir).flatten().flatten();
        entries
            .filter(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("nomad-exec")
            })
            .count()
    };
    within(async {
        while left() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[rstest]
#[case::plain(Mode::Plain)]
#[case::init(Mode::ProcessTwo)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_the_environment_and_directory_of_the_task(world: World, #[case] mode: Mode) {
    const SHOW: &str = "echo $SECRET; echo $OTHER; pwd; id -un; echo $HOME; tr '\\0' '\\n' </proc/self/environ | grep -c ^LISTEN_";
    let started = world
        .up(world.spec("echo up; exec sleep 1000").with(|spec| {
            spec.payload.mode = mode;
            spec.payload.environment = BTreeMap::from([("SECRET".into(), "a b=c".into())]);
            spec.payload.working_directory = Some("/tmp".into());
        }))
        .await;
    let output = run(&world, &started, shell(SHOW)).await;
    let user = run(&world, &started, shell("id -un; echo $HOME"))
        .await
        .stdout;
    assert_eq!(output.stdout, format!("a b=c\n\n/tmp\n{user}0\n"));
    let request = ExecRequest {
        directory: Some("/".into()),
        environment: BTreeMap::from([
            ("SECRET".into(), "new".into()),
            ("OTHER".into(), "more".into()),
        ]),
        ..shell(SHOW)
    };
    let output = run(&world, &started, request).await;
    assert_eq!(output.stdout, format!("new\nmore\n/\n{user}0\n"));
    world.leave(&[&started]).await;
}

/// Its streams belong to root of the host, which a container with a user namespace does not know.
#[rstest]
#[case::without_users(false)]
#[case::with_users(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_user_can_open_its_streams_by_name(world: World, #[case] users: bool) {
    if world.is_fake() {
        return not_applicable("needs root and the users of a real container");
    }
    let started = world.up(with_users(world.spec(DEAF), users)).await;
    let script =
        "id -u; id -g; cat /dev/stdin; echo a >/dev/stdout; echo b >/dev/stderr; echo $HOME";
    let request = |terminal| ExecRequest {
        user: Some("33:44".into()),
        terminal,
        ..shell(script)
    };
    let output = run(&world, &started, request(None)).await;
    assert_eq!((&*output.stderr, output.end), ("b\n", exited(0, 0)));
    assert_eq!(output.stdout, "33\n44\na\n/\n");
    let mut session = exec(&world, &started, request(Some(TerminalSize::default()))).await;
    type_in(&session, b"\x04").await;
    let text = read_until(&session, "/\r\n").await;
    assert!(text.ends_with("33\r\n44\r\na\r\nb\r\n/\r\n"), "{text}");
    assert_eq!(within(session.control.ended()).await, exited(0, 0));
    within(session.control.end()).await;
    world.leave(&[&started]).await;
}

/// A missing program, a file that can't be executed, a missing directory and a missing user.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_run_is_an_error_with_a_status(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let command = |command: &str| ExecRequest {
        command: vec![command.into()],
        ..ExecRequest::default()
    };
    let at = ExecRequest {
        directory: Some("/nowhere".into()),
        ..shell("true")
    };
    let by = ExecRequest {
        user: Some("no-such-user".into()),
        ..shell("true")
    };
    for (request, status, text) in [
        (
            command("no-such-program"),
            127,
            "command \"no-such-program\" not found",
        ),
        (
            command("/proc/version"),
            126,
            "command \"/proc/version\" can't be executed: Permission denied",
        ),
        (
            at,
            126,
            "working directory \"/nowhere\": No such file or directory",
        ),
        (
            by,
            126,
            "user \"no-such-user\" does not exist in the container",
        ),
    ] {
        let output = run(&world, &started, request).await;
        let End::NotRun(start_error) = output.end else {
            panic!("{:?}", output.end);
        };
        assert_eq!(start_error.status(), status, "{text}");
        let found = start_error.to_string();
        assert!(found.starts_with(text), "{found}");
    }
    let error = within(world.backend.exec(&started, ExecRequest::default())).await;
    assert_eq!(error.unwrap_err().to_string(), "the command is empty");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_with_the_container(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let mut session = exec(&world, &started, shell("echo up; exec sleep 1000")).await;
    within(session.control.started()).await;
    strike(started.leader.pid, signal("SIGKILL"));
    world.end(&started).await;
    // The containers of the fake have no pid namespace that would end with their first process.
    if !world.is_fake() {
        assert_eq!(within(session.control.ended()).await, End::Lost);
    }
    within(session.control.end()).await;
    let error = within(world.backend.exec(&started, shell("true"))).await;
    assert_eq!(error.unwrap_err().to_string(), "the task is not running");
    world.leave(&[&started]).await;
}

/// A Perl program that refuses the system call `uname(2)` to itself and what it executes, with a seccomp filter, and prints `up`.
fn refuses_uname() -> String {
    let (prctl, uname) = if cfg!(target_arch = "aarch64") {
        (167, 160)
    } else {
        (157, 63)
    };
    // Load the number of the call; unless it is that of uname, skip the next; return EPERM; allow.
    let program = format!("0x20,0,0,0, 0x15,0,1,{uname}, 0x06,0,0,0x50001, 0x06,0,0,0x7fff0000");
    format!(
        "my $program = pack('SCCL' x 4, {program}); my $all = pack('Sx6P', 4, $program); \
         syscall({prctl}, 38, 1, 0, 0, 0); syscall({prctl}, 22, 2, $all) == 0 or die \"seccomp: $!\"; \
         exec '/bin/sh', '-c', 'test -n \"$(uname 2>/dev/null)\" || echo up; exec sleep 1000';"
    )
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_that_a_task_has_installed_itself_do_not_hold_for_commands(world: World) {
    let mut mounts = Vec::new();
    if !world.is_fake() {
        // Perl and its libraries.
        for name in ["lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), world.tree.join(name)).unwrap();
        }
        mounts.push(Mount::new("/usr", "/usr").with_read_only(true));
    }
    let started = world
        .up(world.spec("").with(|spec| {
            spec.payload.command = vec!["/usr/bin/perl".into(), "-e".into(), refuses_uname()];
            spec.mounts = mounts;
        }))
        .await;
    let output = run(&world, &started, shell("uname")).await;
    assert_eq!((&*output.stdout, output.end), ("Linux\n", exited(0, 0)));
    let count = "grep Seccomp_filters /proc/self/status";
    let output = run(&world, &started, shell(count)).await;
    let count = output.stdout.split_ascii_whitespace().nth(1);
    assert_eq!(count.map(|count| count.parse().unwrap()), started.filters);
    world.leave(&[&started]).await;
}
