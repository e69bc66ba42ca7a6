//! Secrets on the real systemd-nspawn, and with a real agent, beyond `tests/suite/secrets.rs`: `tests/integration/secrets.rs` checks every
//! version on the fake, this file the installed one.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dev_agent::Allocation;
use e2e::agent::Agent;
use e2e::stage::{Running, Stage, Task, end};
use e2e::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use support::secrecy::{
    self, Marker, Mode, ancestry, descriptors, environment, open_to_others, shown,
};

/// Searches the whole machine. `nspawn` and its descendants may have the secret in their environment, and the files with the names
/// `on_disk` may have it in the task directory. Returns how many files have it.
fn search(
    when: &str,
    marker: &Marker,
    mode: Mode,
    nspawn: Option<i32>,
    (own, spared): (&Path, &[PathBuf]),
    on_disk: &[&str],
    since: i64,
) -> usize {
    let expects = shown(mode, e2e::nspawn_version(), false).is_some();
    let expected: Vec<i32> = nspawn.into_iter().filter(|_| expects).collect();
    let lines = marker.in_command_lines();
    let seen: Vec<i32> = lines.keys().copied().collect();
    assert_eq!(seen, expected, "{when}: command lines: {lines:?}");
    for (pid, name) in marker.in_environments() {
        let inside = nspawn.is_some_and(|nspawn| ancestry(pid).contains(&nspawn));
        assert!(inside, "{when}: the environment of {name} ({pid}) has it");
        // Owned by root, or in a private user namespace by the container's user, who has the secret anyway.
        let about = fs::metadata(format!("/proc/{pid}/environ")).unwrap();
        assert_eq!(about.mode() & 0o777, 0o400, "{name}");
        assert!(about.uid() == 0 || Some(pid) != nspawn, "{name}");
    }
    let mut places = secrecy::places();
    places.push((own, usize::MAX));
    let files = marker.in_files(&places, spared, since);
    let kept = |path: &&PathBuf| {
        let of_a_start = path.parent().and_then(Path::parent) == Some(own.join("state").as_path());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap();
        of_a_start && (on_disk.contains(&name) || (expects && name == "order"))
    };
    let others: Vec<&PathBuf> = files.iter().filter(|path| !kept(path)).collect();
    assert_eq!(others, Vec::<&PathBuf>::new(), "{when}: files have it");
    let open = open_to_others(&own.join("state"));
    assert_eq!(open, Vec::<String>::new(), "{when}");
    files.len()
}

const ON_AND_ON: &str = "echo up; exec sleep 1000";

/// A stage with secrets.
struct Case {
    stage: Stage,
    marker: Marker,
    mode: Mode,
    since: i64,
}

impl Case {
    fn new(mode: Mode) -> Self {
        let stage = Stage::new();
        if mode == Mode::Boot {
            // A minimal image with an init of its own.
            let sbin = stage.join("tree/sbin");
            fs::create_dir(&sbin).unwrap();
            let init = sbin.join("init");
            fs::write(&init, "#!/bin/sh\nexec sleep 1000\n").unwrap();
            fs::set_permissions(init, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self {
            stage,
            marker: Marker::new(),
            mode,
            since: secrecy::now(),
        }
    }

    fn task(&self, script: &str) -> Task {
        let task = match self.mode {
            Mode::Plain => self.stage.shell(script),
            Mode::ProcessTwo => self.stage.shell(script).with("process_two", true),
            Mode::Boot => self
                .stage
                .words(&[])
                .with("command", json!([]))
                .with("boot", true),
        };
        task.env("DB_PASSWORD", &self.marker.secret("value"))
            .env("NOMAD_TOKEN", &self.marker.secret("token"))
            .env(
                "LINES",
                &format!("a\n{}\n\"='", self.marker.secret("lines")),
            )
    }

    fn allocation(&self, task: &Task) -> Arc<Allocation> {
        let allocation = self.stage.allocation(task);
        let file = allocation.task_dir().join("secrets/file.env");
        fs::write(file, self.marker.secret("template")).unwrap();
        allocation
    }

    fn search(&self, when: &str, nspawn: Option<i32>) {
        self.search_but(when, nspawn, &[]);
    }

    fn search_but(&self, when: &str, nspawn: Option<i32>, on_disk: &[&str]) -> usize {
        let own = self.stage.join("");
        let spared = ["alloc", "plugins"].map(|name| self.stage.join(name));
        let places = (own.as_path(), &spared[..]);
        let (marker, since) = (&self.marker, self.since);
        search(when, marker, self.mode, nspawn, places, on_disk, since)
    }

    fn nspawn(&self, running: &Running) -> i32 {
        running.nspawn()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_failed_start_shows_a_secret() {
    for mode in [Mode::Plain, Mode::ProcessTwo, Mode::Boot] {
        failed_starts_show_no_secret(mode).await;
    }
}

async fn failed_starts_show_no_secret(mode: Mode) {
    let case = Case::new(mode);
    let plugin = case.stage.plugin().await;
    let empty = case.stage.join("empty");
    fs::create_dir(&empty).unwrap();
    let broken = case.stage.file("broken.raw", "no image");
    let up = ON_AND_ON;
    let secret = case.marker.secret("value");
    let tasks = [
        ("missing", case.task(up).with("image", "/no/such/image")),
        (
            "no tree",
            case.task(up).with("image", empty.to_str().unwrap()),
        ),
        (
            "no image",
            case.task(up).with("image", broken.to_str().unwrap()),
        ),
        ("bad option", case.task(up).with("volatile", "maybe")),
        ("secret option", case.task(up).with("volatile", secret)),
        (
            "bad capability",
            case.task(up).with("capability", json!(["CAP_NO"])),
        ),
    ];
    for (what, task) in tasks {
        let allocation = case.allocation(&task);
        let refused = case.stage.start_in(&plugin, &task, allocation).await;
        let refused = refused.expect_err(what);
        // Includes the stderr of systemd-nspawn if it was called.
        case.marker.not_in(what, &format!("{refused:?}"));
        case.search(what, None);
        case.marker.not_in("the plugin's log", &case.stage.log());
    }
    // The start succeeds before the failure can be known. A booted container has no command.
    let commands: &[&str] = match mode {
        Mode::Boot => &[],
        _ => &["/no/such/program", "/etc/passwd"],
    };
    for command in commands {
        let task = case.task(up).with("command", json!([command]));
        let allocation = case.allocation(&task);
        let running = case.stage.start_in(&plugin, &task, allocation).await;
        let running = running.unwrap();
        let exit = running.wait(&plugin).await;
        assert_ne!(exit.code, 0);
        case.marker.not_in("the exit", &format!("{exit:?}"));
        case.search(command, None);
        let said = running.stdout.all().await + &running.stderr.all().await;
        case.marker.not_in("the task's log", &said);
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    case.stage.leave();
}

/// The variables in systemd-nspawn's own environment in addition to the task's.
const NSPAWN_KNOWS: &[&str] = &[
    "LANG",
    "NOTIFY_SOCKET",
    "PATH",
    "SYSTEMD_LOG_COLOR",
    "SYSTEMD_LOG_TARGET",
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY",
    // For the descriptors that are passed through it.
    "LISTEN_FDS",
    "LISTEN_PID",
];

/// The descriptors that systemd-nspawn opens itself, besides the locks of the root: its event loop, and the sockets and pipes to its
/// children.
const NSPAWN_MAKES: &[&str] = &[
    "socket",
    "eventpoll",
    "signalfd",
    "eventfd",
    "pipe",
    "pidfd",
];

/// The sockets and pipes that a process has open, by inode, so that shared ones can be recognized.
fn inodes(pid: i32) -> BTreeSet<String> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let names = targets.map(|target| target.to_string_lossy().into_owned());
    names
        .filter(|name| name.starts_with("socket:[") || name.starts_with("pipe:["))
        .collect()
}

/// The agent of this test marks no descriptor close-on-exec, and has tokens of its own in its environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_one_gets_a_descriptor_or_a_variable_that_it_does_not_need() {
    let case = Case::new(Mode::Plain);
    let precious = case.stage.file("precious", "");
    let script = format!(
        "export AWS_SECRET_ACCESS_KEY={token} VAULT_TOKEN={token} LD_BIND_NOW=1; exec 7<{precious} 8>>{precious}; exec \"$0\"",
        token = case.marker.secret("agent"),
        precious = precious.display()
    );
    let plugin = case.stage.plugin_by(&script).await;
    assert!(
        descriptors(plugin.pid()).unwrap()[&7].ends_with("precious"),
        "the plugin has what it must not pass on"
    );
    let task = case
        .stage
        .shell("echo up; exec sleep 1000")
        .env("OF_THE_JOB", "x");
    let running = case.stage.start(&plugin, task).await;
    running.stdout.contains("up").await;
    let state = running.state(&[]);
    let pid = |who: &str| i32::try_from(state[who]["pid"].as_i64().unwrap()).unwrap();
    let nspawn = case.nspawn(&running);
    assert_eq!(environment(pid("supervisor")).unwrap(), [].into());
    let of_job: BTreeSet<String> = environment(pid("leader")).unwrap().into_keys().collect();
    for name in environment(nspawn).unwrap().into_keys() {
        let known = NSPAWN_KNOWS.contains(&name.as_str()) || of_job.contains(&name);
        assert!(known, "{name}");
    }
    assert!(of_job.contains("OF_THE_JOB"), "{of_job:?}");
    for name in ["AWS_SECRET_ACCESS_KEY", "VAULT_TOKEN", "LD_BIND_NOW"] {
        assert!(!of_job.contains(name), "{name}");
    }
    for who in [pid("supervisor"), nspawn, pid("leader")] {
        let open = descriptors(who).unwrap();
        let files: Vec<&String> = open.values().filter(|to| to.contains("precious")).collect();
        assert_eq!(files, Vec::<&String>::new(), "{open:?}");
    }
    let of_plugin = inodes(plugin.pid());
    assert!(!of_plugin.is_empty());
    for who in [pid("supervisor"), nspawn, pid("leader")] {
        let shared: Vec<_> = inodes(who).intersection(&of_plugin).cloned().collect();
        assert_eq!(shared, Vec::<String>::new(), "the plugin's own");
    }
    let directory = state["state"].as_str().unwrap();
    let open = descriptors(pid("supervisor")).unwrap();
    let streams = [
        "/dev/null",
        "/memfd:nspawn-init (deleted)",
        &format!("{directory}/log"),
    ];
    assert_eq!([0, 1, 2].map(|number| &*open[&number]), streams);
    let beside: BTreeSet<&str> = open.range(3..).map(|(_, kind)| kind.as_str()).collect();
    assert_eq!(beside, BTreeSet::from(["signalfd", "socket", "pidfd"]));
    let open = descriptors(nspawn).unwrap();
    let streams = ["/dev/null", "/dev/null", &format!("{directory}/words")];
    assert_eq!([0, 1, 2].map(|number| &*open[&number]), streams);
    let tree = case.stage.join("tree");
    let lock = tree.with_file_name(".#tree.lck");
    for (number, to) in open.range(3..) {
        let own = NSPAWN_MAKES.contains(&to.as_str())
            || Path::new(to) == lock
            || to.starts_with("/run/systemd/nspawn/locks/");
        assert!(own, "{number}: {to}");
    }
    let leader: Vec<i32> = descriptors(pid("leader")).unwrap().into_keys().collect();
    assert_eq!(leader, [0, 1, 2]);
    running.destroy(&plugin).await;
    end(plugin).await;
    case.stage.leave();
}

/// A core file would be in `/`, the working directory of supervisor and systemd-nspawn, or wherever the machine stores them; the search for
/// the marker finds it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_that_aborts_leaves_no_secret() {
    let case = Case::new(Mode::Boot);
    let plugin = case
        .stage
        .plugin_by("ulimit -S -c $(ulimit -H -c); exec \"$0\"")
        .await;
    let task = case.task("");
    let allocation = case.allocation(&task);
    let running = case.stage.start_in(&plugin, &task, allocation).await;
    let running = running.unwrap();
    let nspawn = case.nspawn(&running);
    kill(Pid::from_raw(nspawn), Signal::SIGABRT).unwrap();
    let exit = running.wait(&plugin).await;
    assert_eq!(exit.signal, 6);
    case.search("after its abort", None);
    running.destroy(&plugin).await;
    end(plugin).await;
    case.stage.leave();
}

/// At log level `info`: at `debug` the agent's own log contains the text of templates, which no driver can prevent.
#[test]
fn no_secret_shows_with_a_real_agent() {
    let agent = Agent::logging("INFO");
    let marker = Marker::new();
    let since = secrecy::now();
    let tree = agent.join("tree");
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/secrets.nomad.hcl");
    let variables = [
        ("image", tree.to_str().unwrap()),
        ("secret", &*marker.secret("x")),
    ];
    let task = agent.run(&file, &variables);
    task.printed("up");
    let token = fs::read_to_string(task.dir().join("secrets/nomad_token")).unwrap();
    let token = Marker::from(token.trim().to_owned());
    let leader = i32::try_from(task.leader()).unwrap();
    let inside = environment(leader).unwrap();
    assert!(marker.is_in(inside["DB_PASSWORD"].as_bytes()));
    assert!(marker.is_in(inside["FROM_TEMPLATE"].as_bytes()));
    assert!(token.is_in(inside["NOMAD_TOKEN"].as_bytes()));
    // The leader is systemd-nspawn's child.
    let nspawn = ancestry(leader)[1];
    // Nomad's own data, which contains the job.
    let spared = [agent.join("data"), agent.join("plugins")];
    let own = agent.join("");
    let look = |when: &str, nspawn: Option<i32>| {
        for secret in [&marker, &token] {
            let places = (own.as_path(), &spared[..]);
            search(when, secret, Mode::Plain, nspawn, places, &[], since);
        }
    };
    look("while it runs", Some(nspawn));
    let plugin = agent.plugin();
    kill(Pid::from_raw(plugin), Signal::SIGKILL).unwrap();
    until("another plugin", || {
        (agent.plugin() != plugin).then_some(())
    });
    look("recovered", Some(nspawn));
    assert_eq!(task.stop(), [0]);
    look("after the end", None);
    let reported = task.task().to_string();
    marker.not_in("what Nomad tells of the task", &reported);
    token.not_in("what Nomad tells of the task", &reported);
    agent.leave();
}
