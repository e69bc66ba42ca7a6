//! The operations without a safe interface: taking over the inherited descriptors, installing a seccomp program, starting a command with
//! default signal dispositions and limits, and forking. The only unsafe code of the init. Decides nothing and keeps nothing else.

#![expect(
    unsafe_code,
    reason = "descriptors that are known only by number, seccomp(2) without no_new_privs and clone3(2), which no crate wraps, fork, and a step before exec"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use nix::sys::signal::SigSet;
use nspawn_init::{DESCRIPTORS, Descriptor, Filter};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, setrlimit};

/// The descriptors inherited from systemd-nspawn.
pub(crate) struct Inherited {
    pub(crate) channel: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) program: OwnedFd,
    pub(crate) spec: OwnedFd,
}

/// Takes ownership of the inherited descriptors and sets close-on-exec, so that no command inherits them. All or nothing: an error if one
/// is not open or if they were already taken. Must be called before anything else opens a descriptor.
pub(crate) fn inherited() -> io::Result<Inherited> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    let first = Descriptor::Channel as i32;
    for number in first..first + DESCRIPTORS {
        // SAFETY: fcntl only sets a flag, and fails if the descriptor is not open.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the descriptor is open, as checked above; it was inherited, so nothing in this process owns it, and it is taken once.
    let take = |descriptor: Descriptor| unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    Ok(Inherited {
        channel: take(Descriptor::Channel),
        stdout: take(Descriptor::Stdout),
        stderr: take(Descriptor::Stderr),
        program: take(Descriptor::Program),
        spec: take(Descriptor::Spec),
    })
}

/// The core dump limit for commands.
static CORE: OnceLock<Rlimit> = OnceLock::new();

/// Prevents core dumps of this process: its init spec and variables contain secrets. Commands get the original limit back.
pub(crate) fn dump_no_core() {
    /// With a limit of 0 the kernel still pipes the dump to a core_pattern program; a limit of 1 disables that too.
    const NOT_EVEN_A_HANDLER: u64 = 1;
    let given = *CORE.get_or_init(|| getrlimit(Resource::Core));
    let most = given.maximum.unwrap_or(u64::MAX);
    let own = Rlimit {
        current: Some(NOT_EVEN_A_HANDLER.min(most)),
        ..given
    };
    // Can't fail: lowering a soft limit below the hard one is always allowed.
    let _ = setrlimit(Resource::Core, own);
}

/// Makes the command start with no signal blocked (this process blocks them all) and none ignored: a process started by posix_spawn(3)
/// inherits two ignored signals that glibc reserves for itself, and passes them on to its own children.
pub(crate) fn with_default_signals_and_limits(command: &mut Command) {
    /// A zeroed kernel `struct sigaction`: the default action.
    const DEFAULT: [u64; 4] = [0; 4];
    const LAST: i32 = 64;
    let core = CORE.get().copied();
    let reset = move || {
        if let Some(core) = core {
            setrlimit(Resource::Core, core)?;
        }
        for number in 1..=LAST {
            // SAFETY: the kernel reads a structure of 32 bytes, which this is, and writes nothing. A raw system call, because glibc's
            // sigaction rejects its two reserved signals. The kernel rejects SIGKILL and SIGSTOP, which can't be ignored anyway.
            unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    number,
                    DEFAULT.as_ptr(),
                    ptr::null_mut::<u64>(),
                    size_of::<u64>(),
                )
            };
        }
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: only three kinds of async-signal-safe system calls between fork and exec, and no memory but the closure's own.
    unsafe { command.pre_exec(reset) };
}

/// The kernel's limit for instructions of one program (`BPF_MAXINSNS`).
const LONGEST_PROGRAM: usize = 4096;

/// Installs a seccomp program for this process and its descendants. Does not set `no_new_privs`, which would disable every set-user-ID
/// program in the container; so it needs CAP_SYS_ADMIN and fails with EACCES without it.
pub(crate) fn install(filter: &Filter) -> io::Result<()> {
    if filter.0.is_empty() || filter.0.len() > LONGEST_PROGRAM {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut instructions: Vec<libc::sock_filter> = filter
        .0
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the kernel copies `len` instructions from a vector of that length that outlives the call, and validates each.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0 as libc::c_ulong,
            &raw const program,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes everything but stdin, stdout and stderr. Must be called before anything else opens a descriptor.
pub(crate) fn close_inherited() {
    const FIRST: libc::c_uint = 3;
    // SAFETY: nothing in this process owns a descriptor yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    if closed != 0 {
        // Kernels before 5.9.
        for number in 3..1024 {
            // SAFETY: the same.
            unsafe { libc::close(number) };
        }
    }
}

/// `struct clone_args` of `linux/sched.h` in its third version.
#[derive(Default)]
#[repr(C)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks a child in this cgroup of cgroup v2, or in that of this process. `None` in the child. The process must have no other thread.
pub(crate) fn fork_into(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let Some(cgroup) = cgroup else {
        return fork();
    };
    let arguments = CloneArguments {
        flags: CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        ..CloneArguments::default()
    };
    // SAFETY: the kernel reads the structure. Without a stack and without shared memory this is fork(2): the child continues here with a
    // copy of everything, and there is no other thread whose state could be torn.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<CloneArguments>(),
        )
    };
    forked(result)
}

/// Forks a child of this process's parent. `None` in the child. The process must have no other thread.
pub(crate) fn fork_sibling() -> io::Result<Option<Pid>> {
    fork_with(libc::CLONE_PARENT)
}

/// Forks a child. `None` in the child. The process must have no other thread.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    fork_with(0)
}

fn fork_with(flags: libc::c_int) -> io::Result<Option<Pid>> {
    let none = ptr::null_mut::<libc::c_void>();
    let flags = flags | libc::SIGCHLD;
    // SAFETY: as in `fork_into`; the arguments after the flags are all zero, so their order, which depends on the architecture, does not
    // matter.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    forked(result)
}

fn forked(result: libc::c_long) -> io::Result<Option<Pid>> {
    match i32::try_from(result) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process at once, without what a program does at its end.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: has no conditions.
    unsafe { libc::_exit(status) }
}
