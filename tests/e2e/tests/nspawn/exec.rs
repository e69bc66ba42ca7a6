//! Commands in a booted system. Real only: a real init, namespaces and limits of the kernel.

use futures_util::future::join_all;
use nomad_driver_nspawn::cgroup::Layout;
use rstest::rstest;
use support::wire::Task;

use super::*;

/// Prints what restricts a process, except for its inheritable capabilities: a command has those of systemd, and a
/// unit has none.
const FACTS: &str = "grep -E '^(Uid|Gid|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Seccomp_filters):' /proc/self/status
for name in user mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$name; done
";
/// How many commands are started at once. On an emulated processor (`NOMAD_DRIVER_NSPAWN_E2E_EMULATED`) fewer, or they take so long that
/// requests time out.
const AT_ONCE: usize = 20;
const AT_ONCE_EMULATED: usize = 5;
/// Ignores the signals that a shutdown sends, like its child, which is in a session of its own.
const DEAF: &str =
    "trap '' HUP INT TERM; setsid /bin/sh -c 'sleep 1000; sleep 1000' & echo up; wait";

/// A Debian system whose last unit writes what restricts it to `/local/facts`.
struct Debian {
    stage: Stage,
    plugin: Plugin,
    running: Running,
}

impl Debian {
    /// Starts one, and does not wait until it is up.
    async fn start(edit: impl FnOnce(Task) -> Task) -> Self {
        let stage = Stage::new();
        let tree = stage.join("debian");
        debian::copy(
            &tree,
            "/bin/sh /srv/facts >/local/new && mv /local/new /local/facts",
            "echo stopped >/local/stopped",
        );
        fs::write(tree.join("srv/facts"), FACTS).unwrap();
        let plugin = stage.plugin().await;
        let task = stage.words(&[]).with("image", json!(tree));
        let running = stage.start(&plugin, edit(task.with("boot", true))).await;
        Self {
            stage,
            plugin,
            running,
        }
    }

    fn written(&self, name: &str) -> Option<String> {
        let local = self.running.allocation.task_dir().join("local");
        fs::read_to_string(local.join(name)).ok()
    }

    /// Waits until all units are started.
    fn up(&self) {
        tokio::task::block_in_place(|| until("the last unit", || self.written("facts")));
    }

    /// Runs a shell script to its end; returns its output and exit code.
    async fn run(&self, script: &str) -> (String, i32) {
        let command = ["/bin/sh", "-c", script];
        let ended = self.plugin.exec(&self.running.id, &command, None);
        let ended = within("ExecTask", ended).await;
        let ended = ended.unwrap_or_else(|error| panic!("{error}\n{}", self.stage.log()));
        (String::from_utf8(ended.stdout).unwrap(), ended.code)
    }

    /// Runs a shell script until it prints `up`.
    async fn run_on(&self, script: &str) -> dev_agent::ExecSession {
        let command = ["/bin/sh", "-c", script];
        let session = self.plugin.exec_streaming(&self.running.id, &command, None);
        let mut session = within("the start", session).await.unwrap();
        let mut printed = Vec::new();
        while printed != b"up\n" {
            let response = within("the command's first word", session.next()).await;
            let response = response.unwrap().expect("it has ended");
            printed.extend(response.stdout.unwrap_or_default().data);
        }
        session
    }

    /// A counter of a controller in the cgroup of the task.
    fn count(&self, controller: &str, version_1: &str, version_2: &str) -> u64 {
        let group = |path: &[&str]| self.running.state(path).as_str().map(PathBuf::from);
        let file = match group(&["controllers", controller]) {
            Some(group) => group.join(version_1),
            None => group(&["cgroup"]).unwrap().join(version_2),
        };
        fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    async fn leave(self) {
        self.running.destroy(&self.plugin).await;
        end(self.plugin).await;
        self.stage.leave();
    }
}

/// systemd in the container enables controllers in its cgroup soon after its start, and from then on no process can join that one.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booting_system_runs_commands_as_restricted_as_its_units(
    #[values(false, true)] users: bool,
) {
    let debian = Debian::start(|task| task.with("user_namespacing", users)).await;
    let mut facts = debian.written("facts");
    assert_eq!(facts, None, "the boot is over before the first command");
    let emulated = std::env::var_os("NOMAD_DRIVER_NSPAWN_E2E_EMULATED").is_some();
    let at_once = if emulated { AT_ONCE_EMULATED } else { AT_ONCE };
    let script = "cat /proc/self/cgroup; echo; . /srv/facts";
    let mut outputs = Vec::new();
    loop {
        let is_up = facts.is_some();
        outputs.extend(join_all((0..at_once).map(|_| debian.run(script))).await);
        if is_up {
            break;
        }
        facts = debian.written("facts");
    }
    for (output, code) in outputs {
        assert_eq!(code, 0, "{output}");
        let (groups, own_facts) = output.split_once("\n\n").unwrap();
        assert_eq!(Some(own_facts), facts.as_deref());
        let tracking = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let tracking = tracking.unwrap_or_else(|| panic!("no cgroup v2: {groups}"));
        let name = tracking.strip_prefix("/nomad-exec-");
        let name = name.and_then(|name| name.strip_suffix(".scope"));
        assert!(name.is_some_and(|name| !name.contains('/')), "{groups}");
    }
    let script = "for process in 1 self; do grep ^CapInh: /proc/$process/status; done";
    let (output, code) = debian.run(script).await;
    let [of_systemd, of_the_command] = *output.lines().collect::<Vec<_>>() else {
        panic!("{output}");
    };
    assert_eq!((of_the_command, code), (of_systemd, 0));
    debian.leave().await;
}

/// An init that powers off waits up to 90 seconds for processes that ignore SIGTERM.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_ignores_signals_does_not_delay_the_shutdown(
    #[values(false, true)] users: bool,
) {
    let debian = Debian::start(|task| task.with("user_namespacing", users)).await;
    debian.up();
    let session = debian.run_on(DEAF).await;
    // The task would be killed after that.
    let exit = debian.running.stop(&debian.plugin, AMPLE, "").await;
    assert_eq!((exit.code, exit.signal), (0, 0), "{exit:?}");
    assert_eq!(debian.written("stopped").as_deref(), Some("stopped\n"));
    let ended = within("the end of the session", session.finish()).await;
    assert!(
        ended.as_ref().map_or(true, |output| output.signal == 9),
        "{ended:?}"
    );
    debian.leave().await;
}

/// Whether tasks have limits of memory and of processes; reports the reason if not.
fn has_limits() -> bool {
    let usable = Layout::of_this_host().usable_controllers();
    let has = usable.contains("memory") && usable.contains("pids");
    if !has {
        support::not_applicable("needs the controllers memory and pids");
    }
    has
}

fn limited(task: Task) -> Task {
    let task = task.with_memory(256).with("memory_swap", "256m");
    task.with("pids_limit", 200)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_counts_in_the_limits_of_the_task() {
    const MIB: u64 = 1 << 20;
    if !has_limits() {
        return;
    }
    let debian = Debian::start(limited).await;
    debian.up();
    let memory = || debian.count("memory", "memory.usage_in_bytes", "memory.current");
    let pids = || debian.count("pids", "pids.current", "pids.current");
    let before = (memory(), pids());
    // tail keeps a line without an end in memory.
    let script = "exec 3>&1; for i in $(seq 100); do sleep 1000 & done
        (head -c 67108864 /dev/zero; echo up >&3; sleep 1000) | tail -n 1 >/dev/null";
    let session = debian.run_on(script).await;
    tokio::task::block_in_place(|| {
        let counted =
            || (memory() >= before.0 + 48 * MIB && pids() >= before.1 + 100).then_some(());
        until("both are counted", counted);
    });
    let (output, code) = debian
        .run("i=0; while test $i -lt 200; do sleep 1000 & i=$((i + 1)); done")
        .await;
    assert_ne!(code, 0, "no limit of processes: {output}");
    drop(session);
    debian.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_killed_for_its_memory_is_an_event_of_the_task() {
    if !has_limits() {
        return;
    }
    let debian = Debian::start(limited).await;
    debian.up();
    let mut events = debian.plugin.events().await.unwrap();
    let (output, code) = debian
        .run("x=0123456789abcdef; while :; do x=$x$x; done")
        .await;
    assert_eq!(code, 137, "{output}");
    within("the event", async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.message.contains("OOM kills so far: 1") {
                assert_eq!(event.task_id, debian.running.id);
                break;
            }
        }
    })
    .await;
    assert_eq!(debian.run("echo on").await, ("on\n".to_owned(), 0));
    debian.leave().await;
}
