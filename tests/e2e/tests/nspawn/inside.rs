//! What is applied to a container once systemd-nspawn has made it: sizes of temporary file systems, sysctls, devices. The specs go to the
//! backend directly. All of it is real only: namespaces and file systems of the container's own.

use std::collections::BTreeMap;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nomad_driver_nspawn::backend::nspawn::{Settings, Timeouts};
use nomad_driver_nspawn::backend::{BackendError, ContainerBackend, NspawnBackend};
use nomad_driver_nspawn::container::{
    Cause, ContainerSpec, Device, Exit, Link, Mode, Mount, NetworkNamespace, Notes, Started,
    TmpfsSizes, Users,
};
use nomad_driver_nspawn::network::pool::Pool;
use rstest::rstest;
use tokio::sync::mpsc;

use super::*;

const MIB: u64 = 1 << 20;

/// The backend in a stage.
pub(super) struct Inside {
    pub(super) stage: Stage,
    pub(super) backend: NspawnBackend,
}

impl Inside {
    pub(super) fn new() -> Self {
        Self::with_state_dir(|stage| stage.join("state"))
    }

    /// The same with this state directory.
    pub(super) fn with_state_dir(state_dir: impl FnOnce(&Stage) -> PathBuf) -> Self {
        let stage = Stage::new();
        let backend = Self::backend(state_dir(&stage));
        Self { stage, backend }
    }

    /// The same after the plugin has been started again.
    pub(super) fn with_new_backend(self) -> Self {
        let backend = Self::backend(self.stage.join("state"));
        Self { backend, ..self }
    }

    /// The same whose notes are received.
    pub(super) fn with_notes(self) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (sender, received) = mpsc::unbounded_channel();
        let notes = Notes::new(move |_, note| drop(sender.send(note)));
        let backend = self.backend.with_notes(notes);
        (Self { backend, ..self }, received)
    }

    fn backend(state_dir: PathBuf) -> NspawnBackend {
        NspawnBackend::new(Settings {
            state_dir,
            nspawn: Some("/usr/bin/systemd-nspawn".into()),
            search: std::ffi::OsString::new(),
            binary: e2e::driver(),
            exec_unfiltered: false,
            seccomp_cache: true,
            network_pool: Pool::default(),
            timeouts: Timeouts::default(),
        })
    }

    /// A container that runs a shell script in the small tree.
    pub(super) fn spec(&self, script: &str) -> ContainerSpec {
        let name = self.stage.name();
        ContainerSpec::for_test(name, self.stage.join("tree")).with(|spec| {
            spec.identity.id = format!("alloc-{name}/{name}/00000001");
            spec.identity.machine = format!("{name}-inside");
            spec.payload.command = vec!["/bin/sh".into(), "-c".into(), script.into()];
            spec.payload.stdout = Some(self.stage.file("stdout", ""));
            spec.payload.stderr = Some(self.stage.file("stderr", ""));
            spec.network.resolv_conf = Some("off".into());
        })
    }

    pub(super) async fn start(&self, spec: ContainerSpec) -> Started {
        let started = within("the start", self.backend.start(spec)).await;
        Started::clone(&started.unwrap())
    }

    pub(super) async fn refused(&self, spec: ContainerSpec) -> BackendError {
        let started = within("the start", self.backend.start(spec)).await;
        started.expect_err("it has started")
    }

    /// Waits for the exit and removes the container; returns the exit and what it printed.
    pub(super) async fn finish(&self, started: &Started) -> (Exit, String) {
        let exit = within("the exit", self.backend.wait(started))
            .await
            .unwrap();
        within("the removal", self.backend.remove(&started.id))
            .await
            .unwrap();
        let printed = fs::read_to_string(self.stage.join("stdout")).unwrap();
        (exit, printed)
    }

    /// Runs a container to its end; returns what it printed. Its start must have no notes.
    pub(super) async fn run(&self, spec: ContainerSpec) -> String {
        let started = self.start(spec).await;
        assert!(started.notes.is_empty(), "{:?}", started.notes);
        let (exit, printed) = self.finish(&started).await;
        assert_eq!((exit.code, &exit.error), (0, &None), "{printed}");
        printed
    }
}

/// The user namespace of a job that does not configure one.
pub(super) fn private_users() -> Users {
    Users::Private {
        range: "pick".to_owned(),
        ownership: Some("auto".to_owned()),
    }
}

fn private_network() -> NetworkNamespace {
    NetworkNamespace::Private {
        link: Link::None,
        ports: Vec::new(),
        interfaces: Vec::new(),
    }
}

fn sizes(tmp: u64, run: u64, shm: u64) -> TmpfsSizes {
    let some = |size| Some(size).filter(|size| *size != 0);
    TmpfsSizes {
        tmp: some(tmp),
        run: some(run),
        shm: some(shm),
    }
}

/// Prints the sizes of the three file systems in KiB.
const SIZES: &str =
    "for d in /tmp /run /dev/shm; do df -k $d | tail -n 1 | awk '{print $2}'; done; ";

#[rstest]
#[case::without_a_user_namespace(Users::Host, false)]
#[case::in_a_user_namespace(private_users(), false)]
#[case::read_only(Users::Host, true)]
#[case::read_only_in_a_user_namespace(private_users(), true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_temporary_file_system_is_an_error_inside(
    #[case] users: Users,
    #[case] read_only: bool,
) {
    let inside = Inside::new();
    let script = format!(
        "{SIZES} dd if=/dev/zero of=/tmp/full bs=64k 2>&1 | head -n 1; wc -c < /tmp/full; touch /run/x"
    );
    let printed = inside.run(inside.spec(&script).with(|spec| {
        spec.users = users;
        spec.rootfs.read_only = read_only;
        spec.resources.tmpfs = sizes(MIB, 2 * MIB, 3 * MIB);
    }));
    let want =
        "1024\n2048\n3072\ndd: error writing '/tmp/full': No space left on device\n1048576\n";
    assert_eq!(printed.await, want);
    inside.stage.leave();
}

/// The image's init may run before the settings are applied.
#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booted_container_gets_sizes_and_devices(#[case] users: Users) {
    let inside = Inside::new();
    let init = inside.stage.join("tree/sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    let script = "#!/bin/sh\nuntil df -k /tmp | grep -q ' 1024 ' && test -c /dev/mine; do sleep 0.02; done\n\
        echo x > /dev/mine && echo written\n";
    fs::write(&init, script).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let printed = inside.run(inside.spec("").with(|spec| {
        spec.users = users;
        spec.payload.mode = Mode::Boot;
        spec.payload.command = Vec::new();
        spec.resources.tmpfs = sizes(MIB, 0, 0);
        spec.resources.devices = vec![device("/dev/null", "/dev/mine")];
    }));
    assert_eq!(printed.await, "written\n");
    inside.stage.leave();
}

/// The kernel refuses a size that is in use already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_below_what_is_in_use_is_a_note() {
    let inside = Inside::new();
    let spec = inside
        .spec("exit 0")
        .with(|spec| spec.resources.tmpfs = sizes(MIB, 4096, 0));
    let started = inside.start(spec).await;
    let [note] = started.notes.as_slice() else {
        panic!("{:?}", started.notes);
    };
    assert!(
        note.starts_with("/run of the container keeps the size"),
        "{note}"
    );
    assert!(note.contains("4096 bytes"), "{note}");
    assert_eq!(inside.finish(&started).await.0.code, 0);
    inside.stage.leave();
}

/// A temporary file system of the host, unmounted at the end.
struct HostTmpfs(PathBuf);

impl HostTmpfs {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let options = Some("size=8m");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        Self(path)
    }

    fn size(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.0)
            .map(|stat| stat.blocks() * stat.fragment_size())
            .unwrap()
    }
}

impl Drop for HostTmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_job_mounts_keeps_its_size() {
    let inside = Inside::new();
    let host = HostTmpfs::new(inside.stage.join("host"));
    let printed = inside.run(inside.spec(SIZES).with(|spec| {
        spec.mounts = vec![Mount::new(host.0.clone(), "/tmp")];
        spec.resources.tmpfs = sizes(MIB, 2 * MIB, 3 * MIB);
    }));
    assert_eq!(printed.await, "8192\n2048\n3072\n");
    assert_eq!(host.size(), 8 * MIB);
    drop(host);
    inside.stage.leave();
}

/// systemd-nspawn follows the link within the tree, and mounts the container's own file system there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_of_the_image_does_not_lead_to_a_file_system_of_the_host() {
    let inside = Inside::new();
    let host = HostTmpfs::new(inside.stage.join("host"));
    let link = inside.stage.join("tree/tmp");
    fs::remove_dir(&link).unwrap();
    // On the host this is the path of the host's file system.
    symlink("../host", &link).unwrap();
    assert_eq!(link.canonicalize().unwrap(), host.0.canonicalize().unwrap());
    fs::create_dir(inside.stage.join("tree/host")).unwrap();
    let printed = inside.run(
        inside
            .spec(SIZES)
            .with(|spec| spec.resources.tmpfs = sizes(MIB, 2 * MIB, 3 * MIB)),
    );
    assert_eq!(printed.await, "1024\n2048\n3072\n");
    assert_eq!(host.size(), 8 * MIB);
    drop(host);
    inside.stage.leave();
}

fn sysctls(all: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = all
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    owned.collect()
}

/// One of each namespace, and both kinds that an ipc namespace has.
const SYSCTLS: [(&str, &str); 5] = [
    ("fs.mqueue.msg_max", "33"),
    ("kernel.domainname", "inside.test"),
    ("kernel.msgmax", "12345"),
    ("net.core.somaxconn", "99"),
    ("net.ipv4.ip_local_port_range", "2000\t3000"),
];

fn file_of(sysctl: &str) -> String {
    format!("/proc/sys/{}", sysctl.replace('.', "/"))
}

#[rstest]
#[case::without_a_user_namespace(Users::Host)]
#[case::in_a_user_namespace(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sysctls_hold_in_the_container_and_not_on_the_host(#[case] users: Users) {
    let inside = Inside::new();
    let host = || SYSCTLS.map(|(name, _)| fs::read_to_string(file_of(name)).unwrap());
    let before = host();
    let files = SYSCTLS.map(|(name, _)| file_of(name)).join(" ");
    let spec = inside
        .spec(&format!("cat {files}; exec sleep 1000"))
        .with(|spec| {
            spec.users = users;
            spec.network.namespace = private_network();
            spec.resources.sysctls = sysctls(&SYSCTLS);
        });
    let started = inside.start(spec).await;
    let supervisor = format!("/proc/{}", started.supervisor.pid);
    assert_eq!(
        fs::read_dir(format!("{supervisor}/task")).unwrap().count(),
        1
    );
    for kind in ["ipc", "net", "uts"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{kind}")).unwrap();
        assert_eq!(of(&supervisor), of("/proc/self"), "{kind}");
    }
    let status = fs::read_to_string(format!("{supervisor}/status")).unwrap();
    assert!(status.contains("Uid:\t0\t0\t0\t0"), "{status}");
    let want: String = SYSCTLS
        .iter()
        .map(|(_, value)| format!("{value}\n"))
        .collect();
    tokio::task::block_in_place(|| {
        let printed = || fs::read_to_string(inside.stage.join("stdout")).unwrap();
        until("the values", || {
            (printed().lines().count() == SYSCTLS.len()).then_some(())
        });
        assert_eq!(printed(), want);
    });
    assert_eq!(host(), before);
    let stop = inside.backend.stop(&started, None, Duration::ZERO);
    within("the stop", stop).await.unwrap();
    inside.finish(&started).await;
    inside.stage.leave();
}

#[rstest]
#[case::value("kernel.msgmax", "-5", "Invalid argument")]
#[case::value_in_a_user_namespace("fs.mqueue.msg_max", "0", "Invalid argument")]
#[case::missing(
    "net.ipv4.no_such_setting",
    "1",
    "no such setting in the net namespace"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sysctl_that_the_kernel_refuses_fails_the_start(
    #[case] name: &str,
    #[case] value: &str,
    #[case] reason: &str,
    #[values(Users::Host, private_users())] users: Users,
) {
    let inside = Inside::new();
    let error = inside.refused(inside.spec("echo ran; sleep 1000").with(|spec| {
        spec.users = users;
        spec.network.namespace = private_network();
        spec.resources.sysctls = sysctls(&[("kernel.domainname", "inside.test"), (name, value)]);
    }));
    let error = error.await;
    assert_eq!(error.cause(), Cause::Config);
    let want = format!("setting up the container failed: sysctl {name} = {value:?}: ");
    let text = error.to_string();
    assert!(text.contains(&want) && text.contains(reason), "{text}");
    assert_eq!(
        fs::read_to_string(inside.stage.join("stdout")).unwrap(),
        "",
        "the command ran"
    );
    inside.stage.leave();
}

fn device(host: impl Into<PathBuf>, container: &str) -> Device {
    Device {
        host: host.into(),
        container: container.into(),
        read: true,
        write: true,
        mknod: false,
    }
}

/// A node of the device `/dev/full` on the host, with an owner, a group and a mode by which it is recognized.
fn host_node(stage: &Stage) -> PathBuf {
    let node = stage.join("node");
    mknod(&node, SFlag::S_IFCHR, Bits::empty(), makedev(1, 7)).unwrap();
    std::os::unix::fs::chown(&node, Some(1000), Some(6)).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o640)).unwrap();
    node
}

fn about(path: &Path) -> (u64, u32, u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.rdev(), found.mode(), found.uid(), found.gid())
}

/// Owner and group are the container's root, unless the container has the group of the host's node.
#[rstest]
#[case::without_a_user_namespace(Users::Host, "0:6")]
#[case::in_a_user_namespace(private_users(), "0:0")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_works_and_the_host_s_node_stays_as_it_is(
    #[case] users: Users,
    #[case] owner: &str,
) {
    let inside = Inside::new();
    let node = host_node(&inside.stage);
    let before = (about(&node), about(Path::new("/dev/full")));
    let script = "for n in /dev/mine /dev/a/b/full; do stat -c '%t:%T %a %u:%g' $n; echo x 2>&1 > $n; done; \
        stat -c '%a %u:%g' /dev/a /dev/a/b; stat -c '%a %u:%g' /dev/full; head -c 3 /dev/full | wc -c";
    let printed = inside.run(inside.spec(script).with(|spec| {
        spec.users = users;
        spec.resources.devices = vec![
            device(&node, "/dev/mine"),
            device(&node, "/dev/a/b/full"),
            device("/dev/full", "/dev/full"),
        ];
    }));
    let refused = "sh: write error: No space left on device";
    let want = format!(
        "1:7 640 {owner}\n{refused}\n1:7 640 {owner}\n{refused}\n755 0:0\n755 0:0\n666 0:0\n3\n"
    );
    assert_eq!(printed.await, want);
    assert_eq!((about(&node), about(Path::new("/dev/full"))), before);
    inside.stage.leave();
}

#[rstest]
#[case(Users::Host)]
#[case(private_users())]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_host_that_is_bound_keeps_owner_and_mode(#[case] users: Users) {
    let inside = Inside::new();
    let node = host_node(&inside.stage);
    let before = about(&node);
    let printed = inside.run(inside.spec("stat -c '%t:%T %a' /dev/bound").with(|spec| {
        spec.users = users;
        spec.mounts = vec![Mount::new(node.clone(), "/dev/bound")];
        spec.resources.devices = vec![device("/dev/full", "/dev/bound")];
    }));
    assert_eq!(printed.await, "1:7 640\n");
    assert_eq!(about(&node), before);
    inside.stage.leave();
}

#[rstest]
#[case::another_device("/dev/zero", "exists and is something else")]
#[case::a_link("/dev/fd", "exists and is something else")]
#[case::below_a_link("/dev/fd/x", "fd in the container's /dev is a symbolic link")]
#[case::below_a_mount("/dev/shm/x", "shm in the container's /dev is a mount of its own")]
#[case::below_a_node("/dev/zero/x", "zero in the container's /dev is not a directory")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_whose_path_is_taken_fails_the_start(
    #[case] container: &str,
    #[case] reason: &str,
) {
    let inside = Inside::new();
    let error = inside.refused(inside.spec("echo ran; sleep 1000").with(|spec| {
        spec.resources.devices = vec![device("/dev/full", container)];
    }));
    let error = error.await;
    assert_eq!(error.cause(), Cause::Config);
    let text = error.to_string();
    let want = format!("device /dev/full as {container}: ");
    assert!(text.contains(&want) && text.contains(reason), "{text}");
    inside.stage.leave();
}

/// A directory of the host at `/dev` gets no node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dev_that_the_job_mounts_gets_no_node() {
    let inside = Inside::new();
    let host = HostTmpfs::new(inside.stage.join("host"));
    let error = inside.refused(inside.spec("sleep 1000").with(|spec| {
        spec.mounts = vec![Mount::new(host.0.clone(), "/dev")];
        spec.resources.devices = vec![device("/dev/full", "/dev/mine")];
    }));
    let text = error.await.to_string();
    assert!(
        text.contains("/dev of the container is not the one"),
        "{text}"
    );
    assert!(!host.0.join("mine").exists());
    drop(host);
    inside.stage.leave();
}
