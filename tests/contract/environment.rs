//! What the command gets: arguments, variables, descriptors, limits and working directory.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

const VALUES: [(&str, &str); 6] = [
    ("PLAIN", "x"),
    ("EMPTY", ""),
    ("LINES", "a\nb\n"),
    ("QUOTES", "it's \"so\" \\n"),
    ("EQUALS", "a=b=c"),
    ("WORDS", " a  ü ☃ "),
];

fn values() -> BTreeMap<String, String> {
    let values = VALUES.iter();
    let owned = values.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    owned.collect()
}

/// Checks the output of a script that gets these variables, with the command as PID 1 and as PID 2.
async fn says(world: World, environment: BTreeMap<String, String>, script: &str, want: &str) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .start(
                world
                    .named(&format!("{mode:?}").to_lowercase(), script)
                    .with(|spec| {
                        spec.payload.mode = mode;
                        spec.payload.environment = environment.clone();
                    }),
            )
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), want, "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// Names and contents are unchanged. In a booted container only the real systemd-nspawn can show it.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_files_in_the_directory_of_the_variable(world: World) {
    let large = "x".repeat(Credential::MAX_BYTES);
    let texts = [
        (".hidden", ""),
        ("a b\\n", "a\n\tb"),
        ("db.password", "s3cret"),
        ("large", &large),
    ];
    let credential = |(name, text): (&str, &str)| {
        let source = world.scratch.path().canonicalize().unwrap();
        let source = source.join(format!("{}.source", text.len()));
        fs::write(&source, text).unwrap();
        Credential {
            name: name.to_owned(),
            source,
            option: String::new(),
        }
    };
    let credentials: Vec<_> = texts.into_iter().map(credential).collect();
    let script = "cd \"$CREDENTIALS_DIRECTORY\"; ls -A; \
        cat '.hidden' 'a b\\n' 'db.password'; wc -c < large; ls /proc/self/fd | grep -c .";
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .start(
                world
                    .named(&format!("{mode:?}").to_lowercase(), script)
                    .with(|spec| {
                        spec.payload.mode = mode;
                        spec.payload.credentials.clone_from(&credentials);
                    }),
            )
            .await;
        let order = fs::read_to_string(started.state.join("order")).unwrap();
        assert!(!order.contains("s3cret"), "{order}");
        world.end(&started).await;
        // The standard streams, and the directory that ls reads.
        let wanted = ".hidden\na b\\n\ndb.password\nlarge\na\n\tbs3cret1048576\n4\n";
        assert_eq!(world.said("stdout"), wanted, "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// What a task can have made of the file since it was checked.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_that_is_no_file_any_more_fails_the_start(world: World) {
    let source = world.scratch.path().canonicalize().unwrap().join("source");
    let spec = || {
        world.spec("echo started").with(|spec| {
            spec.payload.credentials = vec![Credential {
                name: "token".to_owned(),
                source: source.clone(),
                option: "config.credentials[\"token\"]".to_owned(),
            }];
        })
    };
    type Make = fn(&Path);
    let kinds: [(Make, &str); 4] = [
        (
            |path| std::os::unix::fs::symlink("/etc/hostname", path).unwrap(),
            "a part of the path has become a symbolic link since it was checked",
        ),
        (
            |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            "is not a regular file",
        ),
        (
            |path| fs::write(path, vec![b'x'; Credential::MAX_BYTES + 1]).unwrap(),
            "has more than 1048576 bytes, the most that a credential holds",
        ),
        (|_| {}, "No such file or directory"),
    ];
    for (make, words) in kinds {
        make(&source);
        let error = world.refused(spec()).await.to_string();
        let named = error.contains("config.credentials[\"token\"]: ");
        assert!(named && error.contains(words), "{words}: {error}");
        let _ = fs::remove_file(&source);
    }
    assert_eq!(world.said("stdout"), "");
    world.leave(&[]).await;
}

/// For booted containers see [`a_booted_container_has_its_variables_and_is_stopped_in_order`].
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_arrives_unchanged(world: World) {
    let script = "for n in PLAIN EMPTY LINES QUOTES EQUALS WORDS; do eval printf '%s=%s\\;' $n '\"$'$n'\"'; done; env | grep -c NOMAD_PLUGIN";
    let want: String = VALUES
        .iter()
        .map(|(name, value)| format!("{name}={value};"))
        .collect();
    says(world, values(), script, &format!("{want}0\n")).await;
}

/// The image's init gets the variables through systemd-nspawn itself, and is stopped by the signal at which systemd powers off.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booted_container_has_its_variables_and_is_stopped_in_order(world: World) {
    // The fake simulates an init itself, and logs the signals that it was sent.
    let init = world.tree.join("sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    let script = "#!/bin/sh\ntrap 'echo heard; exit 0' 38\nwhile :; do sleep 0.05; done\n";
    fs::write(&init, script).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let mut environment = values();
    environment.insert("BIG".to_owned(), longest());
    let started = world
        .start(world.spec("").with(|spec| {
            spec.payload.mode = Mode::Boot;
            spec.payload.command = Vec::new();
            spec.payload.environment = environment.clone();
        }))
        .await;
    let leader = started.leader.pid;
    let call_log = world.scratch.path().join("bin/ledger.jsonl");
    if !call_log.exists() {
        // Until then the process may still be systemd-nspawn's child before it executes the init.
        world.handles(&started, "SIGRTMIN+4").await;
    }
    within(async {
        let all = |seen: BTreeMap<_, _>| {
            environment
                .iter()
                .all(|(name, value)| seen.get(name) == Some(value))
        };
        while !all(variables(leader)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    stopped_politely(&world.backend, &started, (0, 0)).await;
    if call_log.exists() {
        let call_log = fs::read_to_string(call_log).unwrap();
        assert!(call_log.contains("\"signal\":38"), "{call_log}");
    } else {
        assert!(world.said("stdout").contains("heard"));
    }
    world.leave(&[&started]).await;
}

/// The environment of the last exec of a process.
fn variables(pid: i32) -> BTreeMap<String, String> {
    let text = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let pairs = text.split_terminator('\0');
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    pairs
        .filter_map(|pair| pair.split_once('=').map(owned))
        .collect()
}

/// The kernel's limit is 128 KiB with the name, `BIG`, and the terminating NUL.
fn longest() -> String {
    "x".repeat(128 * 1024 - "BIG=".len() - 1)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arguments_arrive_unchanged(world: World) {
    let words = [
        "two words",
        "",
        "it's",
        "q\"q",
        "$HOME",
        "ü",
        "-x",
        "--",
        "--bind=/etc:/x",
        "%s",
    ];
    let mut spec = world.spec("for a; do printf '<%s>' \"$a\"; done");
    spec.payload.command.push("sh".into());
    spec.payload.command.extend(words.map(String::from));
    let started = world.start(spec).await;
    world.end(&started).await;
    assert_eq!(
        world.said("stdout"),
        words.map(|word| format!("<{word}>")).concat()
    );
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_starts_in_the_working_directory(world: World) {
    let started = world
        .start(
            world
                .spec("basename $(pwd)")
                .with(|spec| spec.payload.working_directory = Some("/usr".into())),
        )
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "usr\n");
    world.leave(&[&started]).await;
}

/// The longest single string that a program can get.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_of_128_kib_arrives(world: World) {
    let want = format!("{}\n", longest().len());
    let environment = BTreeMap::from([("BIG".to_owned(), longest())]);
    says(world, environment, "echo ${#BIG}", &want).await;
}

/// The kernel accepts 2 MiB of arguments and variables, whichever process calls exec.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_environment_arrives(world: World) {
    const EACH: usize = 131_000;
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let environment = (0..14)
            .map(|number| (format!("BIG{number}"), number.to_string().repeat(EACH)))
            .map(|(name, value)| (name, value[..EACH].to_owned()))
            .collect();
        let script = "n=0; i=0; while [ $i -lt 14 ]; do eval \"v=\\$BIG$i\"; n=$((n+${#v})); i=$((i+1)); done; echo $n";
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(world.named(&task, script).with(|spec| {
                spec.payload.mode = mode;
                spec.payload.environment = environment;
            }))
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), format!("{}\n", 14 * EACH), "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_of_4_kib_arrives(world: World) {
    let environment = BTreeMap::from([("N".repeat(4096), "arrived".to_owned())]);
    let started = world
        .start(
            world
                .spec("env | grep -c '^NNNN*=arrived$'")
                .with(|spec| spec.payload.environment = environment),
        )
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "1\n");
    world.leave(&[&started]).await;
}

/// In `boot` mode, where systemd-nspawn itself has to pass everything on. The start fails before any init runs.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_the_kernel_accepts_is_refused_with_the_limit(world: World) {
    let (stack, _) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_STACK).unwrap();
    let limit = (stack / 4).clamp(128 * 1024, 6 * 1024 * 1024);
    let number = limit / 131_000 + 1;
    let environment = (0..number)
        .map(|number| (format!("BIG{number}"), "s3cret-".repeat(18_714)))
        .collect();
    let error = world
        .refused(world.spec("").with(|spec| {
            spec.payload.mode = Mode::Boot;
            spec.payload.command = Vec::new();
            spec.payload.environment = environment;
        }))
        .await;
    let text = error.to_string();
    assert!(text.contains(&limit.to_string()), "{text}");
    assert!(!text.contains("s3cret"), "{text}");
    world.leave(&[]).await;
}

/// In `boot` mode, where the value would be an argument: systemd-nspawn would refuse it and print it into the task's log.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_would_be_printed_is_refused_by_name(world: World) {
    let environment = BTreeMap::from([("LANG".to_owned(), "s3cret\u{fffe}".to_owned())]);
    let error = world
        .refused(world.spec("").with(|spec| {
            spec.payload.mode = Mode::Boot;
            spec.payload.command = Vec::new();
            spec.payload.environment = environment;
        }))
        .await;
    assert!(!error.is_transient(), "{error}");
    let text = error.to_string();
    assert!(text.contains("LANG") && text.contains("U+FFFE"), "{text}");
    let reported = [text, world.said("stdout"), world.said("stderr")].concat();
    assert!(!reported.contains("s3cret"), "{reported}");
    world.leave(&[]).await;
}

/// These names don't affect systemd-nspawn and still reach the command.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_systemd_reads_arrive(world: World) {
    let names = [
        "HOME",
        "LC_ALL",
        "SYSTEMD_LOG_LEVEL",
        "TERM",
        "TZ",
        "XDG_RUNTIME_DIR",
    ];
    let environment = names
        .iter()
        .map(|name| ((*name).to_owned(), format!("/{name}/ of the job")))
        .collect();
    let script = format!("for n in {}; do eval \"echo \\$$n\"; done", names.join(" "));
    let started = world
        .start(
            world
                .spec(&script)
                .with(|spec| spec.payload.environment = environment),
        )
        .await;
    world.end(&started).await;
    let want: String = names
        .iter()
        .map(|name| format!("/{name}/ of the job\n"))
        .collect();
    assert_eq!(world.said("stdout"), want);
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_value_is_in_a_command_line(world: World) {
    let scratch = world.scratch.path().to_string_lossy().into_owned();
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let secret = format!("s3cret-{}-{mode:?}", scratch.replace('/', "_"));
        let environment = BTreeMap::from([("DB_PASSWORD".to_owned(), secret.clone())]);
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(world.named(&task, DEAF).with(|spec| {
                spec.payload.mode = mode;
                spec.payload.environment = environment;
            }))
            .await;
        world.received("up").await;
        let shown = processes_that_name(&secret);
        assert!(shown.is_empty(), "{shown:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// No descriptor that the driver and systemd-nspawn use between them leaks into the command.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_has_three_descriptors(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        // The shell's own descriptor for reading the directory is closed by the time of the test -e.
        let script = "for d in /proc/$$/fd/*; do test -e $d && echo ${d##*/}; done";
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(
                world
                    .named(&task, script)
                    .with(|spec| spec.payload.mode = mode),
            )
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), "0\n1\n2\n", "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// systemd-nspawn must not dump core, because of its secrets; the command may.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_keeps_the_limit_of_core_dumps(world: World) {
    let started = world.start(world.spec("ulimit -H -c")).await;
    world.end(&started).await;
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    let want = match hard {
        nix::sys::resource::RLIM_INFINITY => "unlimited\n".to_owned(),
        bytes => format!("{}\n", bytes / 512),
    };
    assert_eq!(world.said("stdout"), want);
    world.leave(&[&started]).await;
}
