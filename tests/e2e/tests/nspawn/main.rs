//! Tier (a): the real plugin binary and the real systemd-nspawn. Every option has the effect that `docs/configuration.md`
//! promises, and nothing is lost or left when the plugin dies. Each test says why the stand-in can't play it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use e2e::stage::{Namespace, Running, Stage, end, within};
use e2e::{debian, until};
use nomad_driver_nspawn::host::{Plugin, TaskExit};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::supervisor::Records;
use nomad_driver_nspawn::supervisor::process::Held;
use serde_json::{Value, json};

/// More than any task needs that ends when it is asked.
const AMPLE: Duration = Duration::from_secs(30);

/// The same small tree with everything below `/usr`, as systemd wants it.
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

/// systemd-nspawn without the driver, to tell what this machine can't do from what the driver does wrong.
fn bare(words: &[&str]) -> Output {
    // Two in one control group would share their subgroups, so it gets one of its own.
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

// Words, streams, processes.

/// Real only: the real parser's own rules for words and specifiers are the question.
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

/// Real only: a pseudo terminal is systemd-nspawn's.
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

/// Real only: a pid namespace gives orphans to its first process.
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

/// Real only: users are looked up in a real root and taken on by root.
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

/// Real only: the directory is one of the container's own root.
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

/// Command lines can be read by everybody on the host.
/// Real only: systemd-nspawn's helpers have command lines too.
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

// The root file system.

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_root_can_not_be_written_and_the_allocation_can() {
    let stage = Stage::new();
    let text = "touch /x /etc/x 2>/dev/null && echo written; \
        for d in /local /alloc /secrets; do echo $d > $d/x && cat $d/x; done";
    let ended = stage.run(stage.shell(text).with("read_only", true)).await;
    assert_eq!(ended.said(), "/local\n/alloc\n/secrets\n");
    let written = ended.allocation.task_dir().join("local/x");
    assert_eq!(fs::read_to_string(written).unwrap(), "/local\n");
    for point in ["local", "alloc", "secrets", "x"] {
        assert!(
            !stage.join("tree").join(point).exists(),
            "{point} was made in the image"
        );
    }
    stage.leave();
}

/// Real only: systemd-nspawn makes and removes the copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_root_can_be_written_and_nothing_stays() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "echo x > /etc/x && cat /etc/x";
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("ephemeral", true))
        .await;
    assert_eq!(ended.said(), "x\n");
    assert!(!stage.join("tree/etc/x").exists());
    assert_eq!(stage.run_on(&plugin, stage.shell(text)).await.said(), "x\n");
    assert!(
        stage.join("tree/etc/x").exists(),
        "without it, the image is written"
    );
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_volatile_is_thrown_away() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let tree = merged_tree(&stage, "merged");
    fs::write(tree.join("var/old"), "").unwrap();
    let text = "for f in /etc/new /var/new /usr/new; do touch $f 2>/dev/null && echo $f; done; ls /var/old 2>/dev/null; \
        ls /etc/group 2>/dev/null; echo end";
    let wanted = [
        ("yes", "/etc/new\n/var/new\nend\n"),
        ("state", "/var/new\n/etc/group\nend\n"),
        (
            "overlay",
            "/etc/new\n/var/new\n/usr/new\n/var/old\n/etc/group\nend\n",
        ),
        (
            "no",
            "/etc/new\n/var/new\n/usr/new\n/var/old\n/etc/group\nend\n",
        ),
    ];
    for (volatile, want) in wanted {
        let task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("volatile", volatile);
        assert_eq!(stage.run_on(&plugin, task).await.said(), want, "{volatile}");
        for new in ["etc/new", "var/new", "usr/new"] {
            assert_eq!(
                tree.join(new).exists(),
                volatile == "no",
                "{volatile} {new}"
            );
        }
    }
    let unmerged = stage
        .refused(&plugin, stage.shell("exit 0").with("volatile", "yes"))
        .await;
    assert!(unmerged.contains("config.volatile"), "{unmerged}");
    end(plugin).await;
    stage.leave();
}

/// Real only: a root that runs is the proof.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_found_where_the_documentation_says() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (tree, id) in [("plugins/rootfs", "relative"), ("machine", "machine")] {
        fs::write(stage.tree(tree).join("id"), id).unwrap();
    }
    let known = Path::new("/var/lib/machines").join(stage.name());
    fs::create_dir_all("/var/lib/machines").unwrap();
    fs::rename(stage.join("machine"), &known).unwrap();
    let cat = stage.words(&["/bin/cat", "/id"]);
    for (image, want) in [("rootfs", "relative"), (stage.name(), "machine")] {
        let task = cat.clone().with("image", image);
        assert_eq!(stage.run_on(&plugin, task).await.said(), want);
    }
    fs::remove_dir_all(known).unwrap();
    fs::remove_dir_all(stage.join("plugins/rootfs")).unwrap();

    let task = cat.clone().with("image", "${NOMAD_TASK_DIR}/rootfs");
    let allocation = stage.allocation(&task);
    let tree = allocation.task_dir().join("local/rootfs");
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    fs::write(tree.join("id"), "allocation").unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    assert_eq!(running.finish(&plugin).await.said(), "allocation");

    let missing = stage.refused(&plugin, cat.with("image", "nowhere")).await;
    for place in ["config.image", "plugins/nowhere", "/var/lib/machines"] {
        assert!(missing.contains(place), "{missing}");
    }
    end(plugin).await;
    stage.leave();
}

/// Up to version 257 systemd-nspawn asks udev about the loop device. Where it can't run a disk image itself, its own words
/// reach the user.
/// Real only: loop devices and file systems.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_image_runs_where_systemd_nspawn_can() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let image = stage.image("disk.raw", &stage.join("tree"));
    let task = stage.shell("echo inside").with("image", json!(image));
    let allocation = stage.allocation(&task);
    let bare = bare(&["--image", image.to_str().unwrap(), "/bin/true"]);
    match stage.start_in(&plugin, &task, allocation).await {
        Ok(running) => {
            assert_eq!(running.finish(&plugin).await.said(), "inside\n");
            assert!(bare.status.success(), "{bare:?}");
        }
        Err(refused) => {
            assert!(
                !bare.status.success(),
                "systemd-nspawn itself can: {refused:?}"
            );
            let said = String::from_utf8_lossy(&bare.stderr);
            let reason = said.lines().last().unwrap();
            assert!(refused.error.to_string().contains(reason), "{refused:?}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pivot_root_makes_a_directory_of_the_image_the_root() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let inner = stage.tree("tree/inner");
    fs::write(inner.join("id"), "inner\n").unwrap();
    fs::create_dir(inner.join("old")).unwrap();
    fs::write(stage.join("tree/outer"), "outer\n").unwrap();
    let task = stage
        .words(&["/bin/cat", "/id"])
        .with("pivot_root", "/inner");
    assert_eq!(stage.run_on(&plugin, task).await.said(), "inner\n");
    // Some kernels refuse systemd-nspawn the move of the old root.
    let tree = stage.join("tree");
    let directory = format!("--directory={}", tree.display());
    let bare = bare(&[&directory, "--pivot-root=/inner:/old", "/bin/true"]);
    let task = stage
        .words(&["/bin/cat", "/id", "/old/outer"])
        .with("pivot_root", "/inner:/old");
    let allocation = stage.allocation(&task);
    match stage.start_in(&plugin, &task, allocation).await {
        Ok(running) => assert_eq!(running.finish(&plugin).await.said(), "inner\nouter\n"),
        Err(refused) => {
            let said = String::from_utf8_lossy(&bare.stderr);
            assert!(
                !bare.status.success(),
                "systemd-nspawn itself can: {refused:?}"
            );
            assert!(said.contains("MS_MOVE"), "{said}");
            assert!(refused.error.to_string().contains("MS_MOVE"), "{refused:?}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: systemd-nspawn makes the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resolv_conf_is_made_as_it_is_asked_for() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let host = fs::read_to_string("/etc/resolv.conf").unwrap();
    let file = stage.join("tree/etc/resolv.conf");
    let text = "cat /etc/resolv.conf 2>/dev/null; true";
    for (word, inside, stays) in [
        ("off", "own\n", Some("own\n")),
        ("bind-host", &*host, Some("own\n")),
        ("replace-host", &*host, Some(&*host)),
        ("delete", "", None),
    ] {
        fs::write(&file, "own\n").unwrap();
        let task = stage.shell(text).with("resolv_conf", word);
        assert_eq!(stage.run_on(&plugin, task).await.said(), inside, "{word}");
        assert_eq!(fs::read_to_string(&file).ok().as_deref(), stays, "{word}");
    }
    end(plugin).await;
    stage.leave();
}

// Mounts.

/// Real only: mounts with mapped ids.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn binds_show_host_paths_with_and_without_user_namespaces() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (number, users) in [false, true].into_iter().enumerate() {
        // Each with a tree of its own: the first user namespace may change the owners of a tree.
        let tree = stage.tree(&format!("tree{number}"));
        let source = stage.join(format!("a:b c\\d{number}"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("given"), "given\n").unwrap();
        fs::set_permissions(source.join("given"), fs::Permissions::from_mode(0o600)).unwrap();
        let text = "cat /w:w/given /r/r/given; echo new > /w:w/new; \
            touch /r/r/new 2>/dev/null && echo written; stat -c %u /w:w/given /w:w/new";
        let task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("user_namespacing", users)
            .with("bind", bind(&source, "/w:w"))
            .with("bind_read_only", bind(&source, "/r/r"));
        let ended = stage.run_on(&plugin, task).await;
        assert_eq!(
            ended.said(),
            "given\ngiven\n0\n0\n",
            "user_namespacing {users}"
        );
        assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "new\n");
        assert_eq!(
            fs::metadata(source.join("new")).unwrap().uid(),
            0,
            "user_namespacing {users}"
        );
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_volumes_only_the_allocation_can_be_shown() {
    let stage = Stage::new();
    let plugin = stage.plugin_with(json!({ "volumes": false })).await;
    let task = stage
        .shell("exit 0")
        .with("bind", bind(&stage.join("tree"), "/mnt"));
    let refused = stage.refused(&plugin, task).await;
    assert!(
        refused.contains("config.bind") && refused.contains("volumes"),
        "{refused}"
    );
    let task = stage
        .shell("cat /mnt/x")
        .with("bind", json!([{ "${NOMAD_TASK_DIR}": "/mnt" }]));
    let allocation = stage.allocation(&task);
    fs::write(allocation.task_dir().join("local/x"), "own\n").unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    assert_eq!(running.finish(&plugin).await.said(), "own\n");
    end(plugin).await;
    stage.leave();
}

// Users and capabilities.

/// Real only: user namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_namespace_hides_root_and_keeps_the_allocation_usable() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "cat /proc/self/uid_map; id -u; cat /secrets/token; \
        for d in /local /alloc /alloc/data /secrets; do echo x > $d/new || echo no $d; done; echo x > /etc/new";
    let task = stage.shell(text).with("user_namespacing", true);
    let allocation = stage.allocation(&task);
    let token = allocation.task_dir().join("secrets/token");
    fs::write(&token, "token\n").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    let ended = running.finish(&plugin).await;
    let (map, rest) = ended.said().split_once('\n').unwrap();
    let map: Vec<u32> = map
        .split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect();
    assert!(map[0] == 0 && map[1] >= 65536 && map[2] == 65536, "{map:?}");
    assert_eq!(rest, "0\ntoken\n", "{ended:?}");
    end(plugin).await;
    stage.leave();
}

/// Real only: user namespaces, and owners that systemd-nspawn changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn private_users_and_their_ownership_are_what_was_asked_for() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = |tree: &Path, range: &str| {
        stage
            .shell("tr -s ' ' < /proc/self/uid_map; stat -c %u /etc/group")
            .with("image", json!(tree))
            .with("user_namespacing", true)
            .with("private_users", range)
    };
    let tree = stage.tree("identity");
    let ended = task(&tree, "identity");
    let ended = stage.run_on(&plugin, ended).await;
    assert_eq!(ended.said(), " 0 0 65536\n0\n");
    let ended = task(&tree, "no");
    let ended = stage.run_on(&plugin, ended).await;
    assert_eq!(ended.said(), " 0 0 4294967295\n0\n");
    for (ownership, inside, outside) in [("map", 0, 0), ("off", 65534, 0), ("chown", 0, 1_048_576)]
    {
        let tree = stage.tree(ownership);
        let task = task(&tree, "1048576:65536").with("private_users_ownership", ownership);
        let ended = stage.run_on(&plugin, task).await;
        assert_eq!(
            ended.said(),
            format!(" 0 1048576 65536\n{inside}\n"),
            "{ownership}"
        );
        let owner = fs::metadata(tree.join("etc/group")).unwrap().uid();
        assert_eq!(owner, outside, "{ownership}");
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: the fake gives up no rights.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capabilities_are_added() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = || stage.shell("grep CapBnd /proc/self/status | cut -f 2");
    let mut sets = Vec::new();
    for capability in [
        json!([]),
        json!(["CAP_NET_ADMIN", "cap_sys_time"]),
        json!(["all"]),
    ] {
        let ended = stage
            .run_on(&plugin, task().with("capability", capability))
            .await;
        sets.push(u64::from_str_radix(ended.said().trim(), 16).unwrap());
    }
    let asked = 1 << 12 | 1 << 25;
    assert_eq!(sets[0] & asked, 0, "{sets:x?}");
    assert_eq!(sets[1], sets[0] | asked, "{sets:x?}");
    // More than this process itself has can't be given.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:\t"));
    let own = u64::from_str_radix(own.unwrap(), 16).unwrap();
    assert_eq!(sets[2], own, "{sets:x?}");
    end(plugin).await;
    stage.leave();
}

// Networks. Everything that makes interfaces runs in a network namespace of the test's own.

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_network_options_the_container_is_in_the_hosts_network() {
    let stage = Stage::new();
    let host = fs::read_link("/proc/self/ns/net").unwrap();
    let ended = stage
        .run(stage.words(&["/bin/readlink", "/proc/self/ns/net"]))
        .await;
    assert_eq!(ended.said().trim(), host.to_str().unwrap());
    stage.leave();
}

/// Real only: network interfaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_veth_a_zone_and_a_bridge_come_and_go_with_the_container() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    namespace.ip(&["link", "add", "e2ebr", "type", "bridge"]);
    let plugin = stage.plugin_in(&namespace).await;
    let names = || namespace.ip(&["-o", "link"]);
    let text = "ls /sys/class/net; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let wanted = [
        ("network_veth", json!(true), vec!["ve-"]),
        (
            "network_zone",
            json!("e2e"),
            vec!["vb-", "vz-e2e", "master vz-e2e"],
        ),
        (
            "network_bridge",
            json!("e2ebr"),
            vec!["vb-", "master e2ebr"],
        ),
    ];
    for (option, value, links) in wanted {
        let task = stage.shell(text).with(option, value);
        let running = stage.start(&plugin, task).await;
        let inside = running.stdout.contains("up").await;
        assert!(inside.contains("host0"), "{option}: {inside}");
        let outside = names();
        for link in links {
            assert!(outside.contains(link), "{option}: {outside}");
        }
        assert_eq!(running.stop(&plugin, AMPLE, "SIGTERM").await.code, 0);
        running.destroy(&plugin).await;
        within(option, async {
            while ["ve-", "vb-", "vz-"]
                .iter()
                .any(|kind| names().contains(kind))
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// Real only: network namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_groups_network_is_joined_with_and_without_user_namespaces() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    namespace.ip(&["link", "add", "e2elink", "type", "bridge"]);
    namespace.ip(&["address", "add", "198.51.100.7/32", "dev", "e2elink"]);
    let plugin = stage.plugin().await;
    for users in [false, true] {
        let task = stage
            .shell("ip -o address show dev e2elink")
            .with("user_namespacing", users)
            .network(&namespace.path());
        let ended = stage.run_on(&plugin, task).await;
        assert!(ended.said().contains("198.51.100.7/32"), "{ended:?}");
    }
    let task = stage
        .shell("exit 0")
        .with("network_zone", "e2e")
        .network(&namespace.path());
    let refused = stage.refused(&plugin, task).await;
    assert!(refused.contains("config.network_zone"), "{refused}");
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

// Logs.

/// Real only: users, and a `/dev` of the container's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_stdout_can_be_opened_anew_by_any_user_and_in_a_user_namespace() {
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

/// Real only: systemd-nspawn's own way with a pipe is the question.
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

/// Real only: the code goes through systemd-nspawn's own hands.
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

// A whole system.

/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_tree_boots_in_a_user_namespace_and_is_stopped_in_order() {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(
        &tree,
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo started >> /local/said; \
         cat /proc/1/comm /proc/1/uid_map >> /local/said'\n\
         ExecStop=/bin/sh -c 'echo stopped >> /local/said'\n",
    );
    let plugin = stage.plugin().await;
    let mut task = stage.words(&[]).with("image", json!(tree));
    // What is left is the default of every option.
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

/// Boots a Debian tree with a unit that runs this when it is stopped, does something to the system, and gives the end and what the
/// unit has said.
async fn shut_down(
    stop_by: &str,
    end_it: impl AsyncFnOnce(&Plugin, &Running) -> TaskExit,
) -> (i32, i32, String) {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(
        &tree,
        &format!(
            "[Service]\nType=oneshot\nRemainAfterExit=yes\n\
             ExecStart=/bin/sh -c 'echo started >> /local/said'\n\
             ExecStop=/bin/sh -c 'echo stopping >> /local/said; {stop_by}'\n"
        ),
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
async fn a_shutdown_that_hangs_is_ended_after_the_grace() {
    let grace = Duration::from_secs(4);
    let ended = shut_down("sleep 600", async |plugin, running| {
        running.stop(plugin, grace, "").await
    });
    assert_eq!(ended.await, (137, 9, "started\nstopping\n".to_owned()));
}

/// The job's own signal takes the place of the order to power off: this one makes systemd execute itself anew.
/// Real only: a real init.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_signal_is_what_the_init_gets() {
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
        running.signal(plugin, "SIGRTMIN+4").await;
        running.wait(plugin).await
    });
    assert_eq!(ended.await, (0, 0, "started\nstopping\n".to_owned()));
}

/// systemd-nspawn tells of the start while the first process is still its own program, to which the kernel delivers nothing that
/// it has no handler for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_right_after_the_start_reaches_the_init() {
    let stage = Stage::new();
    let tree = stage.join("debian");
    debian::copy(&tree, "[Service]\nType=oneshot\nExecStart=true\n");
    let plugin = stage.plugin().await;
    for signal in [None, Some("SIGRTMIN+4")] {
        let task = stage.words(&[]).with("image", json!(tree));
        let running = stage.start(&plugin, task.with("boot", json!(true))).await;
        let exit = match signal {
            None => running.stop(&plugin, AMPLE, "").await,
            Some(name) => {
                running.signal(&plugin, name).await;
                running.wait(&plugin).await
            }
        };
        assert_eq!((exit.code, exit.signal), (0, 0), "{signal:?}: {exit:?}");
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    stage.leave();
}

// Ends that only a real pid namespace and a real systemd-nspawn have; the rest of the exit table is in the contract.

/// The kernel ends the first process of a pid namespace in which reboot(2) is called, by a signal that tells what was asked for.
/// Real only: the kernel ends a pid namespace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_of_reboot_from_inside_is_told() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let init = stage.join("tree/sbin/init");
    fs::create_dir(stage.join("tree/sbin")).unwrap();
    for (ask, code) in [("reboot -f", 133), ("poweroff -f", 0), ("halt -f", 0)] {
        let words = format!("{ask}; sleep 1000");
        fs::write(&init, format!("#!/bin/sh\n{words}\n")).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        let booted = stage
            .words(&[])
            .with("command", json!([]))
            .with("boot", true);
        for (how, task) in [
            ("plain", stage.shell(&words)),
            ("process_two", stage.shell(&words).with("process_two", true)),
            ("boot", booted),
        ] {
            let exit = stage.run_on(&plugin, task).await.exit;
            assert_eq!((exit.code, exit.signal), (code, 0), "{how}: {ask}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// systemd-nspawn locks the root that it is given by its inode too, and leaves that file when it is killed. For a read-only root
/// that lacks mount points this is a directory of the driver's own.
/// Real only: systemd-nspawn's own locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_systemd_nspawn_leaves_no_lock_of_its_root() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo up; exec sleep 1000")
        .with("read_only", true);
    let running = stage.start(&plugin, task).await;
    running.stdout.contains("up").await;
    let own = running.state()["state"].as_str().map(PathBuf::from);
    let roots = [own.unwrap().join("root"), stage.join("tree")];
    let held: Vec<PathBuf> = roots
        .iter()
        .filter_map(|root| fs::metadata(root).ok())
        .map(|root| format!("inode-{}:{}", root.dev(), root.ino()))
        .map(|name| Path::new("/run/systemd/nspawn/locks").join(name))
        .filter(|lock| lock.exists())
        .collect();
    assert_eq!(held.len(), 1, "{roots:?}");
    running.stop(&plugin, Duration::ZERO, "").await;
    running.destroy(&plugin).await;
    assert!(!held[0].exists(), "{held:?}");
    end(plugin).await;
    stage.leave();
}

/// Kills the systemd-nspawn of a container, as somebody on the host might; the task's end is told.
async fn kill_nspawn(running: &Running, plugin: &Plugin) {
    let state = running.state()["state"].as_str().map(PathBuf::from);
    let nspawn = Records::at(state.unwrap()).running().unwrap().nspawn;
    Held::again(nspawn).unwrap().signal(Signal::KILL).unwrap();
    let exit = running.wait(plugin).await;
    assert!(exit.error.is_some(), "{exit:?}");
}

/// Locks, copies, loop devices and mounts are what the end of the test looks for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_killed_on_a_disk_image_leaves_nothing() {
    let stage = Stage::new();
    let udev = stage.udev();
    let plugin = stage.plugin_for_images(&udev, json!({})).await;
    let image = stage.image("disk.raw", &stage.join("tree"));
    for ephemeral in [false, true] {
        let task = stage.shell("echo up; exec sleep 1000");
        let task = task
            .with("image", json!(image))
            .with("ephemeral", ephemeral);
        let running = stage.start(&plugin, task).await;
        running.stdout.contains("up").await;
        let held = stage.marks().left();
        assert!(
            held.iter().any(|line| line.starts_with("loop device")),
            "{held:?}"
        );
        kill_nspawn(&running, &plugin).await;
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_killed_in_a_user_namespace_leaves_no_lock_of_its_ids() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo up; exec sleep 1000")
        .with("user_namespacing", true);
    let running = stage.start(&plugin, task).await;
    running.stdout.contains("up").await;
    let map = fs::read_to_string(format!("/proc/{}/uid_map", running.leader())).unwrap();
    let first = map.split_whitespace().nth(1).unwrap();
    let lock = Path::new("/run/systemd/nspawn-uid").join(first);
    assert!(lock.exists(), "{map}");
    kill_nspawn(&running, &plugin).await;
    running.destroy(&plugin).await;
    assert!(!lock.exists(), "{}", lock.display());
    end(plugin).await;
    stage.leave();
}

/// It stays as long as somebody is in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bridge_of_a_zone_goes_with_the_last_systemd_nspawn_that_is_killed() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    let plugin = stage.plugin_in(&namespace).await;
    let zone = format!("z{}", e2e::unique());
    let bridge = format!("vz-{zone}");
    let links = || namespace.ip(&["-brief", "link"]);
    let mut all = Vec::new();
    for tree in ["one", "two"] {
        let tree = stage.tree(tree);
        let task = stage.shell("echo up; exec sleep 1000");
        let task = task
            .with("network_zone", zone.as_str())
            .with("image", json!(tree));
        let running = stage.start(&plugin, task).await;
        running.stdout.contains("up").await;
        all.push(running);
    }
    for running in all {
        assert!(links().contains(&bridge), "{}", links());
        kill_nspawn(&running, &plugin).await;
        running.destroy(&plugin).await;
    }
    assert!(!links().contains(&bridge), "{}", links());
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// What the kernel does for want of memory. With version 2 of control groups the task's own group is limited, as an operator
/// could; with version 1 the command is put into one.
/// Real only: the kernel's limits, which take root.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_for_want_of_memory_is_told() {
    const LIMIT: &str = "16777216";
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let hungry = "mkfifo /tmp/go; echo up; read go < /tmp/go; \
        exec dd if=/dev/zero of=/dev/null bs=64M count=100";
    for two in [false, true] {
        let task = stage.shell(hungry).with("process_two", two);
        let running = stage.start(&plugin, task).await;
        running.stdout.contains("up").await;
        let own = running.state()["cgroup"].as_str().map(PathBuf::from);
        let own = own.filter(|group| group.join("memory.max").exists());
        let other = Path::new("/sys/fs/cgroup/memory").join(format!("nde-{}", e2e::unique()));
        if let Some(group) = &own {
            fs::write(group.join("memory.max"), LIMIT).unwrap();
            let _ = fs::write(group.join("memory.swap.max"), "0");
        } else {
            fs::create_dir(&other).expect("memory can be limited by one of the two versions");
            fs::write(other.join("memory.limit_in_bytes"), LIMIT).unwrap();
            fs::write(other.join("cgroup.procs"), command(&running).to_string()).unwrap();
        }
        let go = format!("/proc/{}/root/tmp/go", running.leader());
        fs::write(go, "go\n").unwrap();
        let exit = running.finish(&plugin).await.exit;
        if own.is_none() {
            until("the limited group is empty", || fs::remove_dir(&other).ok());
        }
        // Version 1 counts it in a group that is not the task's.
        let told = (exit.code, exit.signal, exit.oom_killed);
        assert_eq!(told, (137, 9, own.is_some()), "process_two: {two}");
    }
    end(plugin).await;
    stage.leave();
}

/// The command's pid on the host: the first process, or its child.
fn command(running: &Running) -> i64 {
    let leader = running.leader();
    let children = fs::read_to_string(format!("/proc/{leader}/task/{leader}/children")).unwrap();
    children
        .split_whitespace()
        .next()
        .map_or(leader, |child| child.parse().unwrap())
}

/// systemd-nspawn's own words say why it refuses.
/// Real only: its words.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_disk_image_is_refused_in_systemd_nspawns_words() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let image = stage.file("broken.raw", &"no file system\n".repeat(4096));
    let refused = stage
        .refused(&plugin, stage.shell("true").with("image", json!(image)))
        .await;
    let bare = bare(&["--image", image.to_str().unwrap(), "/bin/true"]);
    assert!(!bare.status.success());
    let said = String::from_utf8_lossy(&bare.stderr);
    let reason = said.lines().last().unwrap();
    assert!(refused.contains(reason), "{refused:?} without {reason:?}");
    end(plugin).await;
    stage.leave();
}
