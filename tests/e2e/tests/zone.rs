//! Tier (a): the bridge of a zone and systemd-nspawn's lock for it. Real only: bridges and the lock are made by systemd-nspawn.

use std::fs::{self, File};
use std::path::Path;

use e2e::stage::{Namespace, Stage, end};
use e2e::until;
use nix::fcntl::{FcntlArg, fcntl};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::TaskDir;
use nomad_driver_nspawn::sys::process::ProcessHandle;
use serde_json::json;

const LOCK: &str = "/run/systemd/nspawn-network-zone";

/// Locks as systemd-nspawn does: the whole file, and again if the previous holder has removed it.
fn locked() -> File {
    until("the lock of zones", || {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(LOCK).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "the constant is 1")]
        let whole = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let locked = fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)).is_ok();
        (locked && Path::new(LOCK).exists()).then_some(file)
    })
}

fn has_open(pid: i32, path: &str) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors.is_ok_and(|descriptors| {
        let mut files = descriptors
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok());
        files.any(|file| file == Path::new(path))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bridge_of_a_zone_stays_while_its_lock_is_held() {
    let stage = Stage::new();
    let namespace = Namespace::new(stage.name());
    let plugin = stage.plugin_in(&namespace).await;
    let zone = format!("z{}", e2e::unique());
    let bridge = format!("vz-{zone}");
    let has_bridge = || namespace.ip(&["-brief", "link"]).contains(&bridge);
    let task = stage.shell("echo up; exec sleep 1000");
    let task = task
        .with("network_zone", zone.as_str())
        .with("image", json!(stage.tree("one")));
    let running = stage.up(&plugin, task).await;
    let task_dir = TaskDir::new(running.state(&["state"]).as_str().unwrap());
    let started = task_dir.running().unwrap();

    let lock = locked();
    let nspawn = ProcessHandle::open_checked(started.nspawn).unwrap();
    nspawn.signal(Signal::KILL).unwrap();
    assert!(running.wait(&plugin).await.error.is_some());
    let supervisor = started.started.supervisor.pid;
    until("the supervisor's wait for the lock", || {
        has_open(supervisor, LOCK).then_some(())
    });
    assert!(has_bridge(), "removed while the lock was held");
    fs::remove_file(LOCK).unwrap();
    drop(lock);

    running.destroy(&plugin).await;
    assert!(!has_bridge(), "left: {}", namespace.ip(&["link"]));
    end(plugin).await;
    drop(namespace);
    stage.leave();
}
