//! A full disk, and a state directory that disappears or is read-only.

use super::*;

/// A plugin whose state directory is a small file system that only it can see.
struct Small {
    plugin: Arc<Plugin>,
    host: Host,
}

impl Small {
    /// `None` if this user may not mount: the test is reported as not applicable.
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

    /// Fills the file system completely.
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

    /// Remounts it, writable or not.
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
async fn a_start_on_a_full_disk_is_recoverable() {
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
async fn a_start_that_cannot_be_recorded_is_undone() {
    let Some(small) = Small::new().await else {
        return;
    };
    let mut trap = Trap::at(&small.host.state(), Failpoint::Heard);
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
async fn an_exit_on_a_full_disk_is_reported() {
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
async fn a_read_only_state_directory_fails_starts_as_recoverable() {
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
async fn a_removed_state_directory_is_created_again() {
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
#[case::before_the_order(Failpoint::BeforeOrder)]
#[case::before_the_supervisor(Failpoint::OrderWritten)]
#[case::before_the_supervisor_has_looked(Failpoint::Supervising)]
#[case::before_systemd_nspawn(Failpoint::CgroupMade)]
#[case::before_the_start_is_on_record(Failpoint::Heard)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_removed_during_a_start_fail_it(#[case] point: Failpoint) {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let mut trap = Trap::at(&host.state(), point);
    let start = starting(&plugin, host.allocation(host.shell("exit 5"))).await;
    reached(&mut trap).await;
    let task_dir = TaskDir::for_task(&host.state(), &start.id);
    fs::remove_dir_all(task_dir.path()).unwrap();
    drop(trap);
    let status = refusal(within("StartTask", start.call).await.unwrap());
    assert!(status.message().contains("No such file"), "{status:?}");
    host.quiet(&[plugin.pid()]).await;
    for hierarchy in ["", "unified", "systemd"] {
        let subtree = Path::new("/sys/fs/cgroup").join(hierarchy);
        let subtree = subtree.join("nomad-driver-nspawn");
        let cgroup = subtree.join(task_dir.path().file_name().unwrap());
        assert!(!cgroup.exists(), "{}", cgroup.display());
    }
    all_is_well(&host, &plugin).await;
    nothing_left(&host, &plugin).await;
}
