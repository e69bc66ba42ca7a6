//! The device nodes of the host. systemd-nspawn makes those of a container itself. Where it may not, some releases bind the host's node and
//! give that to the container's user: then programs of the host lose a device such as `/dev/net/tun`. Real only: device nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileTypeExt;

use rstest::rstest;

use super::devices::{LOOP_CONTROL, node};
use super::own_network::Hosts;
use super::*;

/// Owner, group, mode with the type, and device of each node.
type Nodes = BTreeMap<PathBuf, (u32, u32, u32, u64)>;

/// The nodes of the host, without those that logins and other tests on this machine make and change: terminals, and loop devices.
fn nodes_of_host() -> Nodes {
    let mut found = Nodes::new();
    collect(Path::new("/dev"), &mut found);
    for path in ["/dev/null", "/dev/net/tun", "/dev/fuse"].map(Path::new) {
        let is_found = found.contains_key(path);
        assert_eq!(is_found, path.exists(), "{}", path.display());
    }
    found
}

fn collect(directory: &Path, found: &mut Nodes) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let is_loop = entry.file_name().as_encoded_bytes().starts_with(b"loop");
        if is_loop || ["/dev/pts", "/dev/shm"].map(Path::new).contains(&&*path) {
            continue;
        }
        // Another program's node may be gone by now.
        let Ok(it) = path.symlink_metadata() else {
            continue;
        };
        let kind = it.file_type();
        if kind.is_dir() {
            collect(&path, found);
        } else if kind.is_char_device() || kind.is_block_device() {
            found.insert(path, (it.uid(), it.gid(), it.mode(), it.rdev()));
        }
    }
}

/// The nodes that are new, gone or not as they were: path, before and now.
fn changed(before: &Nodes) -> Vec<String> {
    let now = nodes_of_host();
    let paths: BTreeSet<_> = before.keys().chain(now.keys()).collect();
    let differs = |path: &&&PathBuf| before.get(**path) != now.get(**path);
    let show = |path: &PathBuf| {
        let (before, now) = (before.get(path), now.get(path));
        format!("{}: {before:?}, now {now:?}", path.display())
    };
    paths
        .iter()
        .filter(differs)
        .map(|path| show(path))
        .collect()
}

/// Says of each node whether it can be opened, and of one that no container of these tests may use whether it can be made too.
const SCRIPT: &str = r#"
say() {
    case $2 in
        '') echo "$1 yes" ;;
        *'not permitted'*) echo "$1 no" ;;
        *'no such file'*) echo "$1 none" ;;
        *) echo "$1 $2" ;;
    esac
}
for path in /dev/null /dev/net/tun /dev/fuse /srv/control; do
    say $path "$( (eval ": < $path") 2>&1)"
done
say make "$(mknod /tmp/control c 10 237 2>&1)"
"#;

/// What [`SCRIPT`] says. `/dev/net/tun` is in every container, `/dev/fuse` if the job lists it; both if the host has them.
fn wanted(has_fuse: bool) -> String {
    let word = |has| if has { "yes" } else { "none" };
    let tun = word(Path::new("/dev/net/tun").exists());
    let fuse = word(has_fuse);
    format!("/dev/null yes\n/dev/net/tun {tun}\n/dev/fuse {fuse}\n/srv/control no\nmake no\n")
}

/// How a container of these tests is connected.
#[derive(Debug, Clone, Copy)]
enum Network {
    Host,
    Own,
    Group,
    None,
}

/// Runs containers as commands and as a booted init, with and without devices in the job. What isn't allowed is refused to the program that
/// opens it, and fails no start.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_container_changes_a_device_node_of_the_host(
    #[values(Network::Host, Network::Own, Network::Group, Network::None)] network: Network,
    #[values(false, true)] users: bool,
) {
    let stage = Stage::new();
    let hosts = Hosts::new(&stage);
    node(stage.join("tree/srv/control"), LOOP_CONTROL);
    let init = stage.join("tree/sbin/init");
    fs::create_dir(stage.join("tree/sbin")).unwrap();
    let before = nodes_of_host();
    for lists_devices in [false, true] {
        let options = json!({ "devices": lists_devices });
        let plugin = stage.plugin_in_with(&hosts.host, &options).await;
        let listed = ["/dev/net/tun", "/dev/fuse"].into_iter();
        let listed = listed.filter(|path| lists_devices && Path::new(path).exists());
        let listed: Vec<_> = listed.map(|path| json!({ "host_path": path })).collect();
        let has_fuse = listed.iter().any(|one| one["host_path"] == "/dev/fuse");
        // An image's init may run before the driver has made the nodes.
        let wait = match has_fuse {
            true => "until test -c /dev/fuse; do sleep 0.02; done",
            false => "",
        };
        fs::write(&init, format!("#!/bin/sh\n{wait}\n{SCRIPT}")).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        for boots in [false, true] {
            let task = match boots {
                true => stage.words(&[]).with("boot", true),
                false => stage.shell(SCRIPT),
            };
            let task = task
                .with("user_namespacing", users)
                .with("devices", listed.clone());
            let task = match network {
                Network::Host => task,
                Network::Own => task.with("network_veth", true),
                Network::Group => task.network(&hosts.other.path()),
                Network::None => task.with("network_mode", "none"),
            };
            let ended = stage.run_on(&plugin, task).await;
            let case = format!("devices {lists_devices}, boot {boots}: {ended:?}");
            assert_eq!(ended.stdout, wanted(has_fuse), "{case}");
            assert_eq!(ended.exit.error, None, "{case}");
        }
        end(plugin).await;
        let changed = changed(&before);
        assert!(
            changed.is_empty(),
            "devices {lists_devices}: {}",
            changed.join("\n")
        );
    }
    drop(hosts);
    stage.leave();
}
