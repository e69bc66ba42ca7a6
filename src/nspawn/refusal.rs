//! Classifies why systemd-nspawn failed to start a container, or could not be started itself, by whether another
//! attempt can succeed. Evaluates error numbers and messages only. The messages are those of systemd-nspawn 252 and the
//! C library's texts of error numbers; systemd-nspawn prints them in English unless a booted container's variables
//! select another language, and anything that is not recognized is [`Cause::Unknown`].

use std::io;

use nix::errno::Errno;

use crate::container::Cause;

/// The meaning of error numbers, with the text that systemd-nspawn prints for them. A number that is not listed is
/// ambiguous.
const ERRNOS: &[(Errno, &str, Cause)] = &[
    (Errno::EBUSY, "Device or resource busy", Cause::Busy),
    (Errno::EEXIST, "File exists", Cause::Busy),
    (Errno::EADDRINUSE, "Address already in use", Cause::Busy),
    (
        Errno::EAGAIN,
        "Resource temporarily unavailable",
        Cause::Resources,
    ),
    (Errno::ENOMEM, "Cannot allocate memory", Cause::Resources),
    (Errno::ENOSPC, "No space left on device", Cause::Resources),
    (Errno::EDQUOT, "Disk quota exceeded", Cause::Resources),
    (Errno::EMFILE, "Too many open files", Cause::Resources),
    (
        Errno::ENFILE,
        "Too many open files in system",
        Cause::Resources,
    ),
    (Errno::ETXTBSY, "Text file busy", Cause::Resources),
    (Errno::EINTR, "Interrupted system call", Cause::Resources),
    (Errno::EIO, "Input/output error", Cause::Resources),
    (Errno::ESTALE, "Stale file handle", Cause::Resources),
    (Errno::ETIMEDOUT, "Connection timed out", Cause::Resources),
    (Errno::ENOENT, "No such file or directory", Cause::Config),
    (Errno::ENOTDIR, "Not a directory", Cause::Config),
    (Errno::EISDIR, "Is a directory", Cause::Config),
    (
        Errno::ELOOP,
        "Too many levels of symbolic links",
        Cause::Config,
    ),
    (Errno::ENAMETOOLONG, "File name too long", Cause::Config),
    (Errno::EINVAL, "Invalid argument", Cause::Config),
    (Errno::EOPNOTSUPP, "Operation not supported", Cause::Config),
    (Errno::ENODEV, "No such device", Cause::Config),
    (Errno::ENOEXEC, "Exec format error", Cause::Config),
    (Errno::E2BIG, "Argument list too long", Cause::Config),
    (Errno::EACCES, "Permission denied", Cause::Config),
    (Errno::EPERM, "Operation not permitted", Cause::Config),
    (Errno::EROFS, "Read-only file system", Cause::Config),
];

/// Messages of systemd-nspawn without an error number.
const MESSAGES: &[(&str, Cause)] = &[
    // "Directory tree ... is currently busy.", "Disk image ... is currently busy."
    ("is currently busy", Cause::Busy),
    ("No suitable available UID in range", Cause::Busy),
    ("unrecognized option", Cause::Config),
    ("requires an argument", Cause::Config),
    ("doesn't allow an argument", Cause::Config),
    ("Failed to parse", Cause::Config),
    ("Failed to resolve user", Cause::Config),
    ("may not be combined", Cause::Config),
    ("not supported", Cause::Config),
    ("doesn't look like", Cause::Config),
    ("efusing", Cause::Config),
    ("Sorry, ", Cause::Config),
];

/// Messages that systemd-nspawn prints after the actual reason, when one of its processes notices that another has
/// exited.
const CONSEQUENCES: &[&str] = &[
    "Short read",
    "Short write",
    "Child died too early",
    "Parent died too early",
    "Attempted to remove disk file system",
];

/// The cause in the error of running a program: a missing or non-executable file has to be fixed before another
/// attempt.
pub fn cause_of_exec_error(error: &io::Error) -> Cause {
    let number = error.raw_os_error().map(Errno::from_raw);
    let known = ERRNOS.iter().find(|(errno, ..)| Some(*errno) == number);
    known.map_or(Cause::Unknown, |(.., cause)| *cause)
}

/// The cause in the error of one of the driver's own steps, for which no option of the job is responsible.
pub fn cause_of_host_error(error: &io::Error) -> Cause {
    match cause_of_exec_error(error) {
        Cause::Config => Cause::Unknown,
        other => other,
    }
}

/// The cause in what systemd-nspawn printed before it gave up a start. Its last message counts, without consequences,
/// because it also prints warnings; a recoverable cause counts at any position, because the messages after it may be
/// consequences.
pub fn cause_of_messages(messages: &str) -> Cause {
    let lines = || messages.lines().filter(|line| !line.trim().is_empty());
    let recoverable = [Cause::Busy, Cause::Resources];
    if let Some(cause) = lines()
        .map(cause_of_line)
        .find(|cause| recoverable.contains(cause))
    {
        return cause;
    }
    let is_reason = |line: &&str| !CONSEQUENCES.iter().any(|begin| line.starts_with(begin));
    let last = lines().rfind(is_reason);
    last.map_or(Cause::Unknown, cause_of_line)
}

fn cause_of_line(line: &str) -> Cause {
    let line = line.trim();
    let by_errno = ERRNOS.iter().find(|(_, text, _)| line.ends_with(text));
    let by_message = || MESSAGES.iter().find(|(text, _)| line.contains(text));
    by_errno
        .map(|(.., cause)| *cause)
        .or_else(|| by_message().map(|(_, cause)| *cause))
        .unwrap_or(Cause::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Printed by systemd-nspawn 252, with shortened paths.
    #[rstest]
    #[case("Directory tree /t/tree is currently busy.", Cause::Busy)]
    #[case("Disk image /t/disk.raw is currently busy.", Cause::Busy)]
    #[case(
        "Failed to pick suitable UID/GID range: Device or resource busy",
        Cause::Busy
    )]
    #[case("Cannot initialize IPC barrier: Too many open files", Cause::Resources)]
    #[case(
        "Failed to fork inner child: Resource temporarily unavailable",
        Cause::Resources
    )]
    #[case(
        "Failed to resolve interface \"nolink\": No such device\nParent died too early",
        Cause::Config
    )]
    #[case(
        "Failed to fork: Cannot allocate memory\nChild died too early.",
        Cause::Resources
    )]
    #[case(
        "Failed to resolve path /t/none: No such file or directory",
        Cause::Config
    )]
    #[case("systemd-nspawn: unrecognized option '--frobnicate'", Cause::Config)]
    #[case("Failed to parse UID \"xyz\": Invalid argument", Cause::Config)]
    #[case("Failed to parse capability CAP_NOPE.", Cause::Config)]
    #[case("Failed to parse --settings= argument: bogus", Cause::Config)]
    #[case(
        "Failed to add interface vb-tree to bridge nobridge0: No such device\n",
        Cause::Config
    )]
    #[case(
        "Failed to stat /t/nope: No such file or directory\n\
         Attempted to remove disk file system under \"/run/systemd/nspawn/propagate/tree\", and we can't allow that.",
        Cause::Config
    )]
    #[case(
        "Directory /t/empty doesn't look like it has an OS tree (/usr/ directory is missing). Refusing.",
        Cause::Config
    )]
    #[case(
        "Failed to resolve user nobodyx.\nChild died too early.",
        Cause::Config
    )]
    #[case(
        "Failed to mount /etc/localtime (type n/a) on /t/tree/etc/localtime (MS_BIND \"\"): No such file or directory\n\
         Sorry, --volatile=yes mode is not supported with OS images that have not merged /bin/ into /usr/.\n\
         Short read while reading cgroup mode (0 bytes). The child is most likely dead.",
        Cause::Config
    )]
    #[case(
        "Failed to mount /etc/localtime (type n/a) on /t/tree/etc/localtime (MS_BIND \"\"): No such file or directory\n\
         Something that no release has said yet.",
        Cause::Unknown
    )]
    #[case("Failed to fork: out of luck", Cause::Unknown)]
    #[case("", Cause::Unknown)]
    fn messages_are_classified(#[case] messages: &str, #[case] cause: Cause) {
        assert_eq!(cause_of_messages(messages), cause);
    }

    #[test]
    fn the_texts_are_those_of_the_c_library() {
        for (errno, text, cause) in ERRNOS {
            let error = io::Error::from(*errno);
            assert_eq!(cause_of_exec_error(&error), *cause);
            if cfg!(target_env = "gnu") {
                assert!(error.to_string().starts_with(text), "{error}: {text}");
            }
        }
    }

    #[test]
    fn a_failed_step_of_the_driver_is_not_the_jobs_fault() {
        let missing = io::Error::from(Errno::ENOENT);
        assert_eq!(cause_of_exec_error(&missing), Cause::Config);
        assert_eq!(cause_of_host_error(&missing), Cause::Unknown);
        let short = io::Error::from(Errno::EMFILE);
        assert_eq!(cause_of_host_error(&short), Cause::Resources);
        assert_eq!(cause_of_exec_error(&io::Error::other("x")), Cause::Unknown);
    }
}
