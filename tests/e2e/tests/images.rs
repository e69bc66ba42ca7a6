//! Tier (a): images on file systems with limitations. Real only: mounts.

use std::path::{Path, PathBuf};

use e2e::stage::{Stage, end, within};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

/// A mount that is unmounted on drop.
struct Mounted(PathBuf);

impl Mounted {
    fn new(kind: Option<&str>, source: &Path, at: &Path, flags: MsFlags, data: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        mount(Some(source), at, kind, flags, Some(data)).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // An error means that it is already unmounted.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_image_that_is_mounted_read_only_is_refused_by_name() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let source = stage.join("source");
    std::fs::create_dir(&source).unwrap();
    stage.tree("source/tree");
    let at = stage.join("mounted");
    let mounted = Mounted::new(None, &source, &at, MsFlags::MS_BIND, "");
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let none: Option<&str> = None;
    mount(none, &at, none, read_only, none).unwrap();
    let task = stage
        .shell("exit 0")
        .with("image", json!(at.join("tree")))
        .with("ephemeral", true);
    let refusal = stage.refused(&plugin, task).await;
    for part in [
        "config.ephemeral",
        "mounted/tree",
        "read-only",
        "config.volatile",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    // The recommended setting works.
    let task = stage
        .shell("echo x > /etc/x; echo up")
        .with("image", json!(at.join("tree")))
        .with("volatile", "overlay");
    assert_eq!(stage.run_on(&plugin, task).await.said(), "up\n");
    drop(mounted);
    end(plugin).await;
    stage.leave();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_on_overlayfs_is_copied_and_reported() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let lower = stage.tree("lower");
    // An overlay can't be the upper layer of another overlay.
    let memory = stage.join("memory");
    let below = Mounted::new(
        Some("tmpfs"),
        Path::new("none"),
        &memory,
        MsFlags::empty(),
        "",
    );
    let (upper, work) = (memory.join("upper"), memory.join("work"));
    for dir in [&upper, &work] {
        std::fs::create_dir(dir).unwrap();
    }
    let data = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let root = stage.join("root");
    let mounted = Mounted::new(
        Some("overlay"),
        Path::new("overlay"),
        &root,
        MsFlags::empty(),
        &data,
    );
    let mut events = plugin.events().await.unwrap();
    let task = || {
        stage
            .shell("echo up")
            .with("image", json!(root))
            .with("user_namespacing", true)
    };
    assert_eq!(stage.run_on(&plugin, task()).await.said(), "up\n");
    let event = within("an event", events.message()).await.unwrap().unwrap();
    for part in [
        "overlay",
        "copies the whole tree",
        " files, ",
        " MiB",
        "user_namespacing",
    ] {
        assert!(event.message.contains(part), "{}", event.message);
    }
    assert!(upper.join("bin/busybox").exists(), "nothing was copied");
    drop(mounted);
    drop(below);
    end(plugin).await;
    stage.leave();
}
