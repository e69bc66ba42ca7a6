//! What the processes of a task hold and leave: no descriptor and no variable that they do not need, and no core dump.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::sys::process::first_child;
use support::secrecy::{self, Marker, Mode, descriptors, environment, shown};

use super::secrets::Case;
use super::*;

/// The kinds of descriptors that a supervisor has besides its standard streams; how many of each depends on its clients and watched
/// processes.
const SUPERVISOR_HAS: &[&str] = &["eventpoll", "signalfd", "socket", "pidfd"];

/// The variables in systemd-nspawn's own environment. `SYSTEMD_NSPAWN_UNIFIED_HIERARCHY` only if the host has cgroup v2 only.
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

/// Variables of the agent.
const AGENT_HAS: &[&str] = &[
    "AWS_SECRET_ACCESS_KEY",
    "LD_BIND_NOW",
    "NOMAD_TOKEN",
    "VAULT_TOKEN",
];

/// The sockets and pipes that a process has open, by inode, so that shared ones can be recognized. `None` if this user may not read them.
fn inodes(pid: i32) -> Option<BTreeSet<String>> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let names = targets.map(|target| target.to_string_lossy().into_owned());
    let kept = names.filter(|name| name.starts_with("socket:[") || name.starts_with("pipe:["));
    Some(kept.collect())
}

/// A plugin whose agent marks no descriptor close-on-exec, and has tokens of its own in its environment.
async fn plugin_with_everything(world: &impl World, marker: &Marker) -> Plugin {
    let precious = world.join("precious");
    fs::write(&precious, "").unwrap();
    let script = format!(
        "export NOMAD_TOKEN={token} VAULT_TOKEN={token} AWS_SECRET_ACCESS_KEY={token} LD_BIND_NOW=1 NOTIFY_SOCKET=/x; \
         exec 7<{precious} 8>>{precious} 9<{precious}; exec \"$0\"",
        token = marker.secret("token"),
        precious = precious.display()
    );
    let plugin = world.plugin_by(&script).await;
    // Only root can inspect a process that has disabled core dumps.
    let open = descriptors(plugin.pid());
    assert_eq!(open.is_some(), world.lacks(Need::Root).is_none());
    for number in [7, 8, 9] {
        let has = |open: &BTreeMap<i32, String>| open[&number].ends_with("precious");
        assert!(open.as_ref().is_none_or(has), "{open:?}");
    }
    plugin
}

#[rstest]
#[tokio::test]
async fn no_process_gets_a_descriptor_or_variable_it_does_not_need(world: impl World) {
    let marker = Marker::new();
    let plugin = plugin_with_everything(&world, &marker).await;
    let text = "ls -l /proc/self/fd; env; echo payload-started; exec sleep 1000";
    let job = world.shell(text).env("OF_THE_JOB", "x");
    let task = world.start(&plugin, job).await;
    let said = task.stdout.contains("payload-started").await;
    marker.not_in("what the payload sees", &said);
    assert!(said.contains("OF_THE_JOB=x"), "{said}");
    for name in AGENT_HAS.iter().chain(&["precious"]) {
        assert!(!said.contains(name), "{name}: {said}");
    }
    let directory = task.state(&["state"]).as_str().unwrap().to_owned();
    supervisor_has_nothing_of_the_agent(&world, task.supervisor(), &directory).await;

    let nspawn = task.nspawn();
    for (name, value) in environment(nspawn).unwrap() {
        assert!(NSPAWN_KNOWS.contains(&&*name), "{name}={value}");
        marker.not_in("systemd-nspawn's environment", &value);
    }
    let open = descriptors(nspawn).unwrap();
    let words = format!("{directory}/words");
    let streams = ["/dev/null", "/dev/null", &words];
    assert_eq!([0, 1, 2].map(|number| &*open[&number]), streams);
    for (number, to) in open.range(3..) {
        assert!(world.nspawn_opens(to), "systemd-nspawn: {number}: {to}");
    }

    let leader = task.leader();
    for (name, value) in environment(leader).unwrap() {
        marker.not_in(&name, &value);
    }
    // A plain command is the leader itself, except with the fake.
    let command = first_child(leader).unwrap_or(leader);
    // `sleep` opens the files of its locale for a moment.
    let numbers = || descriptors(command).unwrap().into_keys();
    eventually("the command has only its streams open", || {
        numbers().eq([0, 1, 2])
    })
    .await;

    if let Some(of_plugin) = inodes(plugin.pid()) {
        assert!(!of_plugin.is_empty());
        for who in [task.supervisor(), nspawn, leader, command] {
            let own = inodes(who).unwrap();
            let shared: Vec<_> = own.intersection(&of_plugin).collect();
            assert_eq!(shared, Vec::<&String>::new(), "the plugin's own");
        }
    }
    task.destroy(&plugin).await;
    world.leave(plugin).await;
}

async fn supervisor_has_nothing_of_the_agent(world: &impl World, supervisor: i32, directory: &str) {
    if world.lacks(Need::Root).is_some() {
        assert_eq!(descriptors(supervisor), None);
        assert_eq!(environment(supervisor), None);
        return;
    }
    let open = descriptors(supervisor).unwrap();
    let log = format!("{directory}/log");
    // Not the connection of the client that requested the start: the client must see end of file as soon as the supervisor drops it.
    // The memory file is the driver's own init, for systemd-nspawn.
    let streams = ["/dev/null", "/memfd:nspawn-init (deleted)", &log];
    assert_eq!([0, 1, 2].map(|number| &*open[&number]), streams);
    let beside = |open: &BTreeMap<i32, String>| {
        let beside = open.range(3..).map(|(_, kind)| kind.clone());
        beside
            .filter(|kind| !is_counter(kind))
            .collect::<BTreeSet<_>>()
    };
    // It opens a file of a cgroup for a moment after the start, to move systemd-nspawn out of it.
    // The removed file is what further commands get.
    let wanted: BTreeSet<String> = SUPERVISOR_HAS
        .iter()
        .map(|kind| (*kind).to_owned())
        .chain([format!("{directory}/exec (deleted)")])
        .collect();
    eventually("the supervisor has only what it needs", || {
        descriptors(supervisor).is_some_and(|open| beside(&open) == wanted)
    })
    .await;
    assert_eq!(environment(supervisor).unwrap(), [].into());
}

/// Whether a descriptor is the counter of OOM kills, or in cgroup v1 the one on which the kernel reports them.
fn is_counter(kind: &str) -> bool {
    kind == "eventfd" || kind.ends_with("/memory.events") || kind.ends_with("/memory.oom_control")
}

/// Names that systemd-nspawn or one of its libraries would act on.
#[rstest]
#[tokio::test]
async fn names_that_systemd_reads_never_reach_its_environment(
    world: impl World,
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
) {
    let Some(case) = Case::new(world, mode, 252) else {
        return;
    };
    let plugin = case.world.plugin().await;
    let names = ["LD_PRELOAD", "SYSTEMD_LOG_LEVEL", "PKCS11_PIN"];
    let task = case.in_mode(case.world.shell(ON_AND_ON));
    let task = names
        .iter()
        .fold(task, |task, name| task.env(name, &case.marker.secret(name)));
    let task = case.world.start(&plugin, task).await;
    let environment = environment(task.nspawn()).unwrap();
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", task.nspawn())).unwrap();
    let arguments: Vec<&str> = arguments.split_terminator('\0').collect();
    for name in names {
        let secret = case.marker.secret(name);
        let value = environment.get(name);
        assert_ne!(value, Some(&secret), "{name}");
        let word = format!("--setenv={name}={secret}");
        let shows = shown(mode, case.version, true).is_some();
        assert_eq!(arguments.contains(&&*word), shows, "{name}");
    }
    task.destroy(&plugin).await;
    case.world.leave(plugin).await;
}

/// The core files in the directory of the test.
fn core_files(world: &impl World) -> Vec<String> {
    fs::read_dir(world.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("core"))
        .collect()
}

/// Core files of this test's processes would be in their working directories: the plugin's in the test's directory, those of supervisor and
/// systemd-nspawn in `/`, where other programs may leave theirs, so that only the marker identifies them.
#[rstest]
#[tokio::test]
async fn processes_with_secrets_dump_no_core(world: impl World) {
    let Some(mut case) = Case::new(world, Mode::Boot, 252) else {
        return;
    };
    let unlimited = format!(
        "cd {}; ulimit -S -c $(ulimit -H -c); ",
        case.world.path().display()
    );
    // Whether this host writes core dumps at all: if it does not, the search for core files proves nothing, and the checks of limits and
    // status below have to.
    let control = Command::new("/bin/sh")
        .args(["-c", &format!("{unlimited} kill -ABRT $$")])
        .status()
        .unwrap();
    assert_eq!(control.signal(), Some(6));
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
    let to_file = !pattern.starts_with(['|', '@', '\n']) && hard > 0;
    assert!(
        control.core_dumped() || !to_file || pattern.starts_with('/'),
        "{pattern:?} is a file, and yet there is no core dump of a shell"
    );
    for name in core_files(&case.world) {
        fs::remove_file(case.world.join(name)).unwrap();
    }
    case.since = secrecy::now();
    let script = format!("{unlimited} exec \"$0\"");
    let mut plugin = case.world.plugin_by(&script).await;
    for who in ["supervisor", "nspawn", "plugin"] {
        plugin = aborted(&case, plugin, who).await;
        case.search(&format!("after the {who}'s abort"), None);
    }
    assert_eq!(core_files(&case.world), Vec::<String>::new());
    case.world.leave(plugin).await;
}

/// Starts a task with secrets, aborts this process of it and destroys the task. Returns the plugin, or the one that follows it.
async fn aborted<W: World>(case: &Case<W>, mut plugin: Plugin, who: &str) -> Plugin {
    let allocation = case.allocation(case.task(ON_AND_ON));
    let task = case.world.start_in(&plugin, allocation).await.unwrap();
    case.is_up(&task).await;
    let pid = match who {
        "supervisor" => task.supervisor(),
        "nspawn" => task.nspawn(),
        _ => plugin.pid(),
    };
    if who == "nspawn" {
        // exec has made it dumpable again; its core limit prevents the dump.
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max core"));
        let words: Vec<_> = line.unwrap().split_whitespace().collect();
        assert!(["0", "1"].contains(&words[4]), "{words:?}");
        assert!(descriptors(pid).is_some(), "{who} can be read");
    } else {
        let is_root = case.world.lacks(Need::Root).is_none();
        assert_eq!(descriptors(pid).is_some(), is_root, "{who} can be read");
    }
    kill(Pid::from_raw(pid), Signal::SIGABRT).unwrap();
    match who {
        "supervisor" => {
            // It blocks all signals, so the SIGABRT has no effect.
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            task.wait(&plugin).await;
        }
        "nspawn" => assert_eq!(task.wait(&plugin).await.signal, 6),
        _ => {
            let status = within("its end", plugin.gone()).await.unwrap();
            assert_eq!((status.signal(), status.core_dumped()), (Some(6), false));
            plugin = case.world.recovered(&task).await;
        }
    }
    task.destroy(&plugin).await;
    plugin
}
