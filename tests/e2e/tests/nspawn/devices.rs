//! The device policy of a container: what `cgroup_permissions` of a device allows, and what a container with a user namespace may use. Real
//! only: nodes in a `/dev` of the container's own.

use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nomad_driver_nspawn::container::{Device, Mode, Users};
use rstest::rstest;

use super::inside::{Inside, private_users};
use super::*;

/// `/dev/loop-control`, which does nothing when it is opened.
pub(super) const LOOP_CONTROL: (u64, u64) = (10, 237);

/// As in the contract.
const FUNCTIONS: &str = r#"
say() { case $1 in '') echo yes ;; *'not permitted'*) echo no ;; *) echo "$1" ;; esac; }
try() { say "$( (eval ": $2 $1") 2>&1)"; }
make() { say "$(mknod "$@" 2>&1)"; }
"#;

/// A node of a character device that every user may use.
pub(super) fn node(path: PathBuf, (major, minor): (u64, u64)) -> PathBuf {
    mknod(&path, SFlag::S_IFCHR, Bits::empty(), makedev(major, minor)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    path
}

fn device(host: &Path, letters: &str) -> Device {
    Device {
        host: host.to_owned(),
        container: "/dev/mine".into(),
        read: letters.contains('r'),
        write: letters.contains('w'),
        mknod: letters.contains('m'),
    }
}

/// Making a node is never possible in a user namespace.
#[rstest]
#[case::nothing_else(Users::Host, "r", "yes\nno\nno\n")]
#[case::reading_and_writing(Users::Host, "rw", "yes\nyes\nno\n")]
#[case::everything(Users::Host, "rwm", "yes\nyes\nyes\n")]
#[case::only_making(Users::Host, "m", "no\nno\nyes\n")]
#[case::nothing_else_in_a_user_namespace(private_users(), "r", "yes\nno\nno\n")]
#[case::everything_in_a_user_namespace(private_users(), "rwm", "yes\nyes\nno\n")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_permissions_of_a_device_are_what_the_kernel_allows(
    #[case] users: Users,
    #[case] letters: &str,
    #[case] want: &str,
) {
    let inside = Inside::new();
    let host = node(inside.stage.join("control"), LOOP_CONTROL);
    let script =
        format!("{FUNCTIONS} try /dev/mine '<'; try /dev/mine '>'; make /tmp/copy c 10 237");
    let printed = inside.run(inside.spec(&script).with(|spec| {
        spec.users = users;
        spec.resources.devices = vec![device(&host, letters)];
    }));
    assert_eq!(printed.await, want);
    inside.stage.leave();
}

/// The node is in the tree, where a container without a user namespace has left it, and its mode lets every user use it. A device that
/// every container has works there.
#[rstest]
#[case::plain(Mode::Plain)]
#[case::process_two(Mode::ProcessTwo)]
#[case::booted(Mode::Boot)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_in_the_tree_is_no_way_to_a_device(
    #[case] mode: Mode,
    #[values(Users::Host, private_users())] users: Users,
) {
    let inside = Inside::new();
    let tree = inside.stage.join("tree");
    node(tree.join("srv/control"), LOOP_CONTROL);
    node(tree.join("srv/null"), (1, 3));
    let script =
        format!("{FUNCTIONS} try /srv/control '<'; try /srv/control '>'; try /srv/null '>'");
    let init = tree.join("sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    fs::write(&init, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let printed = inside.run(inside.spec(&script).with(|spec| {
        spec.users = users;
        spec.payload.mode = mode;
        if mode == Mode::Boot {
            spec.payload.command = Vec::new();
        }
    }));
    assert_eq!(printed.await, "no\nno\nyes\n");
    inside.stage.leave();
}

/// systemd-nspawn reads and writes the device to mount the image, also where it is in the cgroup of its container. `Stage::leave` finds a
/// loop device that is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_on_a_disk_image_does_not_get_what_systemd_nspawn_needs() {
    let stage = Stage::new();
    let udev = stage.udev();
    let plugin = stage.plugin_for_images(&udev, json!({})).await;
    let host = node(stage.join("control"), LOOP_CONTROL);
    let image = stage.image("disk.raw", &stage.join("tree"));
    let script = format!("{FUNCTIONS} try /dev/mine '<'; try /dev/mine '>'; make /tmp/disk b 7 0");
    let device = json!([{
        "host_path": host,
        "container_path": "/dev/mine",
        "cgroup_permissions": "r",
    }]);
    let task = stage.shell(&script).with("image", json!(image));
    let task = task.with("devices", device);
    assert_eq!(stage.run_on(&plugin, task).await.said(), "yes\nno\nno\n");
    end(plugin).await;
    stage.leave();
}
