//! The calls that no safe crate offers: the ioctl for the exit status of the process of a pidfd, for processes other than its parent
//! (needs Linux 6.15; on older kernels the status is not known), and two settings of malloc.

#![expect(
    unsafe_code,
    reason = "neither nix nor rustix has this ioctl, which takes a raw pointer, or malloc's settings, which are foreign functions"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `struct pidfd_info` of `linux/pidfd.h` in its first version, 64 bytes.
#[derive(Debug, Default)]
#[repr(C)]
struct PidfdInfo {
    /// In: the fields that are requested. Out: the fields that are filled.
    mask: u64,
    cgroup: u64,
    pids: [u32; 3],
    users_and_groups: [u32; 8],
    exit_code: i32,
}

/// `PIDFD_INFO_EXIT`: filled once the process has been reaped.
const EXIT: u64 = 1 << 3;

nix::ioctl_readwrite!(pidfd_get_info, 0xFF, 11, PidfdInfo);

/// The raw wait status of a process that has been reaped.
pub(super) fn exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = PidfdInfo {
        mask: EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel writes at most the size encoded in the request
    // number, which is that of the structure.
    unsafe { pidfd_get_info(pidfd.as_fd().as_raw_fd(), &raw mut info) }.ok()?;
    (info.mask & EXIT != 0).then_some(info.exit_code)
}

/// Limits malloc to one arena, which all threads share. By default glibc gives up to eight arenas per processor to threads as they
/// come, and each keeps what it once needed: the memory of a process with many short-lived threads grows until all of them have been
/// used. Must be called before the process has a second thread.
#[cfg(target_env = "gnu")]
pub fn share_malloc_arena() {
    // SAFETY: takes two numbers and changes only malloc's own settings.
    unsafe { nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1) };
}

/// Returns free memory to the kernel. By itself glibc returns only what lies above everything in use, so after many starts the free
/// memory between what the tasks keep would stay.
#[cfg(target_env = "gnu")]
pub fn return_free_memory() {
    // SAFETY: takes a number and changes only malloc's own memory, under its locks.
    unsafe { nix::libc::malloc_trim(0) };
}

/// Other C libraries have no arenas per thread.
#[cfg(not(target_env = "gnu"))]
pub fn share_malloc_arena() {}

/// Other C libraries return free memory by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn return_free_memory() {}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use crate::sys::process::ProcessHandle;

    /// Whether this kernel reports exit statuses; where it does not, the answer must be `None`.
    fn kernel_reports_exits() -> bool {
        crate::sys::kernel::version() >= (6, 15)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs a process to query"
    )]
    #[test]
    fn a_reaped_process_still_has_a_status() {
        for script in ["exit 133", "kill -KILL $$", "kill -34 $$"] {
            let mut child = Command::new("sh")
                .args(["-c", &format!("read line; {script}")])
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let handle = ProcessHandle::open(i32::try_from(child.id()).unwrap()).unwrap();
            assert_eq!(handle.raw_status(), None, "it lives");
            let status = child.wait().unwrap();
            let want = kernel_reports_exits().then(|| status.into_raw());
            assert_eq!(handle.raw_status(), want, "{script}");
        }
    }
}
