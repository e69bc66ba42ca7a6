//! The machine below the driver is in trouble: a full disk, a state directory that goes away or takes nothing, records that can't be
//! read, pipes that nobody empties, no more processes, no more descriptors, a clock that was set back. Each is an error of
//! the tasks it meets, told in words; what runs goes on, its end is told, and when the trouble is over everything works.

use std::fs;
use std::io::Read as _;
use std::io::Write as _;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nomad_driver_nspawn::host::calls::StartedTask;
use nomad_driver_nspawn::host::{Allocation, HostError, Launch, Logs, Plugin};
use nomad_driver_nspawn::supervisor::pause::Point;
use nomad_driver_nspawn::supervisor::record::Records;
use rstest::rstest;
use serde_json::{Value, json};
use support::not_applicable;
use tokio::task::JoinHandle;

use crate::harness::{DEADLINE, Host, Running, eventually, is_root, refusal, within};
use crate::lifecycle::nothing_left;
use support::trap::Trap;

/// Ends with 5 when `gate` is there.
fn gated(gate: &Path) -> String {
    format!(
        "trap '' TERM INT; echo up; while ! test -e {}; do sleep 0.02; done; exit 5",
        gate.display()
    )
}

/// A start that has not been answered yet, with its logs read.
struct Starting {
    id: String,
    call: JoinHandle<Result<StartedTask, HostError>>,
    _logs: Logs,
}

async fn starting(plugin: &Arc<Plugin>, allocation: Allocation) -> Starting {
    let logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(plugin));
    Starting {
        id,
        call: tokio::spawn(async move { line.start(config).await }),
        _logs: logs,
    }
}

async fn reached(trap: &mut Trap) -> i32 {
    within("the step", trap.reached()).await.1
}

/// A whole life goes well.
async fn all_is_well(host: &Host, plugin: &Plugin) {
    let task = host.start(plugin, host.shell("exit 5")).await;
    assert_eq!(task.wait(plugin).await.code, 5);
    task.destroy(plugin).await;
}

/// It ends with its own code, though there was trouble.
async fn ends_well(plugin: &Plugin, task: &Running, gate: &Path) {
    fs::write(gate, "").unwrap();
    let exit = task.wait(plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    task.destroy(plugin).await;
}

// The disk.

/// A plugin whose state directory is a small file system of its own, which nobody else sees.
struct Small {
    plugin: Arc<Plugin>,
    host: Host,
}

impl Small {
    /// `None` where this user may mount nothing: the test is reported as not applicable.
    async fn new() -> Option<Self> {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let capabilities = status.split("CapEff:").nth(1).unwrap();
        let capabilities = capabilities.split_whitespace().next().unwrap();
        let may = u64::from_str_radix(capabilities, 16).unwrap() >> 21 & 1 == 1;
        let mut unshare = Command::new("unshare");
        let made = unshare.args(["--mount", "true"]).output().unwrap();
        assert_eq!(made.status.success(), may, "{made:?}");
        if !may {
            not_applicable("a small file system of its own needs CAP_SYS_ADMIN");
            return None;
        }
        const SCRIPT: &str = "mount -t tmpfs -o size=256k,mode=755 none \"$1\" && exec \"$2\"";
        let host = Host::new();
        let usual = host.launch();
        let mut launch = Launch::new("unshare");
        launch.args = ["--mount", "sh", "-c", SCRIPT, "sh"].map(Into::into).into();
        launch
            .args
            .extend([host.state().into(), usual.binary.into()]);
        launch.environment = usual.environment;
        launch.log = usual.log;
        let plugin = within("the plugin", Plugin::launch(launch)).await.unwrap();
        plugin.configure(&host.config()).await.unwrap();
        let plugin = Arc::new(plugin);
        Some(Self { plugin, host })
    }

    /// The state directory as the plugin sees it.
    fn state(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.plugin.pid()));
        root.join(self.host.state().strip_prefix("/").unwrap())
    }

    /// Leaves not one byte.
    fn fill(&self) {
        let mut filler = fs::File::create(self.state().join("filler")).unwrap();
        let full = loop {
            if let Err(error) = filler.write_all(&[0; 512]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    }

    fn make_room(&self) {
        fs::remove_file(self.state().join("filler")).unwrap();
    }

    /// Mounts it anew, writable or not.
    fn turn(&self, how: &str) {
        let done = Command::new("nsenter")
            .arg(format!("--mount=/proc/{}/ns/mnt", self.plugin.pid()))
            .args(["mount", "-o", &format!("remount,{how}")])
            .arg(self.host.state())
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    async fn nothing_left(self) {
        let state = self.state();
        eventually("an empty state directory", || {
            fs::read_dir(&state).unwrap().next().is_none()
        })
        .await;
        self.host.quiet(&[self.plugin.pid()]).await;
    }
}

#[tokio::test]
async fn a_start_on_a_full_disk_may_be_tried_again() {
    let Some(small) = Small::new().await else {
        return;
    };
    small.fill();
    let status = refusal(
        small
            .host
            .try_start(&small.plugin, small.host.shell("exit 5"))
            .await,
    );
    assert!(status.message().contains("No space left"), "{status:?}");
    assert!(!status.details().is_empty(), "it may be tried again");
    small.make_room();
    all_is_well(&small.host, &small.plugin).await;
    small.nothing_left().await;
}

#[tokio::test]
async fn a_start_that_can_not_be_recorded_is_undone() {
    let Some(small) = Small::new().await else {
        return;
    };
    let mut trap = Trap::at(&small.host.state(), Point::Heard);
    let start = starting(
        &small.plugin,
        small.host.allocation(small.host.shell("exit 5")),
    )
    .await;
    reached(&mut trap).await;
    small.fill();
    drop(trap);
    let answer = within("StartTask", start.call).await.unwrap();
    let status = refusal(answer);
    assert!(status.message().contains("No space left"), "{status:?}");
    assert!(
        within("WaitTask", small.plugin.wait(&start.id))
            .await
            .is_err()
    );
    small.make_room();
    all_is_well(&small.host, &small.plugin).await;
    small.nothing_left().await;
}

#[tokio::test]
async fn an_end_on_a_full_disk_is_told() {
    let Some(small) = Small::new().await else {
        return;
    };
    let gate = small.host.join("gate");
    let task = small
        .host
        .up(&small.plugin, small.host.shell(&gated(&gate)))
        .await;
    small.fill();
    ends_well(&small.plugin, &task, &gate).await;
    small.make_room();
    small.nothing_left().await;
}

#[tokio::test]
async fn a_state_directory_that_takes_nothing_fails_starts_for_the_time_being() {
    let Some(small) = Small::new().await else {
        return;
    };
    small.turn("ro");
    let status = refusal(
        small
            .host
            .try_start(&small.plugin, small.host.shell("exit 5"))
            .await,
    );
    assert!(
        status.message().contains("Read-only file system"),
        "{status:?}"
    );
    assert!(!status.details().is_empty(), "it may be tried again");
    small.turn("rw");
    all_is_well(&small.host, &small.plugin).await;
    small.nothing_left().await;
}

#[tokio::test]
async fn a_state_directory_that_is_gone_is_made_again() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    fs::remove_dir_all(host.state()).unwrap();
    ends_well(&plugin, &task, &gate).await;
    host.quiet(&[plugin.pid()]).await;
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}

#[rstest]
#[case::before_the_order(Point::BeforeOrder)]
#[case::before_the_supervisor(Point::OrderWritten)]
#[case::before_the_supervisor_has_looked(Point::Supervising)]
#[case::before_systemd_nspawn(Point::CgroupMade)]
#[case::before_the_start_is_on_record(Point::Heard)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_vanish_during_a_start_fail_it(#[case] point: Point) {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), point);
    let start = starting(&plugin, host.allocation(host.shell("exit 5"))).await;
    reached(&mut trap).await;
    fs::remove_dir_all(Records::of(&host.state(), &start.id).path()).unwrap();
    drop(trap);
    let status = refusal(within("StartTask", start.call).await.unwrap());
    assert!(status.message().contains("No such file"), "{status:?}");
    host.quiet(&[plugin.pid()]).await;
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}

// The records.

#[rstest]
#[case::half(|text: &str| text[..text.len() / 2].to_owned())]
#[case::empty(|_: &str| String::new())]
#[case::of_a_later_driver(|text: &str| text.replacen("\"form\":1", "\"form\":99", 1))]
#[tokio::test]
async fn a_record_that_can_not_be_read_is_refused_and_can_be_destroyed(
    #[case] spoil: fn(&str) -> String,
) {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    plugin.kill().await;
    let file = Records::of(&host.state(), &task.id).path().join("running");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, spoil(&text)).unwrap();
    let plugin = host.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(task.stored())).await);
    assert!(
        status.message().contains("reading the record"),
        "{status:?}"
    );
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn the_record_of_an_end_that_can_not_be_read_is_called_that() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell("echo up; exit 5")).await;
    task.wait(&plugin).await;
    plugin.kill().await;
    host.quiet(&[]).await;
    let file = Records::of(&host.state(), &task.id).path().join("exit");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..text.len() / 2]).unwrap();
    let plugin = host.plugin().await;
    let status = refusal(within("RecoverTask", plugin.recover(task.stored())).await);
    assert!(
        status
            .message()
            .contains("the record of its end can't be read"),
        "{status:?}"
    );
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_clock_that_was_set_back_changes_no_end() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    plugin.kill().await;
    fs::write(gate, "").unwrap();
    host.quiet(&[]).await;
    // As if it had ended a day before it was started, and before there were clocks.
    let file = Records::of(&host.state(), &task.id).path().join("exit");
    let text = fs::read_to_string(&file).unwrap();
    let mut exit: Value = serde_json::from_str(&text).unwrap();
    let seconds = exit["ended_at"]["secs_since_epoch"].as_u64().unwrap();
    exit["ended_at"]["secs_since_epoch"] = json!(seconds - 86400);
    fs::write(&file, exit.to_string()).unwrap();
    let plugin = host.recovered(&task).await;
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    let shown = task.inspect(&plugin).await.unwrap().task.unwrap();
    assert!(shown.completed_at.unwrap().seconds < shown.started_at.unwrap().seconds);
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}

// The pipes.

#[tokio::test]
async fn a_pipe_that_nobody_reads_fails_the_start_in_words() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exit 5"));
    let config = plugin.task_config(&allocation).await.unwrap();
    let status = refusal(within("StartTask", plugin.start(config)).await);
    assert!(status.message().contains("nobody reads it"), "{status:?}");
    assert!(host.starts().is_empty());
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_reader_that_comes_late_gets_everything() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let allocation = host.allocation(host.shell("echo said; exit 5"));
    let config = plugin.task_config(&allocation).await.unwrap();
    let (id, line) = (config.id.clone(), Arc::clone(&plugin));
    let start = tokio::spawn(async move { line.start(config).await });
    // A second thread of the supervisor waits in the kernel for the reader.
    let supervise = format!("supervise {}", host.state().display());
    eventually("a supervisor that waits for a reader", || {
        let found = host.processes();
        let found = found.iter().find(|one| one.command.contains(&supervise));
        found.is_some_and(|one| {
            fs::read_dir(format!("/proc/{}/task", one.pid)).is_ok_and(|all| all.count() == 2)
        })
    })
    .await;
    let logs = allocation.open_logs().unwrap();
    within("StartTask", start).await.unwrap().unwrap();
    assert_eq!(within("WaitTask", plugin.wait(&id)).await.unwrap().code, 5);
    let mut said = String::new();
    let mut stdout = logs.stdout;
    let read = tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut said);
    within("the output", read).await.unwrap();
    assert_eq!(said, "said\n");
    within("DestroyTask", plugin.destroy(&id, false))
        .await
        .unwrap();
    nothing_left(&host, &plugin).await;
}

#[rstest]
#[case::stopped(true)]
#[case::destroyed(false)]
#[tokio::test]
async fn a_reader_that_is_stuck_holds_up_its_own_task_alone(#[case] stopped: bool) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = host.allocation(host.shell("exec cat /dev/zero"));
    // Open, and never read.
    let _logs = allocation.open_logs().unwrap();
    let config = plugin.task_config(&allocation).await.unwrap();
    let id = config.id.clone();
    within("StartTask", plugin.start(config)).await.unwrap();
    let pipe = fs::File::options()
        .write(true)
        .open(allocation.stdout_path());
    let pipe = pipe.unwrap();
    let full = || {
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        poll(&mut ready, PollTimeout::ZERO).unwrap() == 0
    };
    eventually("a full pipe", full).await;
    let other = host
        .shell("echo said; exit 5")
        .with("image", json!(host.tree("other")));
    let other = host.start(&plugin, other).await;
    assert_eq!(other.wait(&plugin).await.code, 5);
    other.destroy(&plugin).await;
    if stopped {
        within("StopTask", plugin.stop(&id, Duration::ZERO, ""))
            .await
            .unwrap();
        let exit = within("WaitTask", plugin.wait(&id)).await.unwrap();
        assert_eq!((exit.code, exit.signal), (137, 9));
    }
    within("DestroyTask", plugin.destroy(&id, true))
        .await
        .unwrap();
    nothing_left(&host, &plugin).await;
}

// Processes and descriptors.

/// What a process may have a limited number of.
#[derive(Clone, Copy)]
enum Limited {
    Processes,
    Descriptors,
}

/// Sets the limit of a process as its own user does, and gives the one that it had.
fn limit(pid: i32, of: Limited, most: &str) -> String {
    let (name, option) = match of {
        Limited::Processes => ("Max processes", "nproc"),
        Limited::Descriptors => ("Max open files", "nofile"),
    };
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let before = line.unwrap().split_whitespace().next().unwrap().to_owned();
    // Not the owner of its directory in /proc: that is root for all who leave no core dumps.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let user: u32 = user
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let mut words = Vec::new();
    if user != nix::unistd::geteuid().as_raw() {
        words.push("setpriv".to_owned());
        words.extend([format!("--reuid={user}"), format!("--regid={user}")]);
        words.push("--clear-groups".to_owned());
    }
    // The hard one stays: few may raise it again.
    words.push("prlimit".to_owned());
    words.extend([format!("--pid={pid}"), format!("--{option}={most}:")]);
    let done = Command::new(&words[0]).args(&words[1..]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    before
}

/// A machine on which the plugin has a user whom the kernel counts the processes of: it does not count root's.
struct Counted {
    plugin: Arc<Plugin>,
    host: Host,
    user: Option<u32>,
}

impl Counted {
    async fn new() -> Self {
        let host = Host::new();
        let Some(user) = spare_user() else {
            let plugin = Arc::new(host.plugin().await);
            let user = None;
            return Self { plugin, host, user };
        };
        // The programs may lie where such a user can't go.
        let usual = host.launch();
        let driver = host.join("plugins/nomad-driver-nspawn");
        fs::copy(&usual.binary, &driver).unwrap();
        let tool = host.join("bin/systemd-nspawn");
        let fake = fs::canonicalize(&tool).unwrap();
        fs::remove_file(&tool).unwrap();
        fs::copy(fake, &tool).unwrap();
        fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
        chown_all(host.path(), user);
        let mut launch = Launch::new("setpriv");
        launch.args = [
            format!("--reuid={user}"),
            format!("--regid={user}"),
            "--clear-groups".to_owned(),
        ]
        .map(Into::into)
        .into();
        launch.args.push(driver.into());
        launch.environment = usual.environment;
        launch.log = usual.log;
        let plugin = within("the plugin", Plugin::launch(launch)).await.unwrap();
        plugin.configure(&host.config()).await.unwrap();
        Self {
            plugin: Arc::new(plugin),
            host,
            user: Some(user),
        }
    }

    fn allocation(&self, text: &str) -> Allocation {
        let allocation = self.host.allocation(self.host.shell(text));
        if let Some(user) = self.user {
            chown_all(&self.host.join("alloc"), user);
        }
        allocation
    }

    async fn start(&self, text: &str) -> Result<Running, HostError> {
        let allocation = Arc::new(self.allocation(text));
        self.host.start_in(&self.plugin, allocation).await
    }

    fn trap(&self, point: Point) -> Trap {
        let trap = Trap::at(&self.host.state(), point);
        if let Some(user) = self.user {
            chown(trap.socket(), Some(user), None).unwrap();
        }
        trap
    }

    async fn leave(self) {
        let task = self.start("exit 5").await.unwrap();
        assert_eq!(task.wait(&self.plugin).await.code, 5);
        task.destroy(&self.plugin).await;
        nothing_left(&self.host, &self.plugin).await;
    }
}

/// A user that is nobody's but this run's. None for those who can be no other one: an ordinary user, and root of a user namespace
/// with nobody else in it, who are both counted as they are.
fn spare_user() -> Option<u32> {
    if !is_root() {
        return None;
    }
    let mapped = |file: &str| -> Vec<Range<u64>> {
        let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let figures = text.lines().map(|line| {
            let mut words = line
                .split_whitespace()
                .map(|word| word.parse::<u64>().unwrap());
            (words.next().unwrap(), words.nth(1).unwrap())
        });
        figures
            .map(|(first, length)| first..first + length)
            .collect()
    };
    let (users, groups) = (mapped("uid_map"), mapped("gid_map"));
    let run = u64::from(std::process::id());
    let last = users
        .iter()
        .map(|range| range.end - 1 - run % (range.end - range.start));
    let found = std::iter::once(1_000_000_000 + run)
        .chain(last)
        .find(|user| {
            let is_in = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(user));
            *user != 0 && is_in(&users) && is_in(&groups)
        });
    found.map(|user| u32::try_from(user).unwrap())
}

fn chown_all(path: &Path, user: u32) {
    if path.is_symlink() {
        return;
    }
    chown(path, Some(user), Some(user)).unwrap();
    for entry in fs::read_dir(path).into_iter().flatten() {
        chown_all(&entry.unwrap().path(), user);
    }
}

/// Whether all threads of a process are older than this, in seconds.
fn is_of_age(pid: i32, seconds: f64) -> bool {
    let now = fs::read_to_string("/proc/uptime").unwrap();
    let now: f64 = now.split(' ').next().unwrap().parse().unwrap();
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.all(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
        let born = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(19));
        // In hundredths, whatever the kernel counts in. One that has ended meanwhile is no matter.
        born.is_none_or(|born| now - born.parse::<f64>().unwrap() / 100.0 > seconds)
    })
}

#[tokio::test]
async fn a_plugin_that_may_start_no_process_says_so_and_lives_on() {
    let counted = Counted::new().await;
    let plugin = &counted.plugin;
    let gate = counted.host.join("gate");
    let task = counted.start(&gated(&gate)).await.unwrap();
    task.stdout.contains("up").await;
    // The threads for blocking work that the start needed end when they have had nothing to do for ten seconds; one has to stay.
    eventually("no thread but those that stay", || {
        is_of_age(plugin.pid(), 15.0)
    })
    .await;
    let before = limit(plugin.pid(), Limited::Processes, "1");
    for _ in 0..3 {
        let status = refusal(counted.start("exit 5").await);
        assert!(
            status.message().contains("temporarily unavailable"),
            "{status:?}\n{}",
            counted.host.log().text().join("\n")
        );
        assert!(!status.details().is_empty(), "it may be tried again");
    }
    ends_well(plugin, &task, &gate).await;
    limit(plugin.pid(), Limited::Processes, &before);
    counted.leave().await;
}

#[tokio::test]
async fn a_supervisor_that_may_start_no_process_says_so() {
    let counted = Counted::new().await;
    let mut trap = counted.trap(Point::CgroupMade);
    let start = starting(&counted.plugin, counted.allocation("exit 5")).await;
    let supervisor = reached(&mut trap).await;
    limit(supervisor, Limited::Processes, "1");
    drop(trap);
    let status = refusal(within("StartTask", start.call).await.unwrap());
    assert!(
        status.message().contains("temporarily unavailable"),
        "{status:?}"
    );
    counted.leave().await;
}

/// Whether all threads of a process wait for something. One that is kept awake never does.
fn is_asleep(pid: i32) -> bool {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.all(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('S'))
    })
}

#[tokio::test]
async fn a_plugin_without_descriptors_says_so_and_lives_on() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    let before = limit(plugin.pid(), Limited::Descriptors, "3");
    for _ in 0..3 {
        let other = host.shell("exit 5").with("image", json!(host.root()));
        let status = refusal(host.try_start(&plugin, other).await);
        assert!(
            status.message().contains("Too many open files"),
            "{status:?}"
        );
        assert!(!status.details().is_empty(), "it may be tried again");
    }
    // Another agent knocks meanwhile, keeps nobody awake, and is let in as soon as that can be.
    let early = std::os::unix::net::UnixStream::connect(plugin.address()).unwrap();
    eventually("a plugin that sleeps", || is_asleep(plugin.pid())).await;
    let (address, pid) = (plugin.address().to_owned(), plugin.pid());
    let knock = tokio::spawn(async move { Plugin::reattach(&address, pid).await.map(drop) });
    fs::write(&gate, "").unwrap();
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    limit(plugin.pid(), Limited::Descriptors, &before);
    within("another agent", knock).await.unwrap().unwrap();
    drop(early);
    task.destroy(&plugin).await;
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_supervisor_without_descriptors_says_so() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), Point::CgroupMade);
    let start = starting(&plugin, host.allocation(host.shell("exit 5"))).await;
    let supervisor = reached(&mut trap).await;
    limit(supervisor, Limited::Descriptors, "3");
    drop(trap);
    let status = refusal(within("StartTask", start.call).await.unwrap());
    assert!(
        status.message().contains("Too many open files"),
        "{status:?}"
    );
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}

#[tokio::test]
async fn a_supervisor_that_can_let_nobody_in_keeps_its_task_and_takes_no_time() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    plugin.kill().await;
    let supervisor = i32::try_from(task.state(&["supervisor", "pid"]).as_i64().unwrap()).unwrap();
    let lifeline = Records::of(&host.state(), &task.id).lifeline();
    // Some of the listeners take what is free, and the others have to wait.
    const FEW: usize = 16;
    let before = limit(supervisor, Limited::Descriptors, &FEW.to_string());
    let connect = |_| std::os::unix::net::UnixStream::connect(&lifeline).unwrap();
    let mut listeners: Vec<_> = (0..FEW).map(connect).collect();
    let told = |mut listener: &std::os::unix::net::UnixStream| {
        listener.set_read_timeout(Some(DEADLINE)).unwrap();
        listener.read_exact(&mut [0]).unwrap();
    };
    // Whoever is let in is told how things stand.
    told(&listeners[0]);
    eventually("a supervisor that sleeps", || is_asleep(supervisor)).await;
    let last = listeners.pop().unwrap();
    last.set_nonblocking(true).unwrap();
    let waits = (&last).read(&mut [0]).unwrap_err();
    assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock);
    last.set_nonblocking(false).unwrap();
    limit(supervisor, Limited::Descriptors, &before);
    told(&last);
    let plugin = host.recovered(&task).await;
    ends_well(&plugin, &task, &gate).await;
    nothing_left(&host, &plugin).await;
}

/// The kernel lets nobody wait for more descriptors than he may have.
#[rstest]
#[case::for_a_moment(true)]
#[case::for_good(false)]
#[tokio::test]
async fn a_supervisor_that_may_not_wait_watches_all_the_same(#[case] passes: bool) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    let supervisor = i32::try_from(task.state(&["supervisor", "pid"]).as_i64().unwrap()).unwrap();
    let log = Records::of(&host.state(), &task.id).path().join("log");
    let before = limit(supervisor, Limited::Descriptors, "1");
    // Wakes it up; there is no descriptor to send it with.
    let _ = task.signal(&plugin, "SIGURG").await;
    eventually("its complaint", || {
        fs::read_to_string(&log).unwrap().contains("waiting failed")
    })
    .await;
    if passes {
        limit(supervisor, Limited::Descriptors, &before);
        task.signal(&plugin, "SIGURG").await.unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap().lines().count(), 1);
        ends_well(&plugin, &task, &gate).await;
    } else {
        let exit = task.wait(&plugin).await;
        assert_eq!((exit.code, exit.signal), (137, 9), "{exit:?}");
        let complaints = fs::read_to_string(&log).unwrap();
        assert_eq!(complaints.matches("waiting").count(), 2, "{complaints}");
        task.destroy(&plugin).await;
    }
    nothing_left(&host, &plugin).await;
}

/// Without a hold on its first process a container would run unwatched.
#[tokio::test]
async fn a_supervisor_that_can_not_hold_the_first_process_fails_the_start() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut announced = Trap::named(&host.state(), "before_notify");
    let mut spawned = Trap::at(&host.state(), Point::Spawned);
    host.scenario(&json!({"calls": [{"pause_before_notify": announced.socket()}, {}]}));
    let start = starting(&plugin, host.allocation(host.shell("exec sleep 1000"))).await;
    let supervisor = reached(&mut spawned).await;
    drop(spawned);
    reached(&mut announced).await;
    // More than it waits for, which the kernel would refuse otherwise, and fewer than it has open already.
    limit(supervisor, Limited::Descriptors, "8");
    drop(announced);
    let status = refusal(within("StartTask", start.call).await.unwrap());
    assert!(
        status.message().contains("Too many open files"),
        "{status:?}"
    );
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}

// Everybody at once.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroy_during_a_recovery_ends_the_task() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    plugin.kill().await;
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), Point::Recovering);
    let (line, stored) = (Arc::clone(&plugin), task.stored());
    let recover = tokio::spawn(async move { line.recover(stored).await });
    reached(&mut trap).await;
    let (line, id) = (Arc::clone(&plugin), task.id.clone());
    let destroy = tokio::spawn(async move { line.destroy(&id, true).await });
    // Sent after it on the same connection.
    assert!(task.inspect(&plugin).await.is_ok());
    drop(trap);
    // Which of the two comes first is not promised; that both are answered is, and that it is gone.
    let _ = within("RecoverTask", recover).await.unwrap();
    within("DestroyTask", destroy).await.unwrap().unwrap();
    nothing_left(&host, &plugin).await;
    assert!(within("WaitTask", plugin.wait(&task.id)).await.is_err());
}

#[tokio::test]
async fn three_plugins_of_one_state_directory_harm_no_task() {
    let host = Host::new();
    let (one, two, three) = tokio::join!(host.plugin(), host.plugin(), host.plugin());
    let plugins = [one, two, three];
    let gate = host.join("gate");
    let start = async |index: usize| {
        let image = host.tree(&format!("tree{index}"));
        let task = host.shell(&gated(&gate)).named(&format!("web{index}"));
        host.up(&plugins[index], task.with("image", json!(image)))
            .await
    };
    let tasks = <[Running; 3]>::from(tokio::join!(start(0), start(1), start(2)));
    for plugin in &plugins {
        for task in &tasks {
            within("RecoverTask", plugin.recover(task.stored()))
                .await
                .unwrap();
        }
    }
    fs::write(&gate, "").unwrap();
    for plugin in &plugins {
        for task in &tasks {
            assert_eq!(task.wait(plugin).await.code, 5);
        }
    }
    for plugin in &plugins {
        for task in &tasks {
            task.destroy(plugin).await;
        }
    }
    let pids = plugins.each_ref().map(Plugin::pid);
    host.quiet(&pids).await;
    assert_eq!(fs::read_dir(host.state()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_starts_at_once() {
    const MANY: usize = 200;
    let host = Arc::new(Host::new());
    let plugin = Arc::new(host.plugin().await);
    let lives = (0..MANY).map(|index| {
        let (host, plugin) = (Arc::clone(&host), Arc::clone(&plugin));
        tokio::spawn(async move {
            let task = host
                .shell(&format!("echo {index}; exit {}", index % 100))
                .named(&format!("t{index}"))
                .with("ephemeral", json!(true));
            let task = host.start(&plugin, task).await;
            let exit = task.wait(&plugin).await;
            assert_eq!(
                (exit.code, exit.error),
                (i32::try_from(index % 100).unwrap(), None)
            );
            assert_eq!(task.stdout.all().await, format!("{index}\n"));
            task.destroy(&plugin).await;
        })
    });
    for life in lives.collect::<Vec<_>>() {
        life.await.unwrap();
    }
    assert_eq!(host.starts().len(), MANY);
    nothing_left(&host, &plugin).await;
}
