//! Reads the seccomp filters of another process, which only a tracer can. The process is interrupted for less than a millisecond, and a
//! system call of it that can't be resumed, such as epoll_wait(2), ends with EINTR, as after a SIGCONT.

use std::io;
use std::time::{Duration, Instant};

use nix::libc::sock_filter;
use nix::sys::ptrace;
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};

use super::ffi;
use super::process::ProcessHandle;

/// How long to wait until the process is interrupted. One in state D can't be.
const LIMIT: Duration = Duration::from_secs(5);

/// The kernel allows at most 32,768 instructions for all filters of a process together, and a penalty of 4 for each.
const MAX_FILTERS: usize = 8192;

/// The seccomp filters of the main thread of a process, the oldest first. The process goes on as before; one that is stopped stays stopped.
/// Blocks for at most five seconds. Fails with [`io::ErrorKind::NotFound`] if the process has exited, with `EPERM` or `EACCES` if the kernel
/// or a security module refuses, with `EINVAL` if the kernel was built without the request, and with [`io::ErrorKind::TimedOut`].
pub fn seccomp_filters(process: &ProcessHandle) -> io::Result<Vec<Vec<sock_filter>>> {
    // The kernel lets go of the process when the thread that traces it ends, whatever has failed.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("filters".to_owned());
        let reading = thread.spawn_scoped(scope, || read(process))?;
        reading
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that reads filters panicked")))
    })
}

fn read(process: &ProcessHandle) -> io::Result<Vec<Vec<sock_filter>>> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let pid = Pid::from_raw(process.process().pid);
    let until = Instant::now() + LIMIT;
    let attached = ptrace::seize(pid, ptrace::Options::empty());
    // From here on the pid can't come to mean another process, if it has not by now.
    if process.wait(Duration::ZERO) || attached == Err(nix::Error::ESRCH) {
        return Err(gone());
    }
    attached?;
    ptrace::interrupt(pid)?;
    let Some(stop) = wait_for_stop(pid, until)? else {
        return Err(gone());
    };
    let filters = all(pid);
    match ffi::detach(pid.as_raw(), stop) {
        Ok(()) => filters,
        // It was killed. Its parent learns of that once its tracer has.
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {
            while wait_for_stop(pid, until)?.is_some() {}
            Err(gone())
        }
        Err(error) => Err(error),
    }
}

/// Waits until the process is interrupted. Returns the signal that it would have got at this moment, or 0, to be passed on; `None` if it has
/// exited.
fn wait_for_stop(pid: Pid, until: Instant) -> io::Result<Option<i32>> {
    // __WALL: whatever signal its parent gets when it exits.
    let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(0x4000_0000);
    let mut pause = Duration::from_micros(20);
    loop {
        match waitpid(rustix::process::Pid::from_raw(pid.as_raw()), options) {
            Ok(Some((_, status))) => return Ok(stop_in(status.as_raw())),
            Ok(None) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= until {
            let text = "the process can't be interrupted: it is in state D";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// From a wait status. The upper half tells an interruption from a signal.
fn stop_in(status: i32) -> Option<i32> {
    const STOPPED: i32 = 0x7f;
    match (status & 0xff, status >> 16) {
        (STOPPED, 0) => Some(status >> 8 & 0xff),
        (STOPPED, _) => Some(0),
        _ => None,
    }
}

/// The filters of a process that is stopped. Index 0 is the oldest, against what ptrace(2) says, so one that another thread of the process
/// installs meanwhile does not change the others' indices.
fn all(pid: Pid) -> io::Result<Vec<Vec<sock_filter>>> {
    let mut filters = Vec::new();
    while filters.len() < MAX_FILTERS {
        match ffi::seccomp_filter(pid.as_raw(), filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        }
    }
    Ok(filters)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nix::sys::signal::{Signal, kill};
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

    use super::*;
    use crate::sys::procfs::{parse_stat, status_field};
    use crate::sys::testing::Echo;

    /// A program that denies this system call with this error.
    fn program(call: i64, errno: i32) -> BpfProgram {
        let denied = BTreeMap::from([(call, Vec::new())]);
        let refusal = SeccompAction::Errno(errno.cast_unsigned());
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(denied, SeccompAction::Allow, refusal, arch).unwrap();
        filter.try_into().unwrap()
    }

    /// A process with these filters. Filters are inherited; the thread that installs them ends here.
    fn child(programs: &[BpfProgram]) -> Echo {
        std::thread::scope(|scope| {
            let start = || {
                for program in programs {
                    seccompiler::apply_filter(program).unwrap();
                }
                Echo::start(&["cat"], &[])
            };
            scope.spawn(start).join().unwrap()
        })
    }

    fn two() -> [BpfProgram; 2] {
        [
            program(nix::libc::SYS_openat2, nix::libc::EPERM),
            program(nix::libc::SYS_mount, nix::libc::ENOSYS),
        ]
    }

    fn plain(programs: &[Vec<sock_filter>]) -> Vec<Vec<(u16, u8, u8, u32)>> {
        let plain = |program: &Vec<sock_filter>| {
            let each = program.iter();
            each.map(|one| (one.code, one.jt, one.jf, one.k)).collect()
        };
        programs.iter().map(plain).collect()
    }

    fn wanted(programs: &[BpfProgram]) -> Vec<Vec<(u16, u8, u8, u32)>> {
        let plain = |program: &BpfProgram| {
            let each = program.iter();
            each.map(|one| (one.code, one.jt, one.jf, one.k)).collect()
        };
        programs.iter().map(plain).collect()
    }

    /// The kernel shows filters only to a process with CAP_SYS_ADMIN that has none itself.
    fn may_read() -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let may = nix::unistd::geteuid().is_root() && status_field(&status, "Seccomp") == Some("0");
        if !may {
            support::not_applicable("reading seccomp filters needs root, without filters");
        }
        may
    }

    fn state(handle: &ProcessHandle) -> char {
        let stat = format!("/proc/{}/stat", handle.process().pid);
        parse_stat(&std::fs::read_to_string(stat).unwrap())
            .unwrap()
            .state
    }

    fn wait_for_state(handle: &ProcessHandle, wanted: char) {
        let end = Instant::now() + Duration::from_secs(60);
        while state(handle) != wanted {
            assert!(Instant::now() < end, "state {}", state(handle));
            std::thread::yield_now();
        }
    }

    #[test]
    fn filters_are_read_as_they_were_installed() {
        if !may_read() {
            return;
        }
        let child = child(&two());
        assert_eq!(
            plain(&seccomp_filters(&child.handle).unwrap()),
            wanted(&two())
        );
        assert_eq!(
            plain(&seccomp_filters(&child.handle).unwrap()),
            wanted(&two())
        );
        child.end();
    }

    #[test]
    fn a_stopped_process_stays_stopped() {
        if !may_read() {
            return;
        }
        let child = child(&two());
        let pid = Pid::from_raw(child.handle.process().pid);
        kill(pid, Signal::SIGSTOP).unwrap();
        wait_for_state(&child.handle, 'T');
        assert_eq!(seccomp_filters(&child.handle).unwrap().len(), 2);
        // It stops again by itself, which takes it a moment.
        wait_for_state(&child.handle, 'T');
        kill(pid, Signal::SIGCONT).unwrap();
        child.end();
    }

    #[test]
    fn a_process_without_filters_is_refused_and_goes_on() {
        if !may_read() {
            return;
        }
        let child = child(&[]);
        let error = seccomp_filters(&child.handle).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EINVAL), "{error}");
        child.end();
    }

    #[test]
    fn a_process_that_has_exited_has_no_filters() {
        let mut child = child(&[]);
        child.exit();
        for reaped in [false, true] {
            if reaped {
                child.reap();
            }
            let error = seccomp_filters(&child.handle).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "reaped: {reaped}");
        }
    }

    #[test]
    fn a_signal_in_between_is_passed_on() {
        assert_eq!(stop_in(0x0f7f), Some(15));
        assert_eq!(stop_in(38 << 8 | 0x7f), Some(38));
        assert_eq!(stop_in(128 << 16 | 0x057f), Some(0));
        assert_eq!(stop_in(128 << 16 | 0x137f), Some(0));
        assert_eq!(stop_in(0x0300), None);
        assert_eq!(stop_in(9), None);
    }
}
