//! Files that other processes see whole or not at all; files of which other processes may have made something else.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::mount_tree::place_as_it_is;

/// Writes a file that only its owner may access, in place of an earlier one: beside it first, as `<name>.<pid>-<number>.new`. Several
/// processes may write the same file at the same time; the last one stays.
pub fn replace_file(directory: &Path, name: &str, parts: &[&[u8]]) -> io::Result<()> {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    let (beside, mut file) = loop {
        let (pid, number) = (std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
        let beside = directory.join(format!("{name}.{pid}-{number}.new"));
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside);
        match made {
            // Left by an earlier process with the same pid.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => break (beside, made?),
        }
    };
    let written = parts
        .iter()
        .try_for_each(|part| file.write_all(part))
        .and_then(|()| fs::rename(&beside, directory.join(name)));
    if written.is_err() {
        // An incomplete file may contain part of a secret.
        let _ = fs::remove_file(beside);
    }
    written
}

/// Opens the regular file at a path without links for reading; a link in the path or at its end is an error (`ELOOP`). `None` if something else
/// is there, which is not opened: that could wait, or do something to a device. A file that a process has leased is an error
/// ([`io::ErrorKind::WouldBlock`]), because opening it would wait for that process.
pub fn open_regular_file(path: &Path) -> io::Result<Option<File>> {
    let place = File::from(place_as_it_is(path)?);
    if !place.metadata()?.is_file() {
        return Ok(None);
    }
    let again = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits();
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nonblock.cast_signed());
    options.open(again).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_and_closed_to_others() {
        let temp = tempfile::tempdir().unwrap();
        for parts in [&[b"long".as_slice(), b"er"] as &[&[u8]], &[b"short"]] {
            replace_file(temp.path(), "file", parts).unwrap();
            assert_eq!(fs::read(temp.path().join("file")).unwrap(), parts.concat());
        }
        let about = fs::metadata(temp.path().join("file")).unwrap();
        assert_eq!(about.permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_a_regular_file_at_a_path_without_links_is_opened() {
        let temp = tempfile::tempdir().unwrap();
        let top = temp.path().canonicalize().unwrap();
        fs::write(top.join("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", top.join("link")).unwrap();
        nix::unistd::mkfifo(&top.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut file = open_regular_file(&top.join("file")).unwrap().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        for other in [&top, &top.join("fifo"), Path::new("/dev/null")] {
            assert!(open_regular_file(other).unwrap().is_none(), "{other:?}");
        }
        let error = open_regular_file(&top.join("link")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP));
        let error = open_regular_file(&top.join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_can_not_be_put_in_place_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("file/in-the-way")).unwrap();
        replace_file(temp.path(), "file", &[b"text"]).unwrap_err();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_an_earlier_process_has_left_is_not_in_the_way() {
        let temp = tempfile::tempdir().unwrap();
        for number in 0..2000 {
            let left = format!("file.{}-{number}.new", std::process::id());
            fs::write(temp.path().join(left), "").unwrap();
        }
        replace_file(temp.path(), "file", &[b"text"]).unwrap();
        assert_eq!(fs::read(temp.path().join("file")).unwrap(), b"text");
    }
}
