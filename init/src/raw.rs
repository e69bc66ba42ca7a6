//! The three things for which there are no safe words: taking over the descriptors that the program was started with, handing
//! the kernel a seccomp program, and starting a command whose signals and limits are as they should. The only unsafe code of this
//! program; decides nothing, and keeps nothing.

#![expect(
    unsafe_code,
    reason = "descriptors known by number only, a system call that nobody wraps without setting no_new_privs, a step before exec"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use nix::sys::signal::SigSet;
use nspawn_init::{DESCRIPTORS, Descriptor, Filter};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The descriptors that the program was started with.
pub(crate) struct Inherited {
    pub(crate) channel: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) program: OwnedFd,
    pub(crate) spec: OwnedFd,
}

/// Takes them over and marks them so that no command inherits them. All or none: an error if one of them is not open, or if
/// they were taken before. To be called before anything else opens a descriptor.
pub(crate) fn inherited() -> io::Result<Inherited> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    let first = Descriptor::Channel as i32;
    for number in first..first + DESCRIPTORS {
        // SAFETY: sets a flag of a number, which is refused where no descriptor has it.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: it is open, as was just seen; it was inherited, so nothing in here owns it, and it is taken once.
    let take = |descriptor: Descriptor| unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    Ok(Inherited {
        channel: take(Descriptor::Channel),
        stdout: take(Descriptor::Stdout),
        stderr: take(Descriptor::Stderr),
        program: take(Descriptor::Program),
        spec: take(Descriptor::Spec),
    })
}

/// The limit of core dumps that a command is to have.
static CORE: OnceLock<Rlimit> = OnceLock::new();

/// Keeps this process out of core dumps: orders and variables hold secrets. A command gets back what this process had.
pub(crate) fn dump_no_core() {
    /// With 0 the kernel would still call a core dump's handler program; 1 is what it takes for "not even that".
    const NOT_EVEN_A_HANDLER: u64 = 1;
    let given = *CORE.get_or_init(|| getrlimit(Resource::Core));
    let most = given.maximum.unwrap_or(u64::MAX);
    let own = Rlimit {
        current: Some(NOT_EVEN_A_HANDLER.min(most)),
        ..given
    };
    // A soft limit below the hard one is refused to nobody.
    let _ = setrlimit(Resource::Core, own);
}

/// Has a command start with no signal blocked, as this process has them all, and none ignored: whoever is started by
/// posix_spawn(3) ignores two that the C library keeps for itself, and so does all it starts.
pub(crate) fn with_default_signals_and_limits(command: &mut Command) {
    /// The kernel's `struct sigaction`, with nothing in it: the default.
    const DEFAULT: [u64; 4] = [0; 4];
    const LAST: i32 = 64;
    let core = CORE.get().copied();
    let reset = move || {
        if let Some(core) = core {
            setrlimit(Resource::Core, core)?;
        }
        for number in 1..=LAST {
            // SAFETY: the kernel reads a structure of 32 bytes, which this is, and writes nothing. The C library's own call
            // refuses the two. So does the kernel SIGKILL and SIGSTOP, which can't be ignored.
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
    // SAFETY: three kinds of system call that may be made between fork and exec, and no memory but its own.
    unsafe { command.pre_exec(reset) };
}

/// The most instructions that the kernel takes.
const LONGEST_PROGRAM: usize = 4096;

/// Installs a seccomp program for this process and all it will start. Does not set `no_new_privs`, which would disarm every
/// set-user-ID program of the container: it takes CAP_SYS_ADMIN instead, and EACCES is the answer without it.
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
    // SAFETY: the kernel copies `len` instructions from a vector that has as many and outlives the call, and checks each.
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
