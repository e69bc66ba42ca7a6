//! Ends that require a real pid namespace or a real systemd-nspawn; the rest of the exit table is in the contract.

use rstest::rstest;

use super::*;

/// If reboot(2) is called in a pid namespace, the kernel kills its PID 1 by a signal that identifies the request. Real only: pid
/// namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reboot_call_in_the_container_is_reported() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let init = stage.join("tree/sbin/init");
    fs::create_dir(stage.join("tree/sbin")).unwrap();
    for (ask, code) in [("reboot -f", 133), ("poweroff -f", 0), ("halt -f", 0)] {
        let words = format!("{ask}; sleep 1000");
        fs::write(&init, format!("#!/bin/sh\n{words}\n")).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        let booted = stage
            .words(&[])
            .with("command", json!([]))
            .with("boot", true);
        for (how, task) in [
            ("plain", stage.shell(&words)),
            ("process_two", stage.shell(&words).with("process_two", true)),
            ("boot", booted),
        ] {
            let exit = stage.run_on(&plugin, task).await.exit;
            assert_eq!((exit.code, exit.signal), (code, 0), "{how}: {ask}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// systemd-nspawn also locks its root by the inode, and leaves that lock file if it is killed. For a read-only root that lacks mount points
/// the root is a skeleton directory made by the driver. Real only: systemd-nspawn's own locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_systemd_nspawn_leaves_no_lock_of_its_root() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo up; exec sleep 1000")
        .with("read_only", true);
    let running = stage.up(&plugin, task).await;
    let own = running.state(&["state"]).as_str().map(PathBuf::from);
    let roots = [own.unwrap().join("root"), stage.join("tree")];
    let held: Vec<PathBuf> = roots
        .iter()
        .filter_map(|root| fs::metadata(root).ok())
        .map(|root| format!("inode-{}:{}", root.dev(), root.ino()))
        .map(|name| Path::new("/run/systemd/nspawn/locks").join(name))
        .filter(|lock| lock.exists())
        .collect();
    assert_eq!(held.len(), 1, "{roots:?}");
    running.stop(&plugin, Duration::ZERO, "").await;
    running.destroy(&plugin).await;
    assert!(!held[0].exists(), "{held:?}");
    end(plugin).await;
    stage.leave();
}

/// Kills the systemd-nspawn of a container, as an operator could; the task's exit is reported.
async fn kill_nspawn(running: &Running, plugin: &Plugin) {
    let state = running.state(&["state"]).as_str().map(PathBuf::from);
    let nspawn = TaskDir::new(state.unwrap()).running().unwrap().nspawn;
    ProcessHandle::open_checked(nspawn)
        .unwrap()
        .signal(Signal::KILL)
        .unwrap();
    let exit = running.wait(plugin).await;
    assert!(exit.error.is_some(), "{exit:?}");
}

/// Locks, copies, loop devices and mounts are checked at the end of the test. Real only: loop devices and mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_killed_on_a_disk_image_leaves_nothing() {
    let stage = Stage::new();
    let udev = stage.udev();
    let plugin = stage.plugin_for_images(&udev, json!({})).await;
    let image = stage.image("disk.raw", &stage.join("tree"));
    for ephemeral in [false, true] {
        let task = stage.shell("echo up; exec sleep 1000");
        let task = task
            .with("image", json!(image))
            .with("ephemeral", ephemeral);
        let running = stage.up(&plugin, task).await;
        let held = stage.marks().left();
        assert!(
            held.iter().any(|line| line.starts_with("loop device")),
            "{held:?}"
        );
        kill_nspawn(&running, &plugin).await;
        running.destroy(&plugin).await;
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: user namespaces, and the lock of the ids that systemd-nspawn picks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_killed_in_a_user_namespace_leaves_no_lock_of_its_ids() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = stage
        .shell("echo up; exec sleep 1000")
        .with("user_namespacing", true);
    let running = stage.up(&plugin, task).await;
    let map = fs::read_to_string(format!("/proc/{}/uid_map", running.leader())).unwrap();
    let first = map.split_whitespace().nth(1).unwrap();
    let lock = Path::new("/run/systemd/nspawn-uid").join(first);
    assert!(lock.exists(), "{map}");
    kill_nspawn(&running, &plugin).await;
    running.destroy(&plugin).await;
    assert!(!lock.exists(), "{}", lock.display());
    end(plugin).await;
    stage.leave();
}

/// The bridge exists as long as it has ports. Real only: network interfaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bridge_of_a_zone_goes_with_the_last_systemd_nspawn_that_is_killed() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    let plugin = stage.plugin_in(&namespace).await;
    let zone = format!("z{}", e2e::unique());
    let bridge = format!("nz-{zone}");
    let links = || namespace.ip(&["-brief", "link"]);
    let mut all = Vec::new();
    for tree in ["one", "two"] {
        let tree = stage.tree(tree);
        let task = stage.shell("echo up; exec sleep 1000");
        let task = task
            .with("network_zone", zone.as_str())
            .with("image", json!(tree));
        let running = stage.up(&plugin, task).await;
        all.push(running);
    }
    for running in all {
        assert!(links().contains(&bridge), "{}", links());
        kill_nspawn(&running, &plugin).await;
        running.destroy(&plugin).await;
    }
    assert!(!links().contains(&bridge), "{}", links());
    end(plugin).await;
    drop(namespace);
    stage.leave();
}

/// The error contains the reason from the stderr of systemd-nspawn. Real only: its stderr.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_disk_image_is_refused_with_systemd_nspawns_message() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let image = stage.file("broken.raw", &"no file system\n".repeat(4096));
    let refused = stage
        .refused(&plugin, stage.shell("true").with("image", json!(image)))
        .await;
    let bare = bare(&["--image", image.to_str().unwrap(), "/bin/true"]);
    assert!(!bare.status.success());
    let said = String::from_utf8_lossy(&bare.stderr);
    let reason = said.lines().last().unwrap();
    assert!(refused.contains(reason), "{refused:?} without {reason:?}");
    end(plugin).await;
    stage.leave();
}

/// The copies beside a tree, and their locks.
fn copies_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut copies: Vec<_> = names.filter(|name| name.starts_with(".#")).collect();
    copies.sort();
    copies
}

/// Before the name of the copy is known. What others have there is kept, whether it is in use or not. Real only: copies and their names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_nspawn_killed_while_it_copies_leaves_no_copy_and_the_others_stay() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = |text: &str| stage.shell(text).with("ephemeral", true);
    let other = stage.up(&plugin, task("echo up; exec sleep 1000")).await;
    let of_other = copies_in(stage.path());
    assert_eq!(of_other.len(), 2, "{of_other:?}");
    // Enough for a copy that takes a while.
    for directory in 0..200 {
        let directory = stage.join("tree/srv").join(directory.to_string());
        fs::create_dir(&directory).unwrap();
        for file in 0..100 {
            fs::write(directory.join(file.to_string()), "").unwrap();
        }
    }
    let task = task("exec sleep 1000");
    let allocation = stage.allocation(&task);
    let start = stage.start_in(&plugin, &task, allocation);
    let foreign = stage.join(".#machine.tree20123456789abcdef");
    let killed = async {
        let own = within("the copy", async {
            loop {
                let mut found = copies_in(stage.path());
                found.retain(|name| !of_other.contains(name));
                if found.len() == 2 {
                    break found;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        fs::create_dir(&foreign).unwrap();
        fs::write(
            foreign.with_file_name(".#.#machine.tree20123456789abcdef.lck"),
            "",
        )
        .unwrap();
        let of_start = |command: &str| {
            command.contains("systemd-nspawn")
                && command.contains("--ephemeral")
                && !command.contains(other.allocation.id())
        };
        let nspawns = stage.marks().processes();
        let nspawn = nspawns.iter().find(|one| of_start(&one.command)).unwrap();
        let pid = nix::unistd::Pid::from_raw(nspawn.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        own
    };
    let (started, own) = tokio::join!(start, killed);
    let error = started.map(|_| ()).unwrap_err().error.to_string();
    assert!(error.contains("ended by SIGKILL"), "{error}");
    tokio::task::block_in_place(|| {
        until("the removal of the copy", || {
            let left = copies_in(stage.path());
            own.iter().all(|name| !left.contains(name)).then_some(())
        });
    });
    let left = copies_in(stage.path());
    assert!(of_other.iter().all(|name| left.contains(name)), "{left:?}");
    assert!(foreign.exists());
    fs::remove_dir(&foreign).unwrap();
    fs::remove_file(foreign.with_file_name(".#.#machine.tree20123456789abcdef.lck")).unwrap();
    other.stop(&plugin, Duration::ZERO, "").await;
    other.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// systemd-nspawn copies a tree that is a mount point into itself, and any other beside it: also one that only has another device number. Real
/// only: mounts, and snapshots of btrfs.
#[rstest]
#[case::subvolume(true)]
#[case::bound(false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_systemd_nspawn_leaves_no_copy_of(#[case] subvolume: bool) {
    let stage = Stage::new();
    let (top, tree) = (stage.join("top"), stage.join("top/tree"));
    fs::create_dir(&top).unwrap();
    let run = |words: &str| {
        let script = format!("cd {} && {words}", stage.path().display());
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    if subvolume {
        if Command::new("mkfs.btrfs")
            .arg("--version")
            .output()
            .is_err()
        {
            stage.leave();
            return support::not_applicable("mkfs.btrfs is not installed");
        }
        run("truncate -s 300M disk && mkfs.btrfs -q disk && mount -o loop disk top");
        run("btrfs subvolume create top/tree");
        e2e::busybox_tree(&tree);
    } else {
        if e2e::nspawn_version() >= 257 {
            stage.leave();
            return support::not_applicable(
                "this systemd-nspawn may copy a tree that is a mount point into its copy, without end",
            );
        }
        fs::create_dir(&tree).unwrap();
        run("mount --bind tree top/tree");
    }
    let copies = if subvolume { &top } else { &tree };
    let plugin = stage.plugin().await;
    let task = stage.shell("echo up; exec sleep 1000");
    let task = task.with("image", json!(tree)).with("ephemeral", true);
    let running = stage.up(&plugin, task).await;
    assert_eq!(copies_in(copies).len(), 2);
    kill_nspawn(&running, &plugin).await;
    running.destroy(&plugin).await;
    assert_eq!(copies_in(copies), Vec::<String>::new());
    end(plugin).await;
    run(if subvolume {
        "umount top"
    } else {
        "umount top/tree"
    });
    stage.leave();
}
