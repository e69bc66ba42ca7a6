//! Cases in which a container would get less than the job asks for: the start is refused, or a note with the start reports it.

use nomad_driver_nspawn::container::{Cause, Link, Mount, PortForward};
use nomad_driver_nspawn::sys::kernel;

use super::*;

/// The user namespace of a job that does not configure one.
fn by_default() -> Users {
    Users::Private {
        range: "pick".to_owned(),
        ownership: Some("auto".to_owned()),
    }
}

/// A container with a private network and one forwarded port.
fn with_port(world: &World, address: Option<&str>) -> ContainerSpec {
    let port = PortForward {
        label: "http".to_owned(),
        address: address.map(|text| text.parse().unwrap()),
        host: 25_917,
        container: 80,
    };
    world.spec(DEAF).with(|spec| {
        spec.network.namespace = NetworkNamespace::Private {
            link: Link::Routed,
            ports: vec![port],
            interfaces: Vec::new(),
        }
    })
}

/// The notes that contain `what`.
fn about<'a>(notes: &'a [String], what: &str) -> Vec<&'a String> {
    notes.iter().filter(|note| note.contains(what)).collect()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_of_an_address_that_the_host_does_not_have_is_refused(world: World) {
    let address = "203.0.113.7";
    let error = world.refused(with_port(&world, Some(address))).await;
    assert_eq!(error.cause(), Cause::Resources, "{error:?}");
    let text = error.to_string();
    for part in ["\"http\"", address, "host_network"] {
        assert!(text.contains(part), "{text}");
    }
    world.leave(&[]).await;
}

/// procfs does not support id-mapped mounts.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_without_an_id_mapping_is_reported(world: World) {
    let mounts = vec![Mount::new("/proc/sys/kernel", "/mnt").with_read_only(true)];
    let spec = |users| {
        world.spec(DEAF).with(|spec| {
            spec.mounts = mounts.clone();
            spec.users = users;
        })
    };
    let started = world.up(spec(by_default())).await;
    let reported = about(&started.notes, "id mapping");
    let [reported] = reported.as_slice() else {
        panic!("{:?}", started.notes)
    };
    for part in ["/mnt", "the file system proc", "user_namespacing"] {
        assert!(reported.contains(part), "{reported}");
    }
    within(world.backend.remove(&started.id)).await.unwrap();
    let plain = world.up(spec(Users::Host)).await;
    assert_eq!(about(&plain.notes, "id mapping"), [""; 0]);
    world.leave(&[&plain]).await;
}

/// systemd-nspawn can't map the ids of such a root, and a process that may mount nothing leaves it to systemd-nspawn.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_of_several_mounts_is_mapped_by_who_may_mount(world: World) {
    let spec = world.spec("exit 7").with(|spec| {
        spec.users = by_default();
        spec.rootfs.volatile = Volatile::State;
    });
    if kernel::may_mount() {
        let started = world.start(spec).await;
        assert_eq!(ended(&world.end(&started).await), (7, 0));
        return world.leave(&[&started]).await;
    }
    let text = world.refused(spec).await.to_string();
    assert!(text.contains("Failed to set up ID mapped mounts"), "{text}");
    world.leave(&[]).await;
}

/// Only root can create files of other users and file capabilities; without root nothing can be lost and nothing is reported.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losses_from_changing_owners_are_reported(world: World) {
    let root = nix::unistd::geteuid().is_root();
    let file = world.tree.join("etc/high");
    fs::write(&file, "").unwrap();
    let program = world.tree.join("usr/bin/capable");
    fs::copy(
        fs::canonicalize(world.tree.join("bin/sh")).unwrap_or_else(|_| "/bin/sh".into()),
        &program,
    )
    .unwrap();
    if root {
        std::os::unix::fs::chown(&file, Some(1_516_583_083), Some(0)).unwrap();
        // Revision 2, effective, CAP_NET_RAW.
        let mut capability = [0_u8; 20];
        capability[..6].copy_from_slice(&[1, 0, 0, 2, 0, 0x20]);
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&program, "security.capability", &capability, flags).unwrap();
    }
    let spec = || {
        world.spec(DEAF).with(|spec| {
            spec.users = Users::Private {
                range: "1048576:65536".to_owned(),
                ownership: Some("chown".to_owned()),
            }
        })
    };
    let started = world.up(spec()).await;
    let reported = about(&started.notes, "changing the owners");
    let said = |part: &str| reported.iter().any(|note| note.contains(part));
    assert_eq!(reported.len(), if root { 2 } else { 0 }, "{reported:?}");
    for part in [
        "capabilities of 1 files, the first is /usr/bin/capable.",
        "in 1 files: /etc/high belongs to 1516583083, which becomes 14507.",
    ] {
        assert_eq!(said(part), root, "{reported:?}");
    }
    world.leave(&[&started]).await;
}
