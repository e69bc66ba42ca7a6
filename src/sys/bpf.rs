//! BPF programs that decide which devices the processes of a cgroup may use (cgroup v2). Knows nothing of what they allow.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use super::{ffi, kernel};

/// How often to load a program that the kernel asks to load again: a signal has interrupted its check.
const ATTEMPTS: usize = 5;

/// The first version of the kernel in which the memory of programs counts in a memory cgroup. Before, it counts against the limit of locked
/// memory, for all processes of a user together.
const WITHOUT_MEMLOCK: (u32, u32) = (5, 11);

/// Loads a program of the type `BPF_PROG_TYPE_CGROUP_DEVICE`. Fails if the kernel has no BPF, this process lacks the capabilities, or the
/// kernel's check finds a fault in the program.
pub fn load_device_filter(instructions: &[u64]) -> io::Result<OwnedFd> {
    match load(instructions) {
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied
                && kernel::version() < WITHOUT_MEMLOCK =>
        {
            with_unlimited_memlock(|| load(instructions)).unwrap_or(Err(error))
        }
        result => result,
    }
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut result = ffi::load_device_program(instructions);
    for _ in 1..ATTEMPTS {
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            break;
        }
        result = ffi::load_device_program(instructions);
    }
    result
}

/// Calls `load` without a limit of locked memory. `None` if this process may not raise it.
fn with_unlimited_memlock<T>(load: impl FnOnce() -> T) -> Option<T> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok()?;
    let result = load();
    // It was higher a moment ago, and lowering needs no capability.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard);
    Some(result)
}

/// Attaches a program to the cgroup whose directory is open here. Programs of cgroups above and below stay in force: what one of them denies
/// is denied. The program ends with the cgroup.
pub fn attach_device_filter(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<()> {
    ffi::attach_device_program(program, cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is started later must not inherit it.
    #[test]
    fn the_limit_of_locked_memory_is_restored() {
        let limit = || getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        let before = limit();
        // Without CAP_SYS_RESOURCE the limit can't be raised.
        if let Some(during) = with_unlimited_memlock(limit) {
            assert_eq!(during, (RLIM_INFINITY, RLIM_INFINITY));
        }
        assert_eq!(limit(), before);
    }
}
