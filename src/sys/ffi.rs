//! The calls that no safe crate offers: the ioctl for the exit status of the process of a pidfd, for processes other than its parent
//! (needs Linux 6.15; on older kernels the status is not known), bpf(2), the request of ptrace(2) for seccomp filters, mount_setattr(2), a
//! process in a new user namespace, and two settings of malloc.

#![expect(
    unsafe_code,
    reason = "neither nix nor rustix has these calls, which take raw pointers, or malloc's settings, which are foreign functions"
)]

use std::ffi::{CStr, c_int, c_long, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

/// `union bpf_attr` of `linux/bpf.h` for `BPF_PROG_LOAD`, up to the last field that is set here. The kernel takes the rest as zero.
#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The same for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
}

const PROGRAM_LOAD: c_int = 5;
const PROGRAM_ATTACH: c_int = 8;
/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
const PROGRAM_OF_DEVICES: u32 = 15;
/// `BPF_CGROUP_DEVICE`.
const ATTACH_TO_DEVICES: u32 = 6;
/// `BPF_F_ALLOW_MULTI`: what is attached above and below stays in force.
const BESIDE_OTHERS: u32 = 1 << 1;

/// Loads a program that decides about access to devices. The kernel checks the instructions, each of which is a `struct bpf_insn`.
pub(super) fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    // It calls none of the functions that ask for a license.
    const LICENSE: &CStr = c"Apache-2.0";
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let attributes = ProgramAttributes {
        kind: PROGRAM_OF_DEVICES,
        count,
        instructions: address(instructions.as_ptr()),
        license: address(LICENSE.as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"nspawn_devices\0\0",
    };
    // SAFETY: the kernel reads the structure, `count` instructions and the text, all of which live until the call returns, and writes
    // nothing.
    let result = unsafe { bpf(PROGRAM_LOAD, &attributes) }?;
    let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the call has succeeded, so this is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Attaches such a program to a cgroup, beside others.
pub(super) fn attach_device_program(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: ATTACH_TO_DEVICES,
        flags: BESIDE_OTHERS,
    };
    // SAFETY: the kernel reads the structure, and the descriptors are open as long as they are borrowed.
    unsafe { bpf(PROGRAM_ATTACH, &attributes) }?;
    Ok(())
}

/// bpf(2). Safe if the attributes are those of the command, without padding, and their pointers are valid.
unsafe fn bpf<Attributes>(command: c_int, attributes: &Attributes) -> io::Result<c_long> {
    // SAFETY: the caller's; the kernel reads as many bytes as the structure has.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    };
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// `BPF_MAXINSNS` of `linux/bpf_common.h`: no seccomp program is longer.
const MAX_INSTRUCTIONS: usize = 4096;

/// A seccomp program of a process that is stopped for this thread as its tracer: 0 is the one that was installed first. Fails with `ENOENT` if
/// the process has no more.
pub(super) fn seccomp_filter(pid: i32, index: usize) -> io::Result<Vec<nix::libc::sock_filter>> {
    let empty = nix::libc::sock_filter {
        code: 0,
        jt: 0,
        jf: 0,
        k: 0,
    };
    // The kernel does not take a length. The longest program fits.
    let mut instructions = vec![empty; MAX_INSTRUCTIONS];
    // SAFETY: the kernel writes one program, which has at most as many instructions as the buffer, and these are plain numbers.
    let count = unsafe { ptrace(GET_FILTER, pid, index, instructions.as_mut_ptr().cast()) }?;
    let count = usize::try_from(count).map_err(io::Error::other)?;
    instructions.truncate(count);
    instructions.shrink_to_fit();
    Ok(instructions)
}

/// Lets go of a process that is stopped for this thread as its tracer, and passes this signal on to it; 0 is none. nix knows no real-time
/// signals.
pub(super) fn detach(pid: i32, signal: c_int) -> io::Result<()> {
    let signal = std::ptr::without_provenance_mut(signal.cast_unsigned() as usize);
    // SAFETY: the kernel takes the last argument as a number.
    unsafe { ptrace(DETACH, pid, 0, signal) }?;
    Ok(())
}

const DETACH: c_long = 17;
/// `PTRACE_SECCOMP_GET_FILTER`.
const GET_FILTER: c_long = 0x420c;

/// ptrace(2). Safe if the arguments are those of the request.
unsafe fn ptrace(request: c_long, pid: i32, at: usize, data: *mut c_void) -> io::Result<c_long> {
    // SAFETY: the caller's.
    let result =
        unsafe { nix::libc::syscall(nix::libc::SYS_ptrace, request, c_long::from(pid), at, data) };
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct mount_attr` of `linux/mount.h` in its first version.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct MountAttributes {
    pub(super) set: u64,
    pub(super) clear: u64,
    pub(super) propagation: u64,
    pub(super) user_namespace: u64,
}

/// Changes the attributes of the mount of this descriptor and of all mounts below it: of all or, after an error, of none. Needs Linux 5.12.
pub(super) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: &MountAttributes,
) -> io::Result<()> {
    const PATH: &CStr = c"";
    // SAFETY: the kernel reads the text and the structure, and the descriptor is open as long as it is borrowed.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            PATH.as_ptr(),
            nix::libc::AT_EMPTY_PATH | nix::libc::AT_RECURSIVE,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Starts a process in a new user namespace that only waits to be killed, and is killed with the thread that has started it. Returns its pid;
/// the caller waits for it.
pub(super) fn start_in_user_namespace() -> io::Result<c_int> {
    let flags = nix::libc::CLONE_NEWUSER | nix::libc::SIGCHLD;
    let parent = c_long::from(nix::unistd::getpid().as_raw());
    // SAFETY: without a stack of its own and with no memory shared, the new process goes on like one of fork(2). Other threads may have held
    // locks, so it makes nothing but system calls.
    let pid = unsafe { nix::libc::syscall(nix::libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => loop {
            // SAFETY: plain system calls.
            unsafe {
                nix::libc::syscall(
                    nix::libc::SYS_prctl,
                    nix::libc::PR_SET_PDEATHSIG,
                    nix::libc::SIGKILL,
                );
                // The parent may have been killed before that.
                if nix::libc::syscall(nix::libc::SYS_getppid) != parent {
                    nix::libc::syscall(nix::libc::SYS_exit_group, 0);
                }
                nix::libc::syscall(nix::libc::SYS_ppoll, 0, 0, 0, 0, 0);
            }
        },
        1.. => c_int::try_from(pid).map_err(io::Error::other),
        _ => Err(io::Error::last_os_error()),
    }
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
