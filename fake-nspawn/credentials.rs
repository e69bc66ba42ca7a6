//! The credentials of a container: files in a directory of the host, which the payload sees because it sees the host's paths.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Their directory, which is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Credentials(PathBuf);

impl Credentials {
    /// Reads these files, each with its name, into a new directory in `place`. `None` if there are none.
    pub(crate) fn read(files: &[(String, String)], place: &Path) -> io::Result<Option<Self>> {
        if files.is_empty() {
            return Ok(None);
        }
        let directory = place.join(format!("credentials-{}", std::process::id()));
        fs::create_dir(&directory)?;
        let made = Self(directory);
        for (name, file) in files {
            fs::write(made.0.join(name), fs::read(file)?)?;
        }
        Ok(Some(made))
    }

    /// The variable that names the directory.
    pub(crate) fn variable(&self) -> (String, String) {
        let value = self.0.to_string_lossy().into_owned();
        ("CREDENTIALS_DIRECTORY".to_owned(), value)
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}
