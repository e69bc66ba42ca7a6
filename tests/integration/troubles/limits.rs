//! No more processes, no more descriptors.

use super::*;

/// A limited resource of a process.
#[derive(Clone, Copy)]
enum Limited {
    Processes,
    Descriptors,
}

/// Sets the soft limit of a process as the process's own user, and returns the previous one.
fn limit(pid: i32, of: Limited, most: &str) -> String {
    let (name, option) = match of {
        Limited::Processes => ("Max processes", "nproc"),
        Limited::Descriptors => ("Max open files", "nofile"),
    };
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let before = line.unwrap().split_whitespace().next().unwrap().to_owned();
    // Not the owner of its directory in /proc: that is root for every process that has disabled core dumps.
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
    // The hard limit is kept, because raising it again needs privileges.
    words.push("prlimit".to_owned());
    words.extend([format!("--pid={pid}"), format!("--{option}={most}:")]);
    let done = Command::new(&words[0]).args(&words[1..]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    before
}

/// A machine on which the plugin runs as a user whose processes the kernel counts: root's are not limited.
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
        // The original programs may be in a directory that this user can't enter.
        let usual = host.launch();
        let driver = host.join("plugins/nomad-driver-nspawn");
        copy_program(&usual.binary, &driver);
        let tool = host.join("bin/systemd-nspawn");
        let fake = fs::canonicalize(&tool).unwrap();
        fs::remove_file(&tool).unwrap();
        copy_program(&fake, &tool);
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
        Ok(self.host.start_in(&self.plugin, allocation).await?)
    }

    fn trap(&self, point: Failpoint) -> Trap {
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

/// In a process of its own: a process that another test forks here meanwhile would inherit the descriptor that writes the copy, and until
/// it is closed the copy can't be executed.
fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").args([from, to]).output().unwrap();
    assert!(copied.status.success(), "{copied:?}");
}

/// A user that only this run uses. None if there is no other user: an ordinary user, and root of a user namespace that maps no other user,
/// are both limited as they are.
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
        // In hundredths of a second (USER_HZ), whatever the kernel's own tick is. Threads that have ended meanwhile are ignored.
        born.is_none_or(|born| now - born.parse::<f64>().unwrap() / 100.0 > seconds)
    })
}

#[tokio::test]
async fn a_plugin_at_the_process_limit_reports_it_and_keeps_running() {
    let counted = Counted::new().await;
    let plugin = &counted.plugin;
    let gate = counted.host.join("gate");
    let task = counted.start(&gated(&gate)).await.unwrap();
    task.stdout.contains("up").await;
    // tokio's blocking threads that the start needed exit after ten idle seconds; one has to stay.
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
async fn a_supervisor_at_the_process_limit_reports_it() {
    let counted = Counted::new().await;
    let mut trap = counted.trap(Failpoint::CgroupMade);
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

/// Whether all threads of a process sleep. A busy one never does.
fn is_asleep(pid: i32) -> bool {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.all(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('S'))
    })
}

#[tokio::test]
async fn a_plugin_without_descriptors_reports_it_and_keeps_running() {
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
    // Meanwhile another agent connects. It must not keep the plugin busy, and is accepted as soon as possible.
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
async fn a_supervisor_without_descriptors_reports_it() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), Failpoint::CgroupMade);
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
async fn a_supervisor_that_cannot_accept_keeps_its_task_and_uses_no_cpu() {
    let host = Host::new();
    let mut plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    plugin.kill().await;
    let supervisor = i32::try_from(task.state(&["supervisor", "pid"]).as_i64().unwrap()).unwrap();
    let socket = TaskDir::for_task(&host.state(), &task.id).control_stream();
    // Some of the clients use up the free descriptors, and the others have to wait.
    const FEW: usize = 16;
    let before = limit(supervisor, Limited::Descriptors, &FEW.to_string());
    let connect = |_| std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let mut listeners: Vec<_> = (0..FEW).map(connect).collect();
    let reported = |mut listener: &std::os::unix::net::UnixStream| {
        listener.set_read_timeout(Some(DEADLINE)).unwrap();
        listener.read_exact(&mut [0]).unwrap();
    };
    // Every accepted client receives the task's status.
    reported(&listeners[0]);
    eventually("a supervisor that sleeps", || is_asleep(supervisor)).await;
    let last = listeners.pop().unwrap();
    last.set_nonblocking(true).unwrap();
    let waits = (&last).read(&mut [0]).unwrap_err();
    assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock);
    last.set_nonblocking(false).unwrap();
    limit(supervisor, Limited::Descriptors, &before);
    reported(&last);
    let plugin = host.recovered(&task).await;
    ends_well(&plugin, &task, &gate).await;
    nothing_left(&host, &plugin).await;
}

/// It needs no new descriptor to wait, to carry out requests and to report the exit.
#[tokio::test]
async fn a_supervisor_without_descriptors_keeps_serving() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    // Its answer shows that the start is over: the supervisor moves systemd-nspawn out of the limits after the command has begun.
    task.signal(&plugin, "SIGURG").await.unwrap();
    limit(task.supervisor(), Limited::Descriptors, "1");
    // The first one wakes the supervisor up, the second is carried out by one that has waited with this limit.
    for _ in 0..2 {
        task.signal(&plugin, "SIGURG").await.unwrap();
    }
    let log = TaskDir::for_task(&host.state(), &task.id).log();
    assert_eq!(fs::read_to_string(log).unwrap(), "");
    ends_well(&plugin, &task, &gate).await;
    nothing_left(&host, &plugin).await;
}

/// No test can make the kernel refuse to wait, so a failpoint does.
#[rstest]
#[case::for_a_moment(true)]
#[case::for_good(false)]
#[tokio::test]
async fn a_supervisor_that_cannot_wait_for_events_checks_before_it_kills(#[case] passes: bool) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let gate = host.join("gate");
    let task = host.up(&plugin, host.shell(&gated(&gate))).await;
    let log = TaskDir::for_task(&host.state(), &task.id).log();
    let fails = host.join("state.pause").join(WAITS_FAIL);
    fs::create_dir_all(fails.parent().unwrap()).unwrap();
    fs::write(&fails, "").unwrap();
    // Wakes the supervisor up, which waits again.
    task.signal(&plugin, "SIGURG").await.unwrap();
    eventually("its complaint", || {
        fs::read_to_string(&log)
            .unwrap()
            .contains("epoll_wait failed")
    })
    .await;
    task.signal(&plugin, "SIGURG").await.unwrap();
    if passes {
        fs::remove_file(fails).unwrap();
        let complaints = fs::read_to_string(&log).unwrap();
        assert_eq!(complaints.lines().count(), 1, "{complaints}");
        ends_well(&plugin, &task, &gate).await;
    } else {
        let exit = task.wait(&plugin).await;
        assert_eq!((exit.code, exit.signal), (137, 9), "{exit:?}");
        let complaints = fs::read_to_string(&log).unwrap();
        assert_eq!(complaints.matches("epoll_wait").count(), 2, "{complaints}");
        task.destroy(&plugin).await;
    }
    nothing_left(&host, &plugin).await;
}

/// Without a pidfd of PID 1 the container would run unsupervised.
#[tokio::test]
async fn a_supervisor_without_a_pidfd_of_the_leader_fails_the_start() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut announced = Trap::named(&host.state(), "before_notify");
    let mut spawned = Trap::at(&host.state(), Failpoint::Spawned);
    host.scenario(&json!({"calls": [{"pause_before_notify": announced.socket()}, {}]}));
    let start = starting(&plugin, host.allocation(host.shell("exec sleep 1000"))).await;
    let supervisor = reached(&mut spawned).await;
    drop(spawned);
    reached(&mut announced).await;
    // Fewer than it has open already.
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
