//! What is applied to a container once systemd-nspawn has made it: sizes of temporary file systems. The specs go to the
//! backend directly. All of it is real only: namespaces and file systems of the container's own.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_nspawn::backend::nspawn::{Settings, Timeouts};
use nomad_driver_nspawn::backend::{ContainerBackend, NspawnBackend};
use nomad_driver_nspawn::container::{ContainerSpec, Exit, Mount, Started, TmpfsSizes, Users};
use rstest::rstest;

use super::*;

const MIB: u64 = 1 << 20;

/// The backend in a stage.
struct Inside {
    stage: Stage,
    backend: NspawnBackend,
}

impl Inside {
    fn new() -> Self {
        let stage = Stage::new();
        let backend = NspawnBackend::new(Settings {
            state_dir: stage.join("state"),
            nspawn: Some("/usr/bin/systemd-nspawn".into()),
            search: std::ffi::OsString::new(),
            binary: e2e::driver(),
            timeouts: Timeouts::default(),
        });
        Self { stage, backend }
    }

    /// A container that runs a shell script in the small tree.
    fn spec(&self, script: &str) -> ContainerSpec {
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

    async fn start(&self, spec: ContainerSpec) -> Started {
        within("the start", self.backend.start(spec)).await.unwrap()
    }

    /// Waits for the exit and removes the container; returns the exit and what it printed.
    async fn finish(&self, started: &Started) -> (Exit, String) {
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
    async fn run(&self, spec: ContainerSpec) -> String {
        let started = self.start(spec).await;
        assert!(started.notes.is_empty(), "{:?}", started.notes);
        let (exit, printed) = self.finish(&started).await;
        assert_eq!((exit.code, &exit.error), (0, &None), "{printed}");
        printed
    }
}

/// The user namespace of a job that does not configure one.
fn private_users() -> Users {
    Users::Private {
        range: "pick".to_owned(),
        ownership: Some("auto".to_owned()),
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
        spec.mounts = vec![Mount {
            source: host.0.clone(),
            target: "/tmp".into(),
            read_only: false,
        }];
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
