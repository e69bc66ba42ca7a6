//! The block `credentials`: the names, and the files on the host. Opens no file: the exec shim does, and checks again what is there.

use std::collections::BTreeMap;
use std::path::Path;

use crate::container::{Credential, Mount, Tmpfs};

use super::decode::{entry, quoted};
use super::sources::Sources;
use super::{ConfigError, mount_targets};

const OPTION: &str = "config.credentials";

/// The longest name, in bytes: that of a file.
const NAME_MAX: usize = 255;

/// The credentials of a task with these mounts, in the order of their names.
pub(super) fn credentials(
    block: Option<&BTreeMap<String, String>>,
    sources: Sources<'_>,
    (mounts, tmpfs): (&[Mount], &[Tmpfs]),
) -> Result<Vec<Credential>, ConfigError> {
    let entries: Vec<_> = block.into_iter().flatten().collect();
    if entries.len() > Credential::MAX_COUNT {
        let reason = format!(
            "has {} entries; at most {} are allowed",
            entries.len(),
            Credential::MAX_COUNT
        );
        return Err(ConfigError::new(OPTION, reason));
    }
    for (name, _) in &entries {
        check_name(name)?;
    }
    if !entries.is_empty() {
        let directory = Path::new(Credential::DIRECTORY);
        mount_targets::keep_visible((directory, OPTION), mounts, tmpfs)?;
    }
    let credential = |(name, file): (&String, &String)| {
        let option = entry(OPTION, name);
        Ok(Credential {
            name: name.clone(),
            source: sources.bind(&option, file)?,
            option,
        })
    };
    entries.into_iter().map(credential).collect()
}

/// The rule of systemd.
fn check_name(name: &str) -> Result<(), ConfigError> {
    let is_allowed = |byte: u8| matches!(byte, b' '..=b'~') && byte != b'/' && byte != b':';
    let fault = if name.is_empty() {
        "is empty"
    } else if name == "." || name == ".." {
        "is not the name of a file"
    } else if name.len() > NAME_MAX {
        "is longer than 255 bytes"
    } else if !name.bytes().all(is_allowed) {
        "contains a character other than printable ASCII without / and :"
    } else {
        return Ok(());
    };
    let reason = format!("the name {} {fault}", quoted(name));
    Err(ConfigError::new(entry(OPTION, name), reason))
}
