//! The directories of one `run`: its allocation and, below a short path, the plugin's state and socket. They are
//! removed at the end, by the plugin if `run` was killed.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

use super::say;

/// The prefix of their names.
const PREFIX: &str = "nomad-driver-nspawn-";

/// The directories of one run, removed on drop.
#[derive(Debug)]
pub(super) struct Directory {
    allocations: PathBuf,
    /// A separate directory for the plugin, if it can't be the same.
    short: Option<PathBuf>,
}

impl Directory {
    /// Creates them below `TMPDIR`, or `/tmp` if that is not set, with access for this user only. The paths of the
    /// plugin's sockets must be short: if `TMPDIR` is too long, sockets and state are in a directory in `/tmp` or
    /// `/run`. `max_state_dir` is the longest path of a state directory, in bytes.
    pub(super) fn create(max_state_dir: usize) -> Result<Self, String> {
        let parent = std::env::temp_dir();
        let mut made = Self {
            allocations: make_in(&parent)?,
            short: None,
        };
        if made.state().as_os_str().len() > max_state_dir {
            let short = make_in(Path::new("/tmp")).or_else(|_| make_in(Path::new("/run")));
            made.short = Some(short.map_err(|error| {
                let beyond = made.state().as_os_str().len() - max_state_dir;
                format!(
                    "TMPDIR: {} is {beyond} bytes too long for the sockets in it, and neither /tmp nor /run can be used instead: {error}",
                    parent.display()
                )
            })?);
        }
        Ok(made)
    }

    /// The directory in which the allocation is created.
    pub(super) fn allocations(&self) -> &Path {
        &self.allocations
    }

    /// The directory in which the plugin creates its socket.
    pub(super) fn sockets(&self) -> &Path {
        self.short.as_ref().unwrap_or(&self.allocations)
    }

    /// The plugin's state directory, which the plugin itself creates.
    pub(super) fn state(&self) -> PathBuf {
        self.sockets().join("state")
    }

    /// All these directories.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.allocations.as_path()).chain(self.short.as_deref())
    }
}

/// Creates a private directory with a new name.
fn make_in(parent: &Path) -> Result<PathBuf, String> {
    let template = parent.join(format!("{PREFIX}XXXXXX"));
    mkdtemp(&template).map_err(|errno| format!("{}: {errno}", template.display()))
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The state directory is the plugin's, and empty once every task is destroyed. The allocation is gone unless
        // something is mounted in it, and then nothing may be deleted.
        drop(fs::remove_dir(self.state()));
        // A plugin that was killed leaves its socket.
        drop(remove_sockets(self.sockets()));
        for path in self.paths() {
            if let Err(error) = remove_if_exists(path) {
                say::line(&format!(
                    "warning: {} is not removed: {error}",
                    path.display()
                ));
            }
        }
    }
}

/// Removes the sockets in a directory, and nothing else.
fn remove_sockets(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes an empty directory. The plugin may have removed it already, because its standard input was closed.
fn remove_if_exists(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes the directories of a `run` that has exited, with the allocation in them. A directory with a mount in it is
/// kept, and so is one whose name does not have the prefix.
pub fn remove_directories<'a>(paths: impl Iterator<Item = &'a Path>) {
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX)
            && let Err(error) = crate::allocation::remove_unmounted(path)
        {
            tracing::warn!(%error, path = %path.display(), "the directory of a run can't be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_a_missing_directory_succeeds() {
        let parent = tempfile::tempdir().unwrap();
        let directory = make_in(parent.path()).unwrap();
        remove_if_exists(&directory).unwrap();
        remove_if_exists(&directory).unwrap();
        fs::create_dir_all(directory.join("more")).unwrap();
        assert!(remove_if_exists(&directory).is_err());
    }

    #[test]
    fn only_sockets_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("plugin");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        fs::write(directory.path().join("file"), "").unwrap();
        fs::create_dir(directory.path().join("directory")).unwrap();
        remove_sockets(directory.path()).unwrap();
        assert!(!socket.exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
