//! Creates the source of a mount that the job wants to be created.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};

/// The mode of missing parents.
const MODE: u32 = 0o755;

/// Creates a directory with this mode and its missing parents with 0755, owned by the user of this process. What exists is not changed. A link in the path is an
/// error: a task may have made it since the path was checked. Blocks.
pub fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at = open("/", flags, Mode::empty())?;
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        let Component::Normal(name) = part else {
            continue;
        };
        let mode = if parts.peek().is_none() { mode } else { MODE };
        // Until it has its mode, nobody else may enter it.
        let made = match mkdirat(&at, name, Mode::S_IRWXU) {
            Ok(()) => true,
            Err(nix::Error::EEXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let next = openat(&at, name, flags, Mode::empty())?;
        if made {
            // Whatever this process has for a umask.
            File::from(next.try_clone()?).set_permissions(PermissionsExt::from_mode(mode))?;
        }
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    #[test]
    fn missing_parents_are_created_and_what_exists_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        let top = temp.path().canonicalize().unwrap();
        fs::set_permissions(&top, fs::Permissions::from_mode(0o700)).unwrap();
        let path = top.join("a/b");
        create_directory(&path, 0o711).unwrap();
        create_directory(&path, 0o755).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        assert_eq!(
            [mode(&top), mode(&top.join("a")), mode(&path)],
            [0o700, 0o755, 0o711]
        );
    }

    #[test]
    fn no_link_is_followed() {
        let temp = tempfile::tempdir().unwrap();
        let top = temp.path().canonicalize().unwrap();
        fs::create_dir(top.join("elsewhere")).unwrap();
        symlink(top.join("elsewhere"), top.join("link")).unwrap();
        symlink(top.join("none"), top.join("dangling")).unwrap();
        for path in ["link/new", "link", "dangling"] {
            create_directory(&top.join(path), 0o755).unwrap_err();
        }
        assert_eq!(fs::read_dir(top.join("elsewhere")).unwrap().count(), 0);
        assert!(!top.join("none").exists());
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        let top = temp.path().canonicalize().unwrap();
        fs::write(top.join("file"), "").unwrap();
        create_directory(&top.join("file"), 0o755).unwrap_err();
        create_directory(&top.join("file/new"), 0o755).unwrap_err();
    }
}
