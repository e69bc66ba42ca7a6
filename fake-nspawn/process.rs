//! The kernel queries of all roles: signals by number, descendants, open descriptors. Makes no decisions.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{self, SigSet, Signal};
use nix::unistd::Pid;
// nix's wait fails for a death by a real-time signal, after it has already reaped the child.
use rustix::process::{WaitOptions, WaitStatus};

use crate::options::Rlimit;

/// The first real-time signal, as systemd counts.
pub(crate) const RTMIN: i32 = 34;

/// Sends a signal. A process that has ended is no error.
pub(crate) fn send(pid: i32, number: i32) {
    match Signal::try_from(number) {
        Ok(known) => {
            // The only remaining error is that the process has ended.
            signal::kill(Pid::from_raw(pid), known).ok();
        }
        // nix's wrapper of kill(2) does not know real-time signals; the shell does.
        Err(_) => {
            let script = format!("kill -{number} {pid}");
            Command::new("/bin/sh")
                .arg("-c")
                .arg(script)
                .stderr(Stdio::null())
                .status()
                .ok();
        }
    }
}

/// Calls it in a new network namespace, so that a process that it starts has one of its own as in the real container. Without privileges in
/// that of the host.
pub(crate) fn in_new_network<T>(start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    if !nix::unistd::geteuid().is_root() {
        return start();
    }
    let own = File::open("/proc/self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let started = start();
    setns(own, CloneFlags::CLONE_NEWNET)?;
    started
}

/// Ends this process by a signal, with a core dump in this directory or without one. Returns only if that failed.
pub(crate) fn die_by(number: i32, dump: Option<&Path>) -> io::Result<Infallible> {
    // Other pending signals no longer matter.
    let mut mask = SigSet::all();
    if let Ok(known) = Signal::try_from(number) {
        mask.remove(known);
    } else {
        mask = SigSet::empty();
    }
    mask.thread_set_mask()?;
    let limit = if dump.is_some() {
        "$(ulimit -H -c)"
    } else {
        "0"
    };
    // A shell has none of the handlers and ignored signals that Rust's runtime set up in this process.
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg(format!("ulimit -S -c {limit}; kill -{number} $$"));
    if let Some(dump) = dump {
        shell.current_dir(dump);
    }
    Err(shell.exec())
}

/// Sets a resource limit of this process. Where it may not be raised that far it becomes as high as possible, as with the real tool.
pub(crate) fn limit(limit: &Rlimit) -> nix::Result<()> {
    let resource = match limit.name.as_str() {
        "AS" => Resource::RLIMIT_AS,
        "CORE" => Resource::RLIMIT_CORE,
        "CPU" => Resource::RLIMIT_CPU,
        "DATA" => Resource::RLIMIT_DATA,
        "FSIZE" => Resource::RLIMIT_FSIZE,
        "LOCKS" => Resource::RLIMIT_LOCKS,
        "MEMLOCK" => Resource::RLIMIT_MEMLOCK,
        "MSGQUEUE" => Resource::RLIMIT_MSGQUEUE,
        "NICE" => Resource::RLIMIT_NICE,
        "NOFILE" => Resource::RLIMIT_NOFILE,
        "NPROC" => Resource::RLIMIT_NPROC,
        "RSS" => Resource::RLIMIT_RSS,
        "RTPRIO" => Resource::RLIMIT_RTPRIO,
        "RTTIME" => Resource::RLIMIT_RTTIME,
        "SIGPENDING" => Resource::RLIMIT_SIGPENDING,
        "STACK" => Resource::RLIMIT_STACK,
        _ => return Err(Errno::EINVAL),
    };
    match setrlimit(resource, limit.soft, limit.hard) {
        Err(Errno::EPERM) => {
            let (_, most) = getrlimit(resource)?;
            setrlimit(resource, limit.soft.min(most), limit.hard.min(most))
        }
        set => set,
    }
}

/// The name that systemd prints, without `SIG`.
pub(crate) fn signal_name(number: i32) -> String {
    match Signal::try_from(number) {
        Ok(known) => known.as_str().trim_start_matches("SIG").to_owned(),
        Err(_) if number >= RTMIN => format!("RTMIN+{}", number - RTMIN),
        Err(_) => number.to_string(),
    }
}

/// The session of a process that has not ended.
fn session(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let stat = proc_files::parse_stat(&stat)?;
    (stat.state != 'Z').then_some(stat.session)
}

/// All processes, with their sessions.
fn living() -> Vec<(i32, i32)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| session(pid).map(|session| (pid, session)))
        .collect()
}

/// All running descendants of this process. Only the kernel's lists of children are read: all of `/proc` is long on a busy host.
fn descendants() -> HashSet<i32> {
    let mut found = HashSet::new();
    let mut parents = vec![Pid::this().as_raw()];
    while let Some(parent) = parents.pop() {
        for pid in children(parent) {
            if session(pid).is_some() && found.insert(pid) {
                parents.push(pid);
            }
        }
    }
    found
}

/// Kills all descendants, including those that are reparented to this process meanwhile, until there are none.
pub(crate) fn kill_descendants() {
    loop {
        let left = descendants();
        if left.is_empty() {
            break;
        }
        for pid in left {
            send(pid, 9);
        }
        reap_one_blocking();
    }
    reap(|_, _| {});
}

fn reap_one_blocking() {
    // An error (no child) means that the process tree changed between listing and waiting; the loop lists again.
    rustix::process::wait(WaitOptions::empty()).ok();
}

/// Reaps all children that have ended or changed state, without waiting.
pub(crate) fn reap(mut seen: impl FnMut(i32, WaitStatus)) {
    let options = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
    // An error means that there are no children.
    while let Ok(Some((pid, status))) = rustix::process::wait(options) {
        seen(pid.as_raw_pid(), status);
    }
}

/// Kills the processes of a container: those of the payload's session and those with its identity in their environment. 0 is no session,
/// the empty string no identity.
pub(crate) fn kill_members(session: i32, identity: &str) {
    let mark = format!("container_uuid={identity}");
    let belongs = |pid: i32, of: i32| {
        (session > 0 && of == session) || (!identity.is_empty() && carries(pid, &mark))
    };
    loop {
        let me = Pid::this().as_raw();
        let members: Vec<_> = living()
            .into_iter()
            .filter(|(pid, of)| *pid != me && belongs(*pid, *of))
            .collect();
        if members.is_empty() {
            return;
        }
        for (pid, _) in members {
            send(pid, 9);
        }
        std::thread::yield_now();
    }
}

fn carries(pid: i32, mark: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|entry| entry == mark.as_bytes())
}

/// The children of a process, those of its first thread first.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The two cgroups that the real tool creates below its own: for the container, and for itself.
#[derive(Debug)]
pub(crate) struct Groups(PathBuf);

impl Groups {
    /// Creates them if this process has a cgroup v2 of its own. Without privileges there are none.
    pub(crate) fn make() -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let mut mounts = proc_files::own_mounts().ok()?.into_iter();
        let top = mounts.find(|mount| mount.kind == "cgroup2")?.target;
        let own = top.join(group);
        let members = fs::read_to_string(own.join("cgroup.procs")).ok()?;
        if members.trim() != Pid::this().to_string() {
            return None;
        }
        for group in ["payload", "supervisor"] {
            match fs::create_dir(own.join(group)) {
                // As the real one takes a cgroup that exists.
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
                _ => {}
            }
        }
        Some(Self(own))
    }

    /// Moves this process, and everything it starts from now on, into one of them.
    pub(crate) fn enter(&self, name: &str) -> io::Result<()> {
        fs::write(self.0.join(name).join("cgroup.procs"), "0")
    }
}

/// Whether a process has installed a handler for this signal.
pub(crate) fn catches(pid: i32, number: i32) -> bool {
    caught(pid) >> (number - 1) & 1 == 1
}

/// The signals that a process has handlers for: signal 1 is the lowest bit.
pub(crate) fn caught(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    proc_files::signal_mask(&status, "SigCgt").unwrap_or_default()
}

/// The open descriptors of this process, without the one used for the listing.
pub(crate) fn open_descriptors() -> io::Result<Vec<i32>> {
    let numbers: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    Ok(numbers
        .into_iter()
        .filter(|number| fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok())
        .collect())
}
