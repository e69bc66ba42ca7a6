//! Ends that require a real pid namespace or a real systemd-nspawn; the rest of the exit table is in the contract.

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
