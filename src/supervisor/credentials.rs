//! Reads the files that a container gets as credentials, for systemd-nspawn. Runs in the exec shim. A task may have put anything at their paths
//! since they were checked, or do so now: nothing but a regular file is opened, by a path without links, and no more of it is read than a
//! credential holds. systemd-nspawn gets what was read through pipes, which are never written to a disk, and hold nothing once it has read them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs};
use nix::unistd::pipe2;

use crate::container::{Cause, Credential};
use crate::nspawn::argv::descriptor_of_credential;
use crate::nspawn::refusal::cause_of_host_error;
use crate::state::task_dir::Refusal;
use crate::sys::open_regular_file;

/// Reads the files, and leaves a descriptor for each open, at the number that the arguments of systemd-nspawn name. It belongs to the program
/// that this process becomes.
pub(super) fn pass(credentials: &[Credential]) -> Result<(), Refusal> {
    for (index, text) in read_all(credentials)?.iter().enumerate() {
        let number = descriptor_of_credential(index);
        let passed = pipe_with(text).and_then(|pipe| leave_at(pipe, number));
        passed.map_err(|error| Refusal {
            cause: cause_of_host_error(&error),
            reason: format!(
                "{}: can't be passed to systemd-nspawn: {error}",
                credentials[index].option
            ),
        })?;
    }
    Ok(())
}

/// What is in the files.
fn read_all(credentials: &[Credential]) -> Result<Vec<Vec<u8>>, Refusal> {
    let mut left = Credential::MAX_TOTAL_BYTES;
    let mut read_one = |credential: &Credential| {
        let text = read(&credential.source)?;
        left = left.checked_sub(text.len()).ok_or(Unfit::TooMuch)?;
        Ok(text)
    };
    let all = credentials.iter();
    all.map(|one| read_one(one).map_err(|error| refused(one, error)))
        .collect()
}

/// Why a file is no credential.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error(
        "has more than {} bytes, the most that a credential holds",
        Credential::MAX_BYTES
    )]
    TooLarge,
    #[error(
        "and the files before it have more than {} bytes, the most that all credentials of a task hold",
        Credential::MAX_TOTAL_BYTES
    )]
    TooMuch,
    #[error("is not a regular file")]
    Irregular,
    #[error("is not a file on a disk or in memory, but one of the kernel")]
    Kernel,
    #[error("a part of the path has become a symbolic link since it was checked")]
    Link,
    #[error("{0}")]
    Failed(#[from] io::Error),
}

fn refused(credential: &Credential, error: Unfit) -> Refusal {
    let cause = match &error {
        Unfit::Failed(error) => cause_of_host_error(error),
        _ => Cause::Config,
    };
    let (option, path) = (&credential.option, credential.source.display());
    let reason = match error {
        Unfit::TooLarge | Unfit::TooMuch | Unfit::Irregular | Unfit::Kernel => {
            format!("{option}: {path} {error}")
        }
        Unfit::Link | Unfit::Failed(_) => format!("{option}: can't read {path}: {error}"),
    };
    Refusal { cause, reason }
}

/// What is in the file.
fn read(path: &Path) -> Result<Vec<u8>, Unfit> {
    let opened = open_regular_file(path).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::ELOOP) => Unfit::Link,
        _ => Unfit::Failed(error),
    })?;
    let file = opened.ok_or(Unfit::Irregular)?;
    // What such a file says is about the process that reads it, which is not the container's.
    let kind = fstatfs(&file).map_err(io::Error::from)?.filesystem_type();
    if [PROC_SUPER_MAGIC, SYSFS_MAGIC].contains(&kind) {
        return Err(Unfit::Kernel);
    }
    let mut text = Vec::new();
    let limit = Credential::MAX_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut text)?;
    match text.len() > Credential::MAX_BYTES {
        true => Err(Unfit::TooLarge),
        false => Ok(text),
    }
}

/// A pipe that holds this text, and then ends.
fn pipe_with(text: &[u8]) -> io::Result<OwnedFd> {
    // Nothing reads it yet, so a write that does not fit must fail.
    let (pipe, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let size = i32::try_from(text.len().max(1)).map_err(io::Error::other)?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(size))?;
    File::from(write).write_all(text)?;
    Ok(pipe)
}

/// Leaves a copy of the descriptor open for the next program, at this number.
fn leave_at(pipe: OwnedFd, number: usize) -> io::Result<()> {
    let number = i32::try_from(number).map_err(io::Error::other)?;
    match fcntl(&pipe, FcntlArg::F_DUPFD(number))? {
        got if got == number => Ok(()),
        _ => Err(io::Error::other(format!(
            "the descriptor {number} is in use"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::symlink;

    fn credential(source: &Path) -> Credential {
        Credential {
            name: "token".to_owned(),
            source: source.to_owned(),
            option: "config.credentials[\"token\"]".to_owned(),
        }
    }

    /// The reason for which it is refused, and whether another attempt may succeed.
    fn refusal(source: &Path) -> (String, bool) {
        let refusal = match read(source) {
            Ok(text) => panic!("{} was read: {} bytes", source.display(), text.len()),
            Err(error) => refused(&credential(source), error),
        };
        (refusal.reason, refusal.cause.is_recoverable())
    }

    #[test]
    fn a_file_of_the_kernel_is_refused() {
        let (reason, may_succeed) = refusal(
            Path::new("/proc/self/environ")
                .canonicalize()
                .unwrap()
                .as_path(),
        );
        assert!(reason.ends_with("but one of the kernel"), "{reason}");
        assert!(!may_succeed);
    }

    #[test]
    fn a_file_is_read_up_to_the_limit() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap().join("file");
        for text in [
            vec![],
            b"with\0byte".to_vec(),
            vec![b'x'; Credential::MAX_BYTES],
        ] {
            std::fs::write(&path, &text).unwrap();
            assert!(read(&path).unwrap() == text);
        }
    }

    #[test]
    fn anything_else_is_refused_without_waiting() {
        let temp = tempfile::tempdir().unwrap();
        let top = temp.path().canonicalize().unwrap();
        let path = |name: &str| top.join(name);
        std::fs::create_dir(path("directory")).unwrap();
        std::fs::write(path("directory/file"), "s3cret").unwrap();
        let sparse = File::create(path("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink(path("directory/file"), path("link")).unwrap();
        symlink("directory", path("parent")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (name, words) in [
            ("directory", "is not a regular file"),
            ("fifo", "is not a regular file"),
            ("socket", "is not a regular file"),
            (
                "sparse",
                "has more than 1048576 bytes, the most that a credential holds",
            ),
        ] {
            let wanted = format!(
                "config.credentials[\"token\"]: {} {words}",
                path(name).display()
            );
            assert_eq!(refusal(&path(name)), (wanted, false));
        }
        let null = refusal(Path::new("/dev/null"));
        assert!(
            null.0.ends_with("/dev/null is not a regular file"),
            "{null:?}"
        );
        let link = "a part of the path has become a symbolic link since it was checked";
        for (name, words, may_pass) in [
            ("link", link, false),
            ("parent/file", link, false),
            ("missing", "No such file or directory (os error 2)", true),
        ] {
            let wanted = format!(
                "config.credentials[\"token\"]: can't read {}: {words}",
                path(name).display()
            );
            assert_eq!(refusal(&path(name)), (wanted, may_pass));
        }
    }

    #[test]
    fn all_files_together_have_a_limit() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap().join("large");
        std::fs::write(&path, vec![b'x'; Credential::MAX_BYTES]).unwrap();
        assert_eq!(read_all(&vec![credential(&path); 4]).unwrap().len(), 4);
        let refusal = read_all(&vec![credential(&path); 5]).unwrap_err();
        let wanted = format!(
            "config.credentials[\"token\"]: {} and the files before it have more than 4194304 bytes, \
             the most that all credentials of a task hold",
            path.display()
        );
        assert_eq!((refusal.reason, refusal.cause), (wanted, Cause::Config));
    }

    #[test]
    fn a_pipe_holds_what_a_credential_holds_and_ends() {
        for length in [0, 1, 4097, Credential::MAX_BYTES] {
            let text = vec![b'x'; length];
            let pipe = pipe_with(&text).unwrap();
            // Opened again, as systemd-nspawn does: then it waits for the end.
            let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
            assert!(std::fs::read(path).unwrap() == text, "{length}");
        }
    }

    #[test]
    fn a_descriptor_is_left_at_its_number_or_not_at_all() {
        const FREE: i32 = 900;
        leave_at(pipe_with(b"text").unwrap(), FREE as usize).unwrap();
        assert_eq!(
            std::fs::read(format!("/proc/self/fd/{FREE}")).unwrap(),
            b"text"
        );
        let error = leave_at(pipe_with(b"other").unwrap(), FREE as usize).unwrap_err();
        assert_eq!(error.to_string(), "the descriptor 900 is in use");
    }
}
