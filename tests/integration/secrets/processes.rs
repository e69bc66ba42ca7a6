//! What the driver's processes hold, and what they leave.

use super::*;

/// The kinds of descriptors that a supervisor has besides its standard streams; how many of each depends on its clients and watched
/// processes.
const SUPERVISOR_HAS: &[&str] = &["signalfd", "socket", "pidfd"];

/// The descriptors of systemd-nspawn besides its standard streams: channel, stdout, stderr, binary and init spec of the driver's own init.
const NSPAWN_GETS: &[i32] = &[3, 4, 5, 6, 7];

/// The variables in systemd-nspawn's own environment besides the task's. `SYSTEMD_NSPAWN_UNIFIED_HIERARCHY` only if the host has cgroup v2
/// only.
const NSPAWN_KNOWS: &[&str] = &[
    "LANG",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "PATH",
    "SYSTEMD_LOG_COLOR",
    "SYSTEMD_LOG_TARGET",
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY",
];

/// The agent of this test marks no descriptor close-on-exec, and has tokens of its own in its environment.
#[tokio::test]
async fn no_one_gets_a_descriptor_or_a_variable_that_it_does_not_need() {
    let host = Host::new();
    let marker = Marker::new();
    fs::write(host.join("precious"), "").unwrap();
    let script = format!(
        "export NOMAD_TOKEN={token} VAULT_TOKEN={token} AWS_SECRET_ACCESS_KEY={token} LD_BIND_NOW=1 NOTIFY_SOCKET=/x; \
         exec 7<{precious} 8>>{precious} 9<{precious}; exec \"$0\"",
        token = marker.secret("token"),
        precious = host.join("precious").display()
    );
    let plugin = host.plugin_by(&script).await;
    for number in [7, 8, 9] {
        let inherited = descriptors(plugin.pid());
        // Only root can inspect a process that has disabled core dumps.
        assert_eq!(inherited.is_some(), is_root());
        if let Some(inherited) = inherited {
            assert!(inherited[&number].ends_with("precious"));
        }
    }
    let task = host
        .start(
            &plugin,
            host.shell("ls -l /proc/self/fd; env; echo up; exec sleep 1000"),
        )
        .await;
    let said = task.stdout.contains("up").await;
    marker.not_in("what the payload sees", &said);
    assert!(!said.contains("precious"), "{said}");

    let supervisor = i32::try_from(task.state(&["supervisor", "pid"]).as_i64().unwrap()).unwrap();
    if is_root() {
        let open = descriptors(supervisor).unwrap();
        let directory = task.state(&["state"]).as_str().unwrap().to_owned();
        // Not the connection of the client that requested the start: the client must see end of file as soon as the supervisor drops it.
        assert_eq!(open[&0], "/dev/null");
        // The driver's own init, for systemd-nspawn.
        assert_eq!(open[&1], "/memfd:nspawn-init (deleted)");
        assert_eq!(open[&2], format!("{directory}/log"));
        let beside: BTreeSet<&str> = open.range(3..).map(|(_, kind)| kind.as_str()).collect();
        assert_eq!(beside, SUPERVISOR_HAS.iter().copied().collect());
        assert_eq!(secrecy::environment(supervisor).unwrap(), [].into());
    } else {
        assert_eq!(descriptors(supervisor), None);
        assert_eq!(secrecy::environment(supervisor), None);
    }

    // As systemd-nspawn itself saw them when it was executed.
    let start = &host.starts()[0];
    let numbers: Vec<i32> = start["descriptors"]
        .as_object()
        .unwrap()
        .keys()
        .map(|number| number.parse().unwrap())
        .collect();
    let expected: Vec<i32> = [0, 1, 2].iter().chain(NSPAWN_GETS).copied().collect();
    assert_eq!(numbers, expected, "{}", start["descriptors"]);
    assert_eq!(start["descriptors"]["0"], "/dev/null");
    let environment = crate::harness::environment(start);
    let given: BTreeSet<String> = argv(start)
        .iter()
        .filter_map(|word| word.strip_prefix("--setenv=").map(str::to_owned))
        .collect();
    for (name, value) in &environment {
        let known = NSPAWN_KNOWS.contains(&name.as_str()) || given.contains(name);
        assert!(known, "{name}={value}");
        marker.not_in("systemd-nspawn's environment", value);
    }
    // The same for the container's PID 1.
    let leader = secrecy::environment(task.leader()).unwrap();
    for (name, value) in leader {
        marker.not_in(&name, &value);
    }
    task.destroy(&plugin).await;
}

/// Core files of this test's processes would be in their working directories: the plugin's in the test's directory, those of supervisor and
/// systemd-nspawn in `/`, where other programs may leave theirs, so that only the marker identifies them.
#[tokio::test]
async fn who_holds_secrets_dumps_no_core() {
    let mut case = case(Mode::Boot);
    let unlimited = format!(
        "cd {}; ulimit -S -c $(ulimit -H -c); ",
        case.world.path().display()
    );
    // Whether this host writes core dumps at all: if it does not, the search for core files proves nothing, and the checks of limits and
    // status below have to.
    let control = std::process::Command::new("/bin/sh")
        .args(["-c", &format!("{unlimited} kill -ABRT $$")])
        .status()
        .unwrap();
    assert_eq!(control.signal(), Some(6));
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    let to_file = !pattern.starts_with(['|', '@', '\n']) && hard > 0;
    assert!(
        control.core_dumped() || !to_file || pattern.starts_with('/'),
        "{pattern:?} is a file, and yet there is no core dump of a shell"
    );
    for entry in fs::read_dir(case.world.path()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("core") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    case.since = secrecy::now();
    let mut plugin = case
        .world
        .plugin_by(&format!("{unlimited} exec \"$0\""))
        .await;
    for who in ["supervisor", "nspawn", "plugin"] {
        let allocation = case.allocation(case.task(ON_AND_ON));
        let task = case.world.start_in(&plugin, allocation).await.unwrap();
        case.is_up(&task).await;
        let supervisor = task.state(&["supervisor", "pid"]).as_i64().unwrap();
        let pid = match who {
            "supervisor" => i32::try_from(supervisor).unwrap(),
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
            assert_eq!(descriptors(pid).is_some(), is_root(), "{who} can be read");
        }
        kill(Pid::from_raw(pid), Signal::SIGABRT).unwrap();
        if who == "plugin" {
            let status = within("its end", plugin.gone()).await.unwrap();
            assert_eq!((status.signal(), status.core_dumped()), (Some(6), false));
            plugin = case.world.recovered(&task).await;
        } else if who == "supervisor" {
            // It blocks all signals, so the SIGABRT has no effect.
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        if who != "plugin" {
            task.wait(&plugin).await;
        }
        task.destroy(&plugin).await;
        case.search(&format!("after the {who}'s abort"), None);
    }
    let dumped: Vec<_> = fs::read_dir(case.world.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("core"))
        .collect();
    assert_eq!(dumped, Vec::<String>::new());
}
