//! Secrets: no value of a variable, no template's content and no token is visible on the host, neither while a task with them runs nor
//! after it has died in any way; and no process gets a descriptor or a variable that it does not need. Uses the fake, which takes values in
//! the same way as each version of systemd-nspawn.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_agent::{Allocation, HostError, Launch, Plugin};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::proto::driver::fingerprint_response::HealthState;
use nomad_driver_nspawn::proto::driver::{DriverTaskEvent, FingerprintRequest};
use nomad_driver_nspawn::sys::process::first_child;
use rstest::rstest;
use serde_json::{Value, json};
use support::not_applicable;
use tokio::task::JoinHandle;

use crate::harness::{Host, Running, Task, argv, eventually, is_root, refusal, within};
use crate::lifecycle::nothing_left;
use support::trap::Trap;

use support::secrecy::{self, Marker, Mode, ancestry, descriptors, open_to_others, shown};

mod processes;
mod refusals;

/// A variable that obviously contains a secret.
const SECRET: &str = "DB_PASSWORD";

/// Not a valid variable name.
const NO_NAME: &str = "no=name";

/// The files that contain the secrets until the start has read them.
const ON_DISK: [&str; 2] = ["environment", "init"];

const ON_AND_ON: &str = "echo up; exec sleep 1000";

/// One task with secrets, and where they may be.
struct Case {
    host: Host,
    marker: Marker,
    mode: Mode,
    version: u32,
    since: i64,
}

/// How a task with secrets ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Exit(i32),
    Signal(i32),
    Stop,
    Leader,
    /// The leader's child: the driver's own init if there is one, or the command.
    Inside,
    Nspawn,
    Supervisor,
    Plugin,
}

const DEATHS: [Death; 9] = [
    Death::Exit(0),
    Death::Exit(3),
    Death::Signal(11),
    Death::Stop,
    Death::Leader,
    Death::Inside,
    Death::Nspawn,
    Death::Supervisor,
    Death::Plugin,
];

impl Case {
    fn new(mode: Mode, version: u32) -> Self {
        let host = Host::new();
        host.scenario(&json!({"version": version}));
        Self {
            host,
            marker: Marker::new(),
            mode,
            version,
            since: secrecy::now(),
        }
    }

    /// A task of this mode with secrets in its environment.
    fn task(&self, script: &str) -> Task {
        let task = self.host.shell(script);
        let task = match self.mode {
            Mode::Plain => task,
            Mode::ProcessTwo => task.with("process_two", json!(true)),
            Mode::Boot => task.with("boot", json!(true)).with("command", json!([])),
        };
        task.env(SECRET, &self.marker.secret("value"))
            .env("NOMAD_TOKEN", &self.marker.secret("token"))
            .env("LINES", &format!("a\n{}\n", self.marker.secret("lines")))
    }

    /// An allocation as Nomad creates it, with the files of a template and a token.
    fn allocation(&self, task: Task) -> Arc<Allocation> {
        let allocation = self.host.allocation(task);
        let secrets = allocation.task_dir().join("secrets");
        for name in ["file.env", "nomad_token"] {
            fs::write(secrets.join(name), self.marker.secret(name)).unwrap();
        }
        Arc::new(allocation)
    }

    /// Directories that may contain the secrets: Nomad's own, and that of the fake's scenario and call log.
    fn spared(&self) -> Vec<PathBuf> {
        ["alloc", "bin"].map(|name| self.host.join(name)).into()
    }

    /// Searches the whole host. `nspawn` is the running systemd-nspawn.
    fn search(&self, when: &str, nspawn: Option<i32>) {
        self.search_but(when, nspawn, &[]);
    }

    /// The same, but files with these names in the task directory may contain the secrets. Returns how many files do.
    fn search_but(&self, when: &str, nspawn: Option<i32>, on_disk: &[&str]) -> usize {
        let lines = self.marker.in_command_lines();
        // If the arguments contain them, so does the launch spec, which only root can read.
        let expects = shown(self.mode, self.version, false).is_some();
        let expected: Vec<i32> = nspawn.into_iter().filter(|_| expects).collect();
        let seen: Vec<i32> = lines.keys().copied().collect();
        assert_eq!(seen, expected, "{when}: command lines: {lines:?}");
        for (pid, name) in self.marker.in_environments() {
            let inside = nspawn.is_some_and(|nspawn| ancestry(pid).contains(&nspawn));
            assert!(inside, "{when}: the environment of {name} ({pid}) has it");
        }
        let mut places = secrecy::places();
        places.push((self.host.path(), usize::MAX));
        let files = self.marker.in_files(&places, &self.spared(), self.since);
        let kept = |path: &&PathBuf| {
            let of_a_start =
                path.parent().and_then(Path::parent) == Some(self.host.state().as_path());
            let name = path.file_name().and_then(|name| name.to_str()).unwrap();
            of_a_start && (on_disk.contains(&name) || (expects && name == "order"))
        };
        let others: Vec<&PathBuf> = files.iter().filter(|path| !kept(path)).collect();
        assert_eq!(others, Vec::<&PathBuf>::new(), "{when}: files have it");
        assert_eq!(
            open_to_others(&self.host.state()),
            Vec::<String>::new(),
            "{when}"
        );
        let log = self.host.log().text().join("\n");
        self.marker.not_in("the plugin's log", &log);
        files.len()
    }

    fn nspawn(&self) -> i32 {
        let starts = self.host.starts();
        let pid = starts.last().expect("a start")["pid"].as_i64().unwrap();
        i32::try_from(pid).unwrap()
    }

    async fn dies(&self, plugin: Plugin, death: Death) -> Plugin {
        // In `boot` mode the init is simulated and runs no script.
        let instead = match death {
            Death::Exit(code) if self.mode == Mode::Boot => json!({"exit": code}),
            Death::Signal(number) if self.mode == Mode::Boot => json!({"signal": number}),
            _ => Value::Null,
        };
        let task = match death {
            Death::Exit(code) => self.task(&format!("exit {code}")),
            Death::Signal(number) => self.task(&format!("kill -{number} $$")),
            _ => self.task(ON_AND_ON),
        };
        // No program can get this variable: an event reports it.
        let task = task.env(NO_NAME, &self.marker.secret("event"));
        self.host
            .scenario(&json!({"version": self.version, "calls": [{"instead": instead}]}));
        let allocation = self.allocation(task);
        let running = self.host.start_in(&plugin, allocation).await;
        let running = running.unwrap_or_else(|error| panic!("{error}"));
        let kept = String::from_utf8_lossy(&running.started.handle.driver_state).into_owned();
        self.marker.not_in("the state that Nomad keeps", &kept);
        let by_itself = matches!(death, Death::Exit(_) | Death::Signal(_));
        if !by_itself {
            self.is_up(&running).await;
            self.search("while it runs", Some(self.nspawn()));
        }
        let plugin = self.strike(plugin, &running, death).await;
        let exit = running.wait(&plugin).await;
        self.marker.not_in("the exit", &format!("{exit:?}"));
        let reported = running.inspect(&plugin).await.unwrap();
        self.marker
            .not_in("what InspectTask says", &format!("{reported:?}"));
        // The exit is reported once the processes have been killed; the kernel needs a moment to end them.
        eventually("the end of all processes of the task", || {
            self.marker.in_environments().is_empty()
        })
        .await;
        self.search(&format!("after {death:?}"), None);
        running.destroy(&plugin).await;
        let said = running.stdout.all().await + &running.stderr.all().await;
        self.marker.not_in("the task's log", &said);
        nothing_left(&self.host, &plugin).await;
        self.search(&format!("destroyed after {death:?}"), None);
        plugin
    }

    /// Waits until the payload runs and has the secrets, so that the search has something to find.
    async fn is_up(&self, running: &Running) {
        if self.mode != Mode::Boot {
            running.stdout.contains("up").await;
        }
        let inside = || {
            let found = self.marker.in_environments();
            let leader = running.leader();
            found.keys().any(|pid| ancestry(*pid).contains(&leader))
        };
        eventually("the payload has its secrets", inside).await;
    }

    async fn strike(&self, mut plugin: Plugin, running: &Running, death: Death) -> Plugin {
        let pid = |name: &str| {
            let pid = running.state(&[name, "pid"]).as_i64().unwrap();
            i32::try_from(pid).unwrap()
        };
        let end = |pid: i32| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        match death {
            Death::Exit(_) | Death::Signal(_) => {}
            Death::Stop => {
                running.stop(&plugin, Duration::from_millis(100), "").await;
            }
            Death::Leader => end(pid("leader")),
            Death::Inside => end(first_child(pid("leader")).expect("a payload")),
            Death::Nspawn => end(self.nspawn()),
            Death::Supervisor => end(pid("supervisor")),
            Death::Plugin => {
                plugin.kill().await;
                self.search("without a plugin", Some(self.nspawn()));
                plugin = self.host.recovered(running).await;
                self.search("recovered", Some(self.nspawn()));
                running.stop(&plugin, Duration::ZERO, "").await;
            }
        }
        plugin
    }
}

/// Later versions pass values in the same way as 250; they refuse hosts with cgroup v1.
#[rstest]
#[tokio::test]
async fn no_secret_shows_whatever_a_task_dies_of(
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
    #[values(247, 249, 250, 252, 257)] version: u32,
) {
    let case = Case::new(mode, version);
    let mut plugin = case.host.plugin().await;
    let reported = events(&plugin).await;
    // A simulated init has no child.
    let can_be = |death: &Death| mode != Mode::Boot || *death != Death::Inside;
    for death in DEATHS.into_iter().filter(can_be) {
        plugin = case.dies(plugin, death).await;
    }
    // The last death was that of this plugin, so its event stream has ended.
    let reported = within("the end of the events", reported).await.unwrap();
    assert!(reported.contains(NO_NAME), "{reported}");
    case.marker.not_in("an event", &reported);
}

/// Collects all events of a plugin as text until its stream ends.
async fn events(plugin: &Plugin) -> JoinHandle<String> {
    let mut events = plugin.events().await.unwrap();
    tokio::spawn(async move {
        let mut reported = String::new();
        while let Ok(Some(event)) = events.message().await {
            reported += &format!("{event:?}\n");
        }
        reported
    })
}

/// While the secrets are in files on disk, and while they are handed over: no other process has them at these moments.
#[rstest]
#[tokio::test]
async fn no_secret_shows_while_a_start_stands_still(
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
    #[values(
        Failpoint::OrderWritten,
        Failpoint::CgroupMade,
        Failpoint::Entered,
        Failpoint::Spawned,
        Failpoint::Heard
    )]
    point: Failpoint,
) {
    let case = Case::new(mode, 252);
    let plugin = Arc::new(case.host.plugin().await);
    let mut trap = Trap::at(&case.host.state(), point);
    let allocation = case.allocation(case.task(ON_AND_ON));
    let _logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(&plugin));
    let start = tokio::spawn(async move { line.start(config).await });
    let (_, held) = within("the step", trap.reached()).await;
    let (nspawn, on_disk): (_, &[&str]) = match point {
        Failpoint::Entered => (Some(held), &[]),
        // The process continues meanwhile and may or may not have read them.
        Failpoint::Spawned => (first_child(held), &ON_DISK),
        Failpoint::Heard => (first_child(held), &[]),
        _ => (None, &ON_DISK),
    };
    let found = case.search_but(&format!("at {point:?}"), nspawn, on_disk);
    let lie_there = matches!(point, Failpoint::OrderWritten | Failpoint::CgroupMade);
    assert!(!lie_there || found > 0, "nothing was there to be found");
    drop(trap);
    within("StartTask", start).await.unwrap().unwrap();
    case.search("while it runs", Some(case.nspawn()));
    within("DestroyTask", plugin.destroy(&id, true))
        .await
        .unwrap();
    nothing_left(&case.host, &plugin).await;
    case.search("destroyed", None);
}

/// Names that systemd-nspawn or one of its libraries would act on.
#[rstest]
#[case(Mode::Plain)]
#[case(Mode::ProcessTwo)]
#[case(Mode::Boot)]
#[tokio::test]
async fn names_that_systemd_reads_never_reach_its_environment(#[case] mode: Mode) {
    let case = Case::new(mode, 252);
    let plugin = case.host.plugin().await;
    let names = ["LD_PRELOAD", "SYSTEMD_LOG_LEVEL", "PKCS11_PIN"];
    let job = names.iter().fold(case.host.shell("exit 0"), |job, name| {
        job.env(name, &case.marker.secret(name))
    });
    let job = match mode {
        Mode::Plain => job,
        Mode::ProcessTwo => job.with("process_two", json!(true)),
        Mode::Boot => job.with("boot", json!(true)).with("command", json!([])),
    };
    let task = case.host.start(&plugin, job).await;
    let start = &case.host.starts()[0];
    let environment = crate::harness::environment(start);
    let shows = shown(mode, 252, true).is_some();
    for name in names {
        let secret = case.marker.secret(name);
        assert!(
            !environment.values().any(|value| *value == secret),
            "{name}"
        );
        let word = format!("--setenv={name}={secret}");
        assert_eq!(argv(start).contains(&word), shows, "{name}");
    }
    task.destroy(&plugin).await;
}

/// The cause of a failed start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NoImage,
    ImageIsNoTree,
    BadOption,
    OptionWithASecret,
    LongOptionWithASecret,
    ValueWithNul,
    ValueTooLong,
    BadName,
    NspawnRefuses,
    NspawnDies,
    NoNspawn,
    NoStateDir,
}

#[rstest]
#[tokio::test]
async fn no_failed_start_shows_a_secret(
    #[values(
        Fault::NoImage,
        Fault::ImageIsNoTree,
        Fault::BadOption,
        Fault::OptionWithASecret,
        Fault::LongOptionWithASecret,
        Fault::ValueWithNul,
        Fault::ValueTooLong,
        Fault::BadName,
        Fault::NspawnRefuses,
        Fault::NspawnDies,
        Fault::NoNspawn,
        Fault::NoStateDir
    )]
    fault: Fault,
    #[values(Mode::Plain, Mode::ProcessTwo, Mode::Boot)] mode: Mode,
) {
    let case = Case::new(mode, 252);
    let secret = case.marker.secret("value");
    let (task, words) = match fault {
        Fault::NoImage => {
            let missing = case.host.join("missing");
            (
                case.task(ON_AND_ON).with("image", json!(missing)),
                "config.image",
            )
        }
        Fault::ImageIsNoTree => {
            let empty = case.host.join("empty");
            fs::create_dir(&empty).unwrap();
            (case.task(ON_AND_ON).with("image", json!(empty)), "")
        }
        Fault::BadOption => {
            let task = case.task(ON_AND_ON).with("volatile", json!("maybe"));
            (task, "config.volatile: \"maybe\"")
        }
        Fault::OptionWithASecret => {
            let task = case.task(ON_AND_ON).with("volatile", json!(secret));
            (task, "config.volatile: \"${DB_PASSWORD}\"")
        }
        Fault::LongOptionWithASecret => {
            let long = format!("{}{}", "x".repeat(190), secret);
            let task = case.task(ON_AND_ON).with("bind", json!([{(long): "/srv"}]));
            (task, "config.bind")
        }
        Fault::ValueWithNul => {
            let task = case.task(ON_AND_ON).env("OTHER", &format!("{secret}\0"));
            (task, "task.env[\"OTHER\"]: a NUL")
        }
        Fault::ValueTooLong => {
            let task = case.task(ON_AND_ON).env("OTHER", &secret.repeat(8000));
            (task, "task.env[\"OTHER\"]: has ")
        }
        Fault::BadName => {
            let task = case
                .task(ON_AND_ON)
                .with("environment", json!([{"a=b": secret.clone()}]));
            (task, "config.environment[\"a=b\"]")
        }
        Fault::NspawnRefuses => {
            let call = json!({"refuse": {"status": 1, "stderr": "Failed to fork: out of luck"}});
            case.host.scenario(&json!({"calls": [call]}));
            (case.task(ON_AND_ON), "status 1")
        }
        Fault::NspawnDies => {
            case.host
                .scenario(&json!({"calls": [{"die_before_notify": 11}]}));
            (case.task(ON_AND_ON), "SIGSEGV")
        }
        Fault::NoNspawn | Fault::NoStateDir => (case.task(ON_AND_ON), "plugin."),
    };
    let options = match fault {
        Fault::NoNspawn => json!({"nspawn_path": "/proc/self/mem"}),
        Fault::NoStateDir => json!({"state_dir": "/proc/self/mem"}),
        _ => json!({}),
    };
    let words = if fault == Fault::NoNspawn {
        "nspawn_path"
    } else {
        words
    };
    let plugin = case.host.plugin_with(&options).await;
    let mut events = plugin.events().await.unwrap();
    let error = case.host.start_in(&plugin, case.allocation(task)).await;
    let text = refusal(error).message().to_owned();
    assert!(text.contains(words), "{text}");
    case.marker.not_in("the error", &text);
    case.search(&format!("after {fault:?}"), None);
    // A last task that starts emits the last event of the stream.
    case.host.scenario(&json!({}));
    plugin.configure(&case.host.config()).await.unwrap();
    let last = case.host.shell("exit 0").env("last=one", "x");
    let last = case.host.start(&plugin, last).await;
    loop {
        let event: DriverTaskEvent = within("an event", events.message()).await.unwrap().unwrap();
        case.marker.not_in("an event", &format!("{event:?}"));
        if event.task_id == last.id {
            break;
        }
    }
    last.destroy(&plugin).await;
}

/// The start has succeeded before this failure is known, so it is reported as an exit.
#[rstest]
#[case("/no/such/program")]
#[case("/etc/passwd")]
#[tokio::test]
async fn a_command_that_can_not_run_shows_no_secret(#[case] command: &str) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let case = Case::new(mode, 252);
        let plugin = case.host.plugin().await;
        let task = case.task(ON_AND_ON).with("command", json!([command]));
        let task = case.host.start_in(&plugin, case.allocation(task)).await;
        let task = task.unwrap();
        let exit = task.wait(&plugin).await;
        assert_ne!(exit.code, 0);
        case.marker.not_in("the exit", &format!("{exit:?}"));
        case.search("after the end", None);
        let said = task.stdout.all().await + &task.stderr.all().await;
        case.marker.not_in("the task's log", &said);
        task.destroy(&plugin).await;
    }
}

/// A plugin that is started by this shell script, which ends in `exec "$0"`.
async fn plugin_by(host: &Host, script: &str) -> Plugin {
    let mut launch: Launch = host.launch();
    launch.args = ["-c", script].map(Into::into).into();
    launch.args.push(launch.binary.clone().into());
    launch.binary = "/bin/sh".into();
    within("the plugin's start", async {
        let plugin = Plugin::launch(launch).await.unwrap();
        plugin.configure(&host.config()).await.unwrap();
        plugin
    })
    .await
}
