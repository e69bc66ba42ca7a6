//! Files that a container gets as systemd credentials.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A file of the host that a container gets as a credential. Names only: what is in the file is a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// The name of the credential: 1 to 255 printable ASCII characters other than `/` and `:`, and neither `.` nor `..`.
    pub name: String,
    /// Absolute path of the file, without links. Something was there when it was checked.
    pub source: PathBuf,
    /// The option of the job that asks for it, for error messages.
    pub option: String,
}

impl Credential {
    /// The directory of the credentials in the container.
    pub const DIRECTORY: &str = "/run/host/credentials";
    /// The variable that names the directory.
    pub const VARIABLE: &str = "CREDENTIALS_DIRECTORY";
    /// The most that one holds, in bytes.
    pub const MAX_BYTES: usize = 1024 * 1024;
    /// The most that all of a container hold, in bytes: during the start there are several copies in memory.
    pub const MAX_TOTAL_BYTES: usize = 4 * 1024 * 1024;
    /// The most that a container has.
    pub const MAX_COUNT: usize = 256;
}
