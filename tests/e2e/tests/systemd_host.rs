//! Tier (c) and the guest: what only a host with systemd as its first process can do to a task. systemd writes the limits of its own units
//! again when it is reloaded, and a limit in a group that it takes for its own is lost then.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dev_agent::{Plugin, handshake};
use e2e::stage::{Running, Stage, end};
use e2e::until;
use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::container::CgroupLayout;
use nomad_driver_nspawn::proto::driver::TaskConfig;
use nomad_driver_nspawn::sys::procfs;
use support::limits::Dump;
use support::{not_applicable, within};

const AMPLE: Duration = Duration::from_secs(30);

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {}: {output:?}",
        words.join(" ")
    );
    String::from_utf8(output.stdout).unwrap()
}

fn systemctl(words: &[&str]) -> String {
    run("systemctl", words)
}

/// `systemctl daemon-reexec`, which ends with its connection, and waits until the new systemd has read its units.
fn reexecute() {
    systemctl(&["daemon-reexec"]);
    let is_up = || {
        let output = Command::new("systemctl").arg("is-system-running").output();
        let state = String::from_utf8(output.unwrap().stdout).unwrap();
        ["running", "degraded"]
            .contains(&state.trim())
            .then_some(())
    };
    tokio::task::block_in_place(|| until("systemd after daemon-reexec", is_up));
}

/// A plugin that is the main process of a unit in a slice of its own, with the properties of the unit that Nomad ships.
struct Unit<'a> {
    stage: &'a Stage,
    name: String,
}

impl<'a> Unit<'a> {
    fn new(stage: &'a Stage) -> Self {
        let unit = Self {
            stage,
            name: stage.name().to_owned(),
        };
        let mut words = vec![
            format!("--unit={}", unit.name),
            format!("--slice={}", unit.name),
            "--quiet".to_owned(),
            "--service-type=exec".to_owned(),
        ];
        let output = |stream: &str, how: &str, name: &str| {
            let path = stage.join(name);
            format!("--property=Standard{stream}={how}:{}", path.display())
        };
        words.extend(
            ["Delegate=yes", "KillMode=process"].map(|property| format!("--property={property}")),
        );
        words.push(output("Output", "truncate", "handshake"));
        words.push(output("Error", "append", "plugin.log"));
        let directory = stage.path().display().to_string();
        let variables = [
            (handshake::COOKIE_KEY, handshake::COOKIE_VALUE),
            ("PLUGIN_PROTOCOL_VERSIONS", "2"),
            ("TMPDIR", &directory),
        ];
        words.extend(variables.map(|(name, value)| format!("--setenv={name}={value}")));
        let plugin = stage.join("plugins/nomad-driver-nspawn");
        words.push(plugin.to_str().unwrap().to_owned());
        run(
            "systemd-run",
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        unit
    }

    fn service(&self) -> String {
        format!("{}.service", self.name)
    }

    fn slice(&self) -> String {
        format!("{}.slice", self.name)
    }

    fn main_pid(&self) -> i32 {
        let pid = systemctl(&["show", "--value", "--property=MainPID", &self.service()]);
        pid.trim().parse().unwrap()
    }

    /// The plugin that runs now, connected and configured.
    async fn plugin(&self) -> Plugin {
        let address = tokio::task::block_in_place(|| {
            until("the plugin's handshake", || {
                let line = fs::read_to_string(self.stage.join("handshake")).ok()?;
                line.ends_with('\n')
                    .then(|| handshake::read(&line).unwrap())
            })
        });
        within("the plugin's configuration", async {
            let plugin = Plugin::reattach(&address, self.main_pid()).await.unwrap();
            plugin.configure(&self.stage.config()).await.unwrap();
            plugin.healthy().await.expect("a healthy driver");
            plugin
        })
        .await
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        let (service, slice) = (self.service(), self.slice());
        // A unit that has ended by itself, or that a failed test has killed, needs only some of it.
        for words in [
            ["stop", &service],
            ["reset-failed", &service],
            ["revert", &slice],
            ["stop", &slice],
        ] {
            let _ = Command::new("systemctl").args(words).output();
        }
    }
}

/// The directories of the cgroups of a process, one in each hierarchy.
fn groups_of(pid: i32) -> Vec<PathBuf> {
    let mounts = procfs::own_mounts().unwrap();
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let mount = mounts.iter().find(|mount| match controllers {
            "" => mount.kind == "cgroup2",
            _ => {
                mount.kind == "cgroup" && controllers.split(',').all(|name| mount.has_option(name))
            }
        })?;
        Some(mount.target.join(path.trim_start_matches('/')))
    };
    groups.lines().filter_map(group).collect()
}

/// The limits of the groups of these tasks: of the payload, of systemd-nspawn, and of the groups above up to the slice, which is the
/// operator's.
fn limits(tasks: &[Running]) -> Dump {
    let processes = tasks.iter().flat_map(|task| [task.leader(), task.nspawn()]);
    let groups = processes.flat_map(groups_of).flat_map(|group| {
        let above = group.ancestors().take_while(|group| {
            let name = group.file_name().unwrap_or_default().to_string_lossy();
            let is_top = group.parent().is_none_or(|parent| {
                parent == Path::new("/sys/fs/cgroup") || parent == Path::new("/sys/fs")
            });
            !is_top && !name.ends_with(".slice")
        });
        above.map(Path::to_owned).collect::<Vec<_>>()
    });
    Dump::of(groups)
}

/// A cgroup for one task, made as Nomad makes it in cgroup v2: below a slice that is no unit of systemd.
struct Scope {
    slice: PathBuf,
}

impl Scope {
    /// None where Nomad makes no such cgroup.
    fn new(name: &str) -> Option<Self> {
        let layout = Layout::of_this_host();
        let slice = layout.tracking?.join(format!("{name}nomad.slice"));
        (layout.kind == CgroupLayout::V2).then(|| {
            let scope = Self { slice };
            fs::create_dir_all(scope.path()).unwrap();
            scope
        })
    }

    fn path(&self) -> PathBuf {
        self.slice.join("share.slice/a.task.scope")
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        for group in self.path().ancestors().take(3) {
            let _ = fs::remove_dir(group);
        }
    }
}

/// Starts a task with limits; with a second one in a scope where Nomad makes scopes.
async fn start(stage: &Stage, plugin: &Plugin, scope: Option<&Scope>) -> Vec<Running> {
    let mut task = stage.shell("echo up; exec sleep 1000");
    task.spec.memory_mb = 64;
    task.spec.memory_max_mb = 96;
    task.spec.cpu_mhz = 500;
    let mut tasks = vec![stage.up(plugin, task.clone()).await];
    if let Some(scope) = scope {
        let tree = stage.tree("second");
        let task = task.with("image", tree.to_str().unwrap());
        let edit = |config: &mut TaskConfig| {
            let resources = config.resources.as_mut().unwrap();
            let linux = resources.linux_resources.as_mut().unwrap();
            linux.cpuset_cgroup = scope.path().to_str().unwrap().to_owned();
        };
        let started = stage.start_edited(plugin, stage.allocation(&task), edit);
        let running = started.await.unwrap();
        running.stdout.contains("up").await;
        let own = PathBuf::from(running.state(&["cgroup"]).as_str().unwrap());
        assert!(own.starts_with(scope.path()), "{}", own.display());
        tasks.push(running);
    }
    tasks
}

/// Checks that a dump has what every host with controllers shows, so that two dumps of nothing are never equal.
#[track_caller]
fn assert_complete(dump: &Dump) {
    for names in [
        ["memory.max", "memory.limit_in_bytes"],
        ["cpu.weight", "cpu.shares"],
        ["pids.max", "pids.max"],
    ] {
        assert!(dump.has(&names), "no {names:?} in {dump:?}");
    }
}

/// Real only: systemd's units and slices. The groups of a task keep their limits while systemd is reloaded and executed again, while the
/// limits of the slice above the agent change, and while the unit of the agent is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_survive_what_is_done_to_systemd() {
    if fs::read_to_string("/proc/1/comm").unwrap().trim() != "systemd" {
        not_applicable("needs a host whose first process is systemd: ci/e2e c, ci/e2e vm");
        return;
    }
    let stage = Stage::new();
    let unit = Unit::new(&stage);
    let plugin = unit.plugin().await;
    let scope = Scope::new(stage.name());
    let tasks = start(&stage, &plugin, scope.as_ref()).await;
    let before = limits(&tasks);
    assert_complete(&before);
    let same = |event: &str| {
        let changed = before.differences(&limits(&tasks));
        assert!(changed.is_empty(), "{event}:\n{changed}");
    };

    systemctl(&["daemon-reload"]);
    same("after daemon-reload");
    reexecute();
    same("after daemon-reexec");
    let slice = unit.slice();
    let properties = ["MemoryMax=1G", "CPUWeight=50", "TasksMax=4000"];
    systemctl(&[&["set-property", "--runtime", &slice], &properties[..]].concat());
    let shown = systemctl(&["show", "--value", "--property=MemoryMax", &slice]);
    assert_eq!(shown.trim(), (1 << 30).to_string());
    same("after the limits of the slice were changed");

    let first = unit.main_pid();
    systemctl(&["restart", &unit.service()]);
    assert_ne!(unit.main_pid(), first);
    let mut plugin = plugin;
    within("the end of the first plugin", plugin.gone()).await;
    same("after the unit was restarted");
    let plugin = unit.plugin().await;
    for task in &tasks {
        within("RecoverTask", plugin.recover(task.stored()))
            .await
            .unwrap();
    }
    same("after the tasks were recovered");
    systemctl(&["daemon-reload"]);
    same("after a second daemon-reload");

    for task in &tasks {
        let exit = task.stop(&plugin, AMPLE, "SIGKILL").await;
        assert_eq!(exit.signal, 9, "{exit:?}");
        task.destroy(&plugin).await;
    }
    end(plugin).await;
    drop(unit);
    drop(scope);
    stage.leave();
}
