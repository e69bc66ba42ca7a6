//! Processes of this host, identified so that a reused pid is never mistaken for the old process: finding them, sending signals,
//! waiting for their exit. A signal is sent only to the very process that was identified.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use super::kernel;
use super::procfs::{self, Stat};
use crate::container::Process;
use crate::signal::Signal;

/// How often a process that has exited is read until its status is shown.
const ZOMBIE_READS: u32 = 20;

/// A process referenced by a pidfd: it may exit, but its pid can't come to mean another process.
#[derive(Debug)]
pub struct ProcessHandle {
    process: Process,
    descriptor: OwnedFd,
}

impl ProcessHandle {
    /// Opens the process that has this pid now.
    pub fn open(pid: i32) -> io::Result<Self> {
        // A record or systemd-nspawn may give any number as a pid, and rustix panics over negative ones.
        let raw = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let descriptor = pidfd_open(raw, PidfdFlags::empty())?;
        // Read after the pidfd is open: what is read then belongs to this process, or the process is gone.
        let start = start_time(pid)?;
        Ok(Self {
            process: Process { pid, start },
            descriptor,
        })
    }

    /// Opens exactly this process; an error of kind `NotFound` if it is gone.
    pub fn open_checked(process: Process) -> io::Result<Self> {
        let handle = Self::open(process.pid)?;
        if handle.process == process {
            Ok(handle)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Its pid and start time.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Sends a signal to it; [`Signal::NULL`] sends nothing. A process that is gone is success.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if signal == Signal::NULL {
            return Ok(());
        }
        let signal = to_rustix(signal).ok_or(io::ErrorKind::InvalidInput)?;
        match pidfd_send_signal(&self.descriptor, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Its wait status, as its parent would get it from `wait(2)`. `None` while it is alive or not reaped yet, and on kernels
    /// that do not report it to other processes (before 6.15).
    pub fn raw_status(&self) -> Option<i32> {
        super::ffi::exit_status(self.descriptor.as_fd())
    }

    /// Its wait status, as its parent will get it, after it has exited and before it has been waited for. `None` in any other state, if the
    /// kernel does not show it to this process, and before Linux 5.17, which showed the status of the main thread.
    pub fn zombie_status(&self) -> Option<i32> {
        if kernel::version() < (5, 17) {
            return None;
        }
        // The pidfd of a process is readable some microseconds before the process has left the processor for the last time.
        for _ in 0..ZOMBIE_READS {
            let stat = stat(self.process.pid).ok()?;
            if stat.start != self.process.start || stat.state != 'Z' {
                return None;
            }
            // One without threads has just been waited for, and what is shown is the status of its main thread.
            if stat.threads == 1 && stat.is_shown_asleep {
                return Some(stat.status);
            }
            std::thread::yield_now();
        }
        None
    }

    /// Waits until it has exited, at most `limit`; returns whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut descriptors = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        loop {
            let left = limit.saturating_sub(start.elapsed());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut descriptors, left) {
                // A plugin handles SIGCHLD, which any of its threads may get.
                Err(nix::Error::EINTR) => {}
                ready => return ready.is_ok_and(|ready| ready > 0),
            }
        }
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A descriptor that is readable as soon as the process has exited.
impl From<ProcessHandle> for OwnedFd {
    fn from(handle: ProcessHandle) -> Self {
        handle.descriptor
    }
}

/// Whether exactly this process still exists, possibly as a zombie.
pub fn is_alive(process: Process) -> bool {
    start_time(process.pid).is_ok_and(|start| start == process.start)
}

/// Pid and start time of the calling process.
pub fn current_process() -> io::Result<Process> {
    let pid = nix::unistd::getpid().as_raw();
    Ok(Process {
        pid,
        start: start_time(pid)?,
    })
}

/// The first child of a process, in the order of creation.
pub fn first_child(pid: i32) -> Option<i32> {
    children(pid).first().copied()
}

/// The child of a process's main thread that has the pid `inner` in its own pid namespace. `None` if it has been reaped.
pub fn child_by_inner_pid(parent: i32, inner: i32) -> Option<ProcessHandle> {
    children(parent).into_iter().find_map(|pid| {
        let handle = ProcessHandle::open(pid).ok()?;
        // Read after the pidfd is open: if the pid belongs to another process by now, the opened one is gone and gets no signal.
        let status = status(pid)?;
        let number = |name| {
            procfs::status_field(&status, name)?
                .split_ascii_whitespace()
                .last()?
                .parse()
                .ok()
        };
        let (is_child, is_it) = (
            number("PPid") == Some(parent),
            number("NSpid") == Some(inner),
        );
        (is_child && is_it).then_some(handle)
    })
}

/// The children of a process's main thread.
pub fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Whether a process has a handler for this signal.
pub fn handles_signal(pid: i32, signal: Signal) -> bool {
    mask(pid, "SigCgt").is_some_and(|mask| has(mask, signal))
}

/// Whether a process blocks a signal, so that it stays pending, or has a handler for it. For PID 1 of a pid namespace the kernel
/// drops every other signal except SIGKILL and SIGSTOP. `None` if the process is gone.
pub fn blocks_or_handles_signal(pid: i32, signal: Signal) -> Option<bool> {
    Some(has(mask(pid, "SigBlk")?, signal) || has(mask(pid, "SigCgt")?, signal))
}

/// Whether a process ignores a signal.
pub fn ignores_signal(pid: i32, signal: Signal) -> bool {
    mask(pid, "SigIgn").is_some_and(|mask| has(mask, signal))
}

/// How many seccomp filters the main thread of a process has. `None` before Linux 5.9, which does not say, and if the process is gone.
pub fn seccomp_filter_count(pid: i32) -> Option<u32> {
    let status = status(pid)?;
    procfs::status_field(&status, "Seccomp_filters")?
        .parse()
        .ok()
}

fn has(mask: u64, signal: Signal) -> bool {
    u32::try_from(signal.number() - 1)
        .is_ok_and(|bit| mask.checked_shr(bit).is_some_and(|rest| rest & 1 == 1))
}

fn mask(pid: i32, name: &str) -> Option<u64> {
    procfs::signal_mask(&status(pid)?, name)
}

fn status(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/status")).ok()
}

/// Keeps this process out of core dumps and out of reach of unprivileged debuggers and `/proc` readers, because secrets pass
/// through its memory. Lasts until the process executes another program.
pub fn stay_out_of_core_dumps() {
    // The kernel has had this call since long before pidfds, so it does not fail where the driver runs at all.
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Lets the program that is executed next write no core dump. systemd-nspawn sets the limits of its payload itself, so this does
/// not restrict the payload.
pub fn no_core_dump_of_the_next() -> nix::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // With 0 the kernel would still start a core dump handler; 1 disables that too.
    const NOT_EVEN_A_HANDLER: u64 = 1;
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE)?;
    setrlimit(Resource::RLIMIT_CORE, NOT_EVEN_A_HANDLER.min(hard), hard)
}

/// Sets the badness adjustment of a process, -1000 to 1000, which its children inherit. Lowering it needs `CAP_SYS_RESOURCE`.
pub fn set_oom_score_adj(pid: i32, value: i32) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), value.to_string())
}

/// Closes everything but stdin, stdout and stderr. To be called at the start of a process, before it has opened anything: if an
/// agent does not mark its descriptors close-on-exec, containers must not keep them open for days.
pub fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|number| *number > 2)
        .collect();
    for number in numbers {
        // One of them is that of the directory itself, which is closed by now.
        let _ = nix::unistd::close(number);
    }
}

fn start_time(pid: i32) -> io::Result<u64> {
    Ok(stat(pid)?.start)
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| {
        match error.raw_os_error() {
            // The process exited while its file was open.
            Some(code) if code == nix::Error::ESRCH as i32 => io::ErrorKind::NotFound.into(),
            _ => error,
        }
    })?;
    procfs::parse_stat(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `None` for signal 0, which has no value there.
fn to_rustix(signal: Signal) -> Option<rustix::process::Signal> {
    use rustix_libc_wrappers::process::SignalExt;
    rustix::process::Signal::from_raw(signal.number())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn an_invalid_pid_is_no_process() {
        for pid in [0, -1, i32::MIN, i32::MAX] {
            let nobody = Process { pid, start: 0 };
            ProcessHandle::open(pid).unwrap_err();
            ProcessHandle::open_checked(nobody).unwrap_err();
            assert!(!is_alive(nobody));
            assert!(children(pid).is_empty());
        }
    }

    /// A plugin handles SIGCHLD, and every child that exits may interrupt any of its threads.
    #[expect(clippy::disallowed_methods, reason = "a process to wait for")]
    #[tokio::test]
    async fn a_wait_goes_on_after_a_signal() {
        use nix::sys::pthread::pthread_kill;
        use std::os::unix::thread::JoinHandleExt;
        use tokio::signal::unix::{SignalKind, signal};
        const LIMIT: Duration = Duration::from_secs(60);
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let handle = ProcessHandle::open(child.id().cast_signed()).unwrap();
        let mut handled = signal(SignalKind::user_defined1()).unwrap();
        let (sender, thread) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            handle.wait(LIMIT)
        });
        let stat = format!("/proc/self/task/{}/stat", thread.recv().unwrap());
        let end = Instant::now() + LIMIT;
        while !fs::read_to_string(&stat).unwrap().contains(") S ") {
            assert!(Instant::now() < end, "the thread does not wait");
            tokio::task::yield_now().await;
        }
        pthread_kill(waiting.as_pthread_t(), nix::sys::signal::SIGUSR1).unwrap();
        handled.recv().await.unwrap();
        child.kill().unwrap();
        assert!(waiting.join().unwrap(), "the wait ended with the signal");
        child.wait().unwrap();
    }

    #[expect(clippy::disallowed_methods, reason = "a process that exits")]
    fn shell(script: &str) -> std::process::Child {
        Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[rstest::rstest]
    #[case("exit 0", 0)]
    #[case("exit 3", 3 << 8)]
    #[case("kill -9 $$", 9)]
    fn the_status_is_known_before_the_parent_has_waited(#[case] script: &str, #[case] wanted: i32) {
        if kernel::version() < (5, 17) {
            support::not_applicable("the status is not shown before Linux 5.17");
            return;
        }
        let mut child = shell(&format!("read line; {script}"));
        let handle = ProcessHandle::open(child.id().cast_signed()).unwrap();
        assert_eq!(handle.zombie_status(), None, "it is alive");
        drop(child.stdin.take());
        assert!(handle.wait(Duration::from_secs(60)));
        // On a busy processor the exit may take longer than the status is waited for.
        let end = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = handle.zombie_status() {
                break status;
            }
            assert!(Instant::now() < end, "the status is not shown");
        };
        assert_eq!(status, wanted);
        child.wait().unwrap();
        assert_eq!(handle.zombie_status(), None, "it has been waited for");
    }

    /// After its command has exited, the first child of an init is an orphan that it has adopted.
    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs processes to find"
    )]
    #[test]
    fn a_child_is_found_by_its_pid_only() {
        let script = "sleep 600 & first=$!; echo $first; sleep 600 & second=$!; echo $second; \
            read line; kill $second; wait $second; echo gone; read line; kill $first";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let parent = i32::try_from(shell.id()).unwrap();
        let mut lines =
            std::io::BufRead::lines(std::io::BufReader::new(shell.stdout.take().unwrap()));
        let mut line = || lines.next().unwrap().unwrap();
        let (first, second): (i32, i32) = (line().parse().unwrap(), line().parse().unwrap());
        let found = |pid| child_by_inner_pid(parent, pid).map(|handle| handle.process().pid);
        assert_eq!((found(first), found(second)), (Some(first), Some(second)));
        assert_eq!(found(parent), None);
        let mut stdin = shell.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"\n").unwrap();
        assert_eq!(line(), "gone");
        assert_eq!((found(first), found(second)), (Some(first), None));
        drop(stdin);
        shell.wait().unwrap();
    }

    #[test]
    fn every_signal_can_be_sent() {
        for number in 1..=64 {
            if let Some(signal) = Signal::from_number(number) {
                assert!(to_rustix(signal).is_some(), "{signal}");
            }
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs a process to hold"
    )]
    #[test]
    fn a_process_is_opened_signalled_and_awaited() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let handle = ProcessHandle::open(pid).unwrap();
        assert!(is_alive(handle.process()));
        assert!(!handle.wait(Duration::ZERO));
        handle.signal(Signal::from_number(38).unwrap()).unwrap();
        assert!(handle.wait(Duration::from_secs(10)));
        assert_eq!(
            child.wait().unwrap().signal(),
            Some(38),
            "real-time signals are counted as the C library counts"
        );
        assert!(!is_alive(handle.process()));
        handle.signal(Signal::KILL).unwrap();
        let reused = Process {
            start: 1,
            ..current_process().unwrap()
        };
        assert_eq!(
            ProcessHandle::open_checked(reused).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
