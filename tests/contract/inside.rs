//! Settings that are applied to a container once systemd-nspawn has made it. What they do is in the end-to-end tests: the containers of
//! the fake have no namespaces and no file systems of their own.

use std::os::unix::fs::MetadataExt as _;

use nomad_driver_nspawn::container::{Cause, Device, TmpfsSizes};

use super::*;

/// The size of the file system at a path of the host, in blocks.
fn size_of(path: &str) -> u64 {
    rustix::fs::statfs(path).map_or(0, |stat| stat.f_blocks)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_of_temporary_file_systems_change_nothing_on_the_host(world: World) {
    const PLACES: [&str; 3] = ["/tmp", "/run", "/dev/shm"];
    let before = PLACES.map(size_of);
    let size = Some(1 << 20);
    let started = world
        .start(world.spec("exit 11").with(|spec| {
            spec.resources.tmpfs = TmpfsSizes {
                tmp: size,
                run: size,
                shm: size,
            };
        }))
        .await;
    // A host without cgroups is a note of every start.
    let about_sizes = started.notes.iter().find(|note| note.contains("size"));
    assert_eq!(about_sizes, None);
    assert_eq!(ended(&world.end(&started).await), (11, 0));
    assert_eq!(PLACES.map(size_of), before);
    world.leave(&[&started]).await;
}

/// The containers of the real systemd-nspawn share the host's network here, those of the fake every namespace. The value is the one that
/// the host has.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sysctl_of_a_namespace_that_the_host_shares_is_refused(world: World) {
    const NAME: &str = "net.ipv4.ip_forward";
    let value = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let value = value.trim().to_owned();
    let said = format!("sysctl {NAME} = \"{value}\": the container shares the net namespace");
    let spec = world.spec(DEAF).with(|spec| {
        spec.resources.sysctls = BTreeMap::from([(NAME.to_owned(), value)]);
    });
    let error = world.refused(spec).await;
    assert_eq!(error.cause(), Cause::Config);
    assert!(error.to_string().contains(&said), "{error}");
    world.leave(&[]).await;
}

#[rstest]
#[case::of_the_host("kernel.panic")]
#[case::leaves_its_directory("net/../kernel/panic")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sysctl_of_the_host_is_refused(world: World, #[case] name: &str) {
    let value = fs::read_to_string("/proc/sys/kernel/panic").unwrap();
    let spec = world.spec(DEAF).with(|spec| {
        let sysctl = (name.to_owned(), value.trim().to_owned());
        spec.resources.sysctls = BTreeMap::from([sysctl]);
    });
    let error = world.refused(spec).await.to_string();
    assert!(error.contains(&format!("sysctl {name} = ")), "{error}");
    world.leave(&[]).await;
}

#[rstest]
#[case::missing("/dev/nspawn-none", "does not exist on the host")]
#[case::not_a_device("/proc/stat", "is not a device on the host")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_the_host_does_not_have_is_refused(
    world: World,
    #[case] host: &str,
    #[case] reason: &str,
) {
    let device = Device {
        host: host.into(),
        container: "/dev/mine".into(),
        read: true,
        write: true,
        mknod: false,
    };
    let spec = world
        .spec(DEAF)
        .with(|spec| spec.resources.devices = vec![device]);
    let error = world.refused(spec).await;
    assert_eq!(error.cause(), Cause::Config);
    let text = error.to_string();
    for part in [host, "/dev/mine", reason] {
        assert!(text.contains(part), "{text}");
    }
    world.leave(&[]).await;
}

/// The real one makes no node either way, because the device's path in the container is that of another.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_changes_no_node_of_the_host(world: World) {
    let about = |path: &str| {
        let found = fs::symlink_metadata(path).unwrap();
        (found.rdev(), found.mode(), found.uid(), found.gid())
    };
    let before = (about("/dev/zero"), about("/dev/full"));
    let device = Device {
        host: "/dev/full".into(),
        container: "/dev/zero".into(),
        read: true,
        write: true,
        mknod: false,
    };
    let spec = world
        .spec(DEAF)
        .with(|spec| spec.resources.devices = vec![device]);
    let error = world.refused(spec).await.to_string();
    assert!(error.contains("device /dev/full as /dev/zero: "), "{error}");
    assert_eq!((about("/dev/zero"), about("/dev/full")), before);
    world.leave(&[]).await;
}
