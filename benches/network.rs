//! What a network of the container's own costs: its start beside that of `systemd-nspawn --network-veth` by hand, which leaves addresses to
//! DHCP; the first and the last of two hundred starts with ports; and the throughput through a forwarded port beside that through a veth pair
//! and an nftables rule by hand. All in one run, in network namespaces of the benchmark. Needs root, systemd-nspawn, busybox, iproute2, nft
//! (Debian: busybox-static, iproute2, nftables).
//!
//! `--check` exits with status 1 if a budget is exceeded. On a busy machine the result means little.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use dev_agent::{Allocation, Launch, Plugin, TaskSpec};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_driver_nspawn::proto::driver::{InspectTaskRequest, PortMapping, TaskConfig};
use serde_json::json;

mod figures;

use figures::bare::Bare;
use figures::{Report, driver, in_memory, is_check, make_tree, median, ms, run};

/// Pairs of starts; the first ones warm the caches and are not counted.
const PAIRS: usize = 11;
const WARM_UP: usize = 3;
/// The budget of a start, in ms more than one by hand.
const MORE: f64 = 10.0;
/// The number of starts with ports that all run at the end.
const TASKS: usize = 200;
/// The starts at the beginning and at the end that are compared, and the budget of the last, as a ratio to the first.
const SAMPLE: usize = 20;
const LAST: f64 = 1.5;
/// Pairs of transfers, how long each takes, and the budget as a ratio to the transfer by hand.
const TRANSFERS: usize = 6;
const TRANSFER: Duration = Duration::from_millis(500);
const THROUGHPUT: f64 = 0.95;
/// The command of every container.
const PAYLOAD: &str = "exec sleep 1000";
/// The address of the host towards the other host.
const HOST: &str = "192.0.2.1";
const PORT: u16 = 5001;

fn main() -> anyhow::Result<ExitCode> {
    let check = is_check(std::env::args().skip(1))?;
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    // Before any thread: all of this program is on the host of the benchmark.
    unshare(CloneFlags::CLONE_NEWNET)?;
    run(check, compare())
}

/// Whether the budgets were met.
async fn compare() -> anyhow::Result<bool> {
    let other = other_host()?;
    let scratch = tempfile::Builder::new().prefix("nd-").tempdir()?;
    let tree = scratch.path().join("tree");
    make_tree(&tree, &["sh", "sleep"])?;
    // All containers share it read-only, and by hand nothing makes mount points.
    for directory in ["dev", "proc", "run", "sys", "tmp", "var"] {
        fs::create_dir(tree.join(directory))?;
    }
    let memory = in_memory()?;
    let plugin = Plugin::launch(Launch::new(driver())).await?;
    let config = json!({ "state_dir": memory.path().join("state") });
    plugin.configure(&config).await?;
    let site = Site {
        plugin,
        directory: memory.path().to_owned(),
        tree,
    };
    let mut report = Report::default();
    starts(&site, scratch.path(), &mut report).await?;
    many(&site, &mut report).await?;
    throughput(&site, &other, &mut report).await?;
    site.plugin.shutdown().await;
    Ok(report.met)
}

/// The plugin, its directory, and the tree of all containers.
#[derive(Debug)]
struct Site {
    plugin: Plugin,
    directory: PathBuf,
    tree: PathBuf,
}

impl Site {
    /// Starts a container with an own network and two ports. Returns its id, its first process and how long StartTask took.
    async fn start(&self, name: &str, port: u16) -> anyhow::Result<(String, i32, Duration)> {
        let config = json!({
            "image": self.tree, "boot": false, "user_namespacing": false, "read_only": true, "ports": ["one", "two"],
            "command": ["/bin/sh", "-c", PAYLOAD],
        });
        let allocation = Allocation::create(&self.directory, TaskSpec::new(name, config))?;
        let _logs = allocation.open_logs()?;
        let mut task: TaskConfig = self.plugin.task_config(&allocation).await?;
        let mapping = |label: &str, value: u16| PortMapping {
            label: label.to_owned(),
            value: value.into(),
            to: PORT.into(),
            ..PortMapping::default()
        };
        let ports = vec![mapping("one", port), mapping("two", port + 1)];
        task.resources.get_or_insert_default().ports = ports;
        let id = task.id.clone();
        let begun = Instant::now();
        self.plugin.start(task).await?;
        let took = begun.elapsed();
        let request = InspectTaskRequest {
            task_id: id.clone(),
        };
        let inspected = self.plugin.driver().inspect_task(request).await?;
        let status = inspected.into_inner().driver;
        let attributes = status.context("no status")?.attributes;
        Ok((id, attributes["pid"].parse()?, took))
    }
}

async fn starts(site: &Site, scratch: &Path, report: &mut Report) -> anyhow::Result<()> {
    let (mut bare, mut driven) = (Vec::new(), Vec::new());
    for pair in 0..WARM_UP + PAIRS {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let by_hand = by_hand(scratch, &site.tree)?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (id, _, through) = site.start("bench", 20_000).await?;
        site.plugin.destroy(&id, true).await?;
        if pair >= WARM_UP {
            bare.push(ms(by_hand));
            driven.push(ms(through));
        }
    }
    let more = median(driven.iter().zip(&bare).map(|(a, b)| a - b).collect());
    report.say(&format!(
        "StartTask with a network of its own and two ports, medians of {PAIRS}: {:.1} ms, bare systemd-nspawn --network-veth {:.1} ms",
        median(driven),
        median(bare)
    ));
    report.judge("a network, ms more than by hand", more, MORE, MORE);
    Ok(())
}

fn by_hand(scratch: &Path, tree: &Path) -> anyhow::Result<Duration> {
    let alloc = scratch.join("bare");
    fs::create_dir_all(&alloc)?;
    let bare = Bare::prepare(scratch, "bench-network")?;
    let begun = Instant::now();
    let mut child = bare.spawn_with(&["--network-veth", "--read-only"], tree, &alloc, PAYLOAD)?;
    let leader = bare.leader()?;
    let took = begun.elapsed();
    kill(Pid::from_raw(leader), Signal::SIGKILL)?;
    child.wait()?;
    bare.remove()?;
    Ok(took)
}

async fn many(site: &Site, report: &mut Report) -> anyhow::Result<()> {
    let (mut ids, mut times) = (Vec::new(), Vec::new());
    for (number, port) in (20_000..).step_by(2).take(TASKS).enumerate() {
        let (id, _, took) = site.start(&format!("t{number}"), port).await?;
        ids.push(id);
        times.push(ms(took));
    }
    for id in ids {
        site.plugin.destroy(&id, true).await?;
    }
    let first = median(times[..SAMPLE].to_vec());
    let last = median(times[TASKS - SAMPLE..].to_vec());
    report.say(&format!(
        "{TASKS} starts with ports, medians: the first {SAMPLE} {first:.1} ms, the last {SAMPLE} {last:.1} ms"
    ));
    report.judge(
        "the last of many, ratio to the first",
        last / first,
        LAST,
        LAST,
    );
    Ok(())
}

async fn throughput(site: &Site, other: &Arc<File>, report: &mut Report) -> anyhow::Result<()> {
    let (id, pid, _) = site.start("bench", 20_000).await?;
    let container = Arc::new(File::open(format!("/proc/{pid}/ns/net"))?);
    let plain = plain_container()?;
    let (mut bare, mut driven) = (Vec::new(), Vec::new());
    for _ in 0..TRANSFERS {
        bare.push(transfer(&plain, other, 30_000)?);
        driven.push(transfer(&container, other, 20_000)?);
    }
    site.plugin.destroy(&id, true).await?;
    let ratio = median(driven.iter().zip(&bare).map(|(a, b)| a / b).collect());
    report.say(&format!(
        "throughput through a forwarded port, medians of {TRANSFERS}: {:.0} MB/s, veth and nft by hand {:.0} MB/s",
        median(driven),
        median(bare)
    ));
    // Less is worse, so the ratio is turned round.
    let limit = 1.0 / THROUGHPUT;
    report.judge("throughput by hand, ratio to it", 1.0 / ratio, limit, limit);
    Ok(())
}

/// Megabytes in a second from the other host to a server in this network namespace, through this port of the host.
fn transfer(server: &Arc<File>, client: &Arc<File>, port: u16) -> anyhow::Result<f64> {
    let address: SocketAddr = format!("{HOST}:{port}").parse()?;
    let listener = within(server, || TcpListener::bind(("0.0.0.0", PORT)))??;
    let reader = thread::spawn(move || -> anyhow::Result<f64> {
        let (mut stream, _) = listener.accept()?;
        let (begun, mut bytes) = (Instant::now(), 0);
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(f64::from(u32::try_from(bytes / 1000)?) / ms(begun.elapsed())),
                length => bytes += length,
            }
        }
    });
    let mut stream = within(client, || TcpStream::connect(address))??;
    let (block, end) = (vec![0; 256 * 1024], Instant::now() + TRANSFER);
    while Instant::now() < end {
        stream.write_all(&block)?;
    }
    drop(stream);
    reader
        .join()
        .map_err(|_| anyhow::anyhow!("the server has panicked"))?
}

/// Calls it in a network namespace.
fn within<T: Send>(namespace: &Arc<File>, call: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&**namespace, CloneFlags::CLONE_NEWNET)?;
            anyhow::Ok(call())
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread has panicked"))?
    })
}

/// A new network namespace, which exists as long as the file is open.
fn new_namespace() -> anyhow::Result<Arc<File>> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            anyhow::Ok(Arc::new(File::open("/proc/thread-self/ns/net")?))
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread has panicked"))?
    })
}

/// Another host, joined by a veth pair.
fn other_host() -> anyhow::Result<Arc<File>> {
    let other = joined("eth0", "192.0.2.2")?;
    let text = format!(
        "ip link set lo up; ip address add {HOST}/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.2; \
         echo 1 > /proc/sys/net/ipv4/conf/eth0/forwarding"
    );
    shell(&text)?;
    Ok(other)
}

/// What stands for a container: a veth pair and a rule, by hand.
fn plain_container() -> anyhow::Result<Arc<File>> {
    let container = joined("plain", "198.51.100.2")?;
    let text = format!(
        "ip address add 198.51.100.1/24 dev plain; ip link set plain up; echo 1 > /proc/sys/net/ipv4/conf/plain/forwarding; \
         nft add table ip plain; nft add chain ip plain pre '{{ type nat hook prerouting priority -90; }}'; \
         nft add rule ip plain pre tcp dport 30000 dnat to 198.51.100.2:{PORT}"
    );
    shell(&text)?;
    within(&container, || {
        shell("ip link set lo up; ip route add default via 198.51.100.1")
    })??;
    Ok(container)
}

/// A network namespace at the other end of a veth pair, with this address.
fn joined(link: &str, address: &str) -> anyhow::Result<Arc<File>> {
    use std::os::fd::AsRawFd as _;
    let namespace = new_namespace()?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    shell(&format!(
        "ip link add {link} type veth peer name eth1; ip link set eth1 netns {path}"
    ))?;
    within(&namespace, || {
        shell(&format!(
            "ip address add {address}/24 dev eth1; ip link set eth1 up"
        ))
    })??;
    Ok(namespace)
}

#[expect(clippy::disallowed_methods, reason = "ip and nft")]
fn shell(text: &str) -> anyhow::Result<()> {
    let status = Command::new("/bin/sh").args(["-ec", text]).status()?;
    ensure!(status.success(), "{text}: {status}");
    Ok(())
}
