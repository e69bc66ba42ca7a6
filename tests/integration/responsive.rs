//! A plugin with one worker thread serves every other task while four starts hang. Two ways to hang: a bind source on a file system that
//! answers everything but `statfs`, as a network file system without its server does (this needs a mount); and a failpoint in the middle of
//! a start's preparation, for every user.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dev_agent::Plugin;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nomad_driver_nspawn::failpoint::Failpoint;
use serde_json::json;
use support::not_applicable;
use support::trap::Trap;

use crate::harness::{Host, Running, Task, eventually, is_root, within};
use crate::lifecycle::nothing_left;

/// The response time limit for an unaffected task.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);
/// The number of attempts. On a loaded machine some responses are late; with a blocked worker all of them are.
const ATTEMPTS: usize = 20;
const HUNG_STARTS: usize = 4;

/// A plugin whose requests all share one worker thread.
async fn plugin_with_one_worker(host: &Host) -> Plugin {
    let launch = host.launch().set("TOKIO_WORKER_THREADS", "1");
    within("the plugin's start", async {
        let plugin = Plugin::launch(launch).await.unwrap();
        plugin.configure(&host.config()).await.unwrap();
        plugin
    })
    .await
}

/// Tasks that exit immediately on SIGTERM.
async fn other_tasks(host: &Host, plugin: &Plugin) -> Vec<Running> {
    let mut tasks = Vec::new();
    for number in 0..ATTEMPTS {
        let root = host.tree(&format!("served-{number}"));
        let task = host
            .shell("trap 'kill $!; exit 0' TERM; sleep 1000 & echo up; wait")
            .with("image", json!(root));
        tasks.push(host.up(plugin, task).await);
    }
    tasks
}

/// Repeats a call until one returns within the limit.
async fn answered_in_time(what: &str, mut call: impl AsyncFnMut(usize)) {
    let mut best = Duration::MAX;
    for attempt in 0..ATTEMPTS {
        let begin = Instant::now();
        within(what, call(attempt)).await;
        best = best.min(begin.elapsed());
        if best < ANSWER_LIMIT {
            return;
        }
    }
    panic!("{what} took {best:?} at best");
}

async fn others_are_served(plugin: &Plugin, tasks: &[Running]) {
    answered_in_time("InspectTask", async |attempt| {
        tasks[attempt].inspect(plugin).await.unwrap();
    })
    .await;
    answered_in_time("Fingerprint", async |_| {
        plugin.fingerprint().await.unwrap();
    })
    .await;
    answered_in_time("StopTask", async |attempt| {
        let id = &tasks[attempt].id;
        let stopped = plugin.stop(id, Duration::from_secs(20), "SIGTERM").await;
        stopped.unwrap();
    })
    .await;
}

/// Four starts of this task hang once `hung` has returned, and succeed after `release` has been called.
async fn four_hung_starts_hinder_no_one<R: FnOnce()>(
    host: &Host,
    task: Task,
    hung: impl AsyncFnOnce(&Host) -> R,
) {
    let plugin = plugin_with_one_worker(host).await;
    let tasks = other_tasks(host, &plugin).await;
    let start = async |root: &str| {
        let task = task.clone().with("image", json!(host.tree(root)));
        host.start(&plugin, task).await
    };
    let meanwhile = async {
        let release = hung(host).await;
        others_are_served(&plugin, &tasks).await;
        release();
    };
    let (a, b, c, d, ()) = tokio::join!(
        start("hung-a"),
        start("hung-b"),
        start("hung-c"),
        start("hung-d"),
        meanwhile
    );
    let started = [a, b, c, d];
    for task in started.iter().chain(&tasks) {
        task.destroy(&plugin).await;
    }
    nothing_left(host, &plugin).await;
}

#[tokio::test]
async fn starts_that_hang_in_preparation_do_not_block_other_tasks() {
    let host = Host::new();
    let task = host.shell("sleep 60");
    four_hung_starts_hinder_no_one(&host, task, async |host: &Host| {
        let mut trap = Trap::at(&host.state(), Failpoint::BeforeOrder);
        for _ in 0..HUNG_STARTS {
            within("a start that hangs", trap.reached()).await;
        }
        move || drop(trap)
    })
    .await;
}

/// In a thread of its own, because the mount is in a private mount namespace.
#[test]
fn starts_on_a_hanging_file_system_do_not_block_other_tasks() {
    if !is_root() {
        let refused = unshare(CloneFlags::CLONE_NEWNS).unwrap_err();
        assert_eq!(refused, nix::Error::EPERM);
        not_applicable("only root can mount the file system that hangs");
        return;
    }
    let test = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let host = Host::new();
            let mount = Arc::new(SilentMount::new(host.join("silent")));
            let task = host
                .shell("sleep 60")
                .with("user_namespacing", json!(true))
                .with("idmap", json!(false))
                .with("bind", json!([{ mount.path.to_str().unwrap(): "/mnt" }]));
            let silent = Arc::clone(&mount);
            four_hung_starts_hinder_no_one(&host, task, async move |_: &Host| {
                let hung = || silent.held() == HUNG_STARTS;
                eventually("four starts that hang", hung).await;
                move || silent.answer()
            })
            .await;
        });
    };
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

/// A FUSE file system with one empty directory, in a private mount namespace of the calling thread. It does not say what the directory is.
struct SilentMount {
    path: PathBuf,
    device: File,
    attributes: Arc<Mutex<Attributes>>,
}

#[derive(Debug)]
enum Attributes {
    /// Keeps these requests without an answer.
    Silent(Vec<u64>),
    Answering,
}

impl SilentMount {
    fn new(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("silent"), &path, Some("fuse"), flags, Some(&*options)).unwrap();
        let attributes = Arc::new(Mutex::new(Attributes::Silent(Vec::new())));
        let (server, state) = (device.try_clone().unwrap(), Arc::clone(&attributes));
        std::thread::spawn(move || serve(&server, &state));
        Self {
            path,
            device,
            attributes,
        }
    }

    /// How many requests are waiting.
    fn held(&self) -> usize {
        match &*lock(&self.attributes) {
            Attributes::Silent(held) => held.len(),
            Attributes::Answering => 0,
        }
    }

    /// Answers the waiting requests, and all later ones.
    fn answer(&self) {
        let mut attributes = lock(&self.attributes);
        if let Attributes::Silent(held) = std::mem::replace(&mut *attributes, Attributes::Answering)
        {
            for unique in held {
                reply(&self.device, unique, 0, &directory());
            }
        }
    }
}

impl Drop for SilentMount {
    fn drop(&mut self) {
        // With MNT_FORCE pending requests fail with an error, and the server thread ends.
        let _ = umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}

fn lock(attributes: &Mutex<Attributes>) -> MutexGuard<'_, Attributes> {
    attributes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the kernel's requests in the format of `linux/fuse.h` until the file system is unmounted.
fn serve(mut device: &File, attributes: &Mutex<Attributes>) {
    let mut request = vec![0; 256 * 1024];
    while let Ok(length) = device.read(&mut request) {
        assert!(length >= 40, "a header has 40 bytes");
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
        match opcode {
            // FUSE_FORGET, FUSE_INTERRUPT and FUSE_BATCH_FORGET need no answer.
            2 | 36 | 42 => {}
            // FUSE_GETATTR.
            3 => match &mut *lock(attributes) {
                Attributes::Silent(held) => held.push(unique),
                Attributes::Answering => reply(device, unique, 0, &directory()),
            },
            // FUSE_STATFS.
            17 => reply(device, unique, 0, &[0; 80]),
            // FUSE_INIT, protocol version 7.31, with writes of one page.
            26 => {
                let mut answer = [0; 64];
                answer[..4].copy_from_slice(&7_u32.to_ne_bytes());
                answer[4..8].copy_from_slice(&31_u32.to_ne_bytes());
                answer[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
                reply(device, unique, 0, &answer);
            }
            // FUSE_OPENDIR, FUSE_READDIR and FUSE_RELEASEDIR: the directory is empty.
            27 => reply(device, unique, 0, &[0; 16]),
            28 | 29 => reply(device, unique, 0, &[]),
            // FUSE_LOOKUP.
            1 => reply(device, unique, -2, &[]),
            // ENOSYS: the kernel works without it.
            _ => reply(device, unique, -38, &[]),
        }
    }
}

/// The answer to FUSE_GETATTR: a directory, valid for no time.
fn directory() -> [u8; 104] {
    let mut answer = [0; 104];
    answer[16..24].copy_from_slice(&1_u64.to_ne_bytes());
    answer[76..80].copy_from_slice(&0o040_755_u32.to_ne_bytes());
    answer[80..84].copy_from_slice(&2_u32.to_ne_bytes());
    answer
}

fn reply(mut device: &File, unique: u64, error: i32, body: &[u8]) {
    let length = u32::try_from(16 + body.len()).unwrap();
    let mut answer = length.to_ne_bytes().to_vec();
    answer.extend_from_slice(&error.to_ne_bytes());
    answer.extend_from_slice(&unique.to_ne_bytes());
    answer.extend_from_slice(body);
    // The requesting process may have exited.
    let _ = device.write_all(&answer);
}
