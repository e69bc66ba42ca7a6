//! The block `credentials`. Real only: systemd-nspawn mounts the files in the container, and gives them to users.

use rstest::rstest;

use super::*;

/// What a container shows of its credentials: the owner and the mode of the directory and of each file, and what is in them.
const SHOW: &str = "cd \"$CREDENTIALS_DIRECTORY\" && pwd && stat -c '%U %a' . && \
    for f in *; do stat -c '%n %U %a' $f; cat $f; echo; done; echo > new 2> /dev/null || echo read-only";

fn write_secret(allocation: &Path, name: &str, text: &str) {
    let path = allocation.join("secrets").join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Two credentials from the task's directory.
fn block() -> Value {
    json!([{ "db.password": "secrets/password", "token": "/secrets/token" }])
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_and_nobody_else_can_read_its_credentials(
    #[values(false, true)] process_two: bool,
    #[values(false, true)] user_namespace: bool,
    #[values("root", "bob")] user: &str,
) {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell(SHOW)
        .with("process_two", process_two)
        .with("user_namespacing", user_namespace)
        .with("credentials", block())
        .user(user);
    let allocation = stage.allocation(&task);
    write_secret(&allocation.task_dir(), "password", "s3cret");
    write_secret(&allocation.task_dir(), "token", "a b\nc");
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    let ended = running.finish(&plugin).await;
    let wanted = format!(
        "/run/host/credentials\n{user} 500\ndb.password {user} 400\ns3cret\ntoken {user} 400\na b\nc\nread-only\n"
    );
    assert_eq!(ended.said(), wanted, "{ended:?}");
    end(plugin).await;
    stage.leave();
}

/// The container's other users, its process list and the host's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contents_are_in_no_command_line_and_hidden_from_other_users() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "su bob -s /bin/sh -c \"cat $CREDENTIALS_DIRECTORY/*; ls $CREDENTIALS_DIRECTORY\"; \
        ls /proc/1/fd | tr '\\n' ' '; mount | grep -c 'credentials type ramfs (ro'; echo up; sleep 600";
    let task = stage.shell(text).with("credentials", block());
    let allocation = stage.allocation(&task);
    let secret = format!("s3cret-{}", stage.name());
    write_secret(&allocation.task_dir(), "password", &secret);
    write_secret(&allocation.task_dir(), "token", &secret);
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    let said = running.stdout.contains("up").await;
    assert!(said.starts_with("0 1 2 "), "{said}");
    assert!(!said.contains(&secret), "{said}");
    let mut seen = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        for file in ["cmdline", "environ"] {
            let text = fs::read(entry.path().join(file)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            assert!(
                !text.contains(&secret),
                "{}: {text}",
                entry.path().display()
            );
            seen += usize::from(text.contains("--load-credential=db.password:/proc/self/fd/"));
        }
    }
    assert_eq!(seen, 1, "systemd-nspawn");
    let state = running.state(&["state"]);
    let state = Path::new(state.as_str().unwrap());
    for entry in fs::read_dir(state).unwrap().flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains(&secret), "{}", entry.path().display());
    }
    // What is left of the pipes holds nothing.
    for entry in fs::read_dir(format!("/proc/{}/fd", running.nspawn())).unwrap() {
        let path = entry.unwrap().path();
        let target = fs::read_link(&path).unwrap_or_default();
        assert!(!target.starts_with("/memfd:"), "{target:?}");
    }
    assert!(!stage.log().contains(&secret));
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// A template that has been rendered again is read at the next start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_reads_the_files_again() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("cat $CREDENTIALS_DIRECTORY/*")
        .with("credentials", block());
    let allocation = stage.allocation(&task);
    write_secret(&allocation.task_dir(), "token", "");
    for text in ["first", "second, longer"] {
        write_secret(&allocation.task_dir(), "password", text);
        let running = stage.start_in(&plugin, &task, allocation.clone());
        let ended = running.await.unwrap().finish(&plugin).await;
        assert_eq!(ended.said(), text);
    }
    end(plugin).await;
    stage.leave();
}

/// Also one that is run as another user than root.
#[rstest]
#[case("root")]
#[case("bob")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_command_can_read_what_the_command_can(#[case] user: &str) {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let names: Vec<String> = (0..256).map(|index| format!("c{index}")).collect();
    let block = names
        .iter()
        .map(|name| (name.clone(), json!("secrets/token")));
    let task = stage
        .shell("ls $CREDENTIALS_DIRECTORY | grep -c .; echo up; sleep 600")
        .with("credentials", json!([Value::Object(block.collect())]))
        .user(user);
    let allocation = stage.allocation(&task);
    write_secret(&allocation.task_dir(), "token", "t0ken");
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    assert_eq!(running.stdout.contains("up").await, "256\nup\n");
    let words = ["sh", "-c", "id -un; cat $CREDENTIALS_DIRECTORY/c255"];
    let ended = within("ExecTask", plugin.exec(&running.id, &words, None)).await;
    let ended = ended.unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert_eq!(said, format!("{user}\nt0ken"), "{ended:?}");
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// A link of the image leads it there. systemd-nspawn mounts what the job asks for last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_over_the_credentials_does_not_get_those_of_a_user() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    symlink("/run/host", stage.join("tree/link")).unwrap();
    let task = stage
        .shell("echo started")
        .with("credentials", json!([{ "token": "secrets/token" }]))
        .with("bind", json!([{ "local": "/link/credentials" }]))
        .user("bob");
    let allocation = stage.allocation(&task);
    write_secret(&allocation.task_dir(), "token", "t0ken");
    let local = allocation.task_dir().join("local");
    let refused = stage.start_in(&plugin, &task, allocation).await;
    let error = refused.map(|running| running.id).unwrap_err().to_string();
    let words = "config.credentials: the files can't be given to the user of the command: \
        something else is mounted at /run/host/credentials";
    assert!(error.contains(words), "{error}");
    assert_eq!(fs::read_dir(local).unwrap().count(), 0);
    end(plugin).await;
    stage.leave();
}

/// What a task can leave for its next start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_task_has_made_of_a_file_is_refused() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo started")
        .with("credentials", json!([{ "token": "local/token" }]));
    let outside = stage.file("outside", "s3cret");
    let makes = [
        (
            format!("ln -s {} /local/token", outside.display()),
            "leads outside",
        ),
        ("mkfifo /local/token".to_owned(), "is not a regular file"),
        ("mkdir /local/token".to_owned(), "is not a regular file"),
        (
            "mknod /local/token c 1 5".to_owned(),
            "is not a regular file",
        ),
        (
            "truncate -s 900000000000 /local/token".to_owned(),
            "has more than 1048576 bytes, the most that a credential holds",
        ),
        ("true".to_owned(), "does not exist"),
    ];
    for (make, words) in makes {
        let maker = stage.shell(&make);
        let allocation = stage.allocation(&maker);
        let running = stage.start_in(&plugin, &maker, allocation).await.unwrap();
        let made = running.finish(&plugin).await;
        made.said();
        // The allocation with the task that reads the file.
        let reader = stage.allocation(&task);
        let local = |dir: PathBuf| dir.join("local");
        fs::remove_dir(local(reader.task_dir())).unwrap();
        fs::rename(local(made.allocation.task_dir()), local(reader.task_dir())).unwrap();
        fs::create_dir(local(made.allocation.task_dir())).unwrap();
        let refused = stage.start_in(&plugin, &task, reader).await;
        let error = refused.map(|running| running.id).unwrap_err().to_string();
        let named = error.contains("config.credentials[\"token\"]: ");
        assert!(named && error.contains(words), "{make}: {error}");
        assert!(!error.contains("s3cret"), "{error}");
    }
    end(plugin).await;
    stage.leave();
}

/// A process that has leased a file delays everybody who opens it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leased_file_is_refused_at_once() {
    const LEASE: &str = "$SIG{IO} = 'IGNORE'; open F, '+<', $ARGV[0] or die; fcntl(F, 1024, 1) or die; \
        $| = 1; print qq(leased\\n); sleep 600";
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo started")
        .with("credentials", json!([{ "token": "local/token" }]));
    let allocation = stage.allocation(&task);
    let token = allocation.task_dir().join("local/token");
    fs::write(&token, "text").unwrap();
    let mut holder = Command::new("perl")
        .args(["-e", LEASE])
        .arg(&token)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 7];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).unwrap();
    let refused = stage.start_in(&plugin, &task, allocation).await;
    let error = refused.map(|running| running.id).unwrap_err().to_string();
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(
        error.contains("Resource temporarily unavailable"),
        "{error}"
    );
    end(plugin).await;
    stage.leave();
}

/// A Debian tree whose unit `e2e.service` loads the credential `db.password`, and writes what it has got to `/local/said`.
fn loading_tree(stage: &Stage, suite: &str, setting: &str) -> PathBuf {
    let tree = stage.join("debian");
    debian::copy_tree(&debian::tree_of(suite), &tree);
    debian::add_unit(
        &tree,
        "{ id -un; cat $CREDENTIALS_DIRECTORY/db.password; echo; ls $CREDENTIALS_DIRECTORY; } > /local/said.new; \
         mv /local/said.new /local/said",
        "true",
    );
    let more = tree.join("etc/systemd/system/e2e.service.d");
    fs::create_dir(&more).unwrap();
    fs::write(
        more.join("credentials.conf"),
        format!("[Service]\nUser=nobody\n{setting}\n"),
    )
    .unwrap();
    tree
}

#[rstest]
#[case::without_a_user_namespace(false, "bookworm", "LoadCredential=db.password")]
#[case::in_a_user_namespace(true, "bookworm", "LoadCredential=db.password")]
#[case::by_a_pattern(true, "trixie", "ImportCredential=db.*")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_of_a_booted_system_loads_a_credential(
    #[case] user_namespace: bool,
    #[case] suite: &str,
    #[case] setting: &str,
) {
    let stage = Stage::new();
    let tree = loading_tree(&stage, suite, setting);
    let plugin = stage.plugin().await;
    let task = stage
        .words(&[])
        .with("image", json!(tree))
        .with("boot", true)
        .with("user_namespacing", user_namespace)
        .with("credentials", block());
    let allocation = stage.allocation(&task);
    write_secret(&allocation.task_dir(), "password", "s3cret");
    write_secret(&allocation.task_dir(), "token", "t0ken");
    let local = allocation.task_dir().join("local");
    fs::set_permissions(&local, fs::Permissions::from_mode(0o777)).unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    let said = || fs::read_to_string(local.join("said")).unwrap_or_default();
    tokio::task::block_in_place(|| {
        until("the unit's start", || (!said().is_empty()).then_some(()))
    });
    assert_eq!(said(), "nobody\ns3cret\ndb.password\n");
    // A command in it has the variable of the init, which is root.
    let words = ["sh", "-c", "id -u; cat $CREDENTIALS_DIRECTORY/token"];
    let ended = within("ExecTask", plugin.exec(&running.id, &words, None)).await;
    assert_eq!(ended.unwrap().stdout, b"0\nt0ken");
    running.stop(&plugin, AMPLE, "").await;
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}
