//! Validates the temporary file systems of a job: those of its `tmpfs` option, in the form of `docker run --tmpfs`, and those of `mount`
//! blocks. `/tmp`, `/dev/shm` and `/run`, which every container has, are in `resources`.

use std::path::PathBuf;

use crate::container::{Restrictions, Tmpfs};

use super::ConfigError;
use super::decode::{Number, quoted};
use super::mounts::mount_point;
use super::options::MountOptions;
use super::resources::tmpfs_size;
use super::values::whole;

/// The permissions with which the kernel mounts one unless it is given others.
const MODE: u32 = 0o1777;
/// All permissions of the owner.
const OWNER: u32 = 0o700;
const MODE_MAX: u32 = 0o7777;

/// Temporary file systems of every container, and how a job changes them.
const OWN: &[(&str, &str)] = &[
    ("/tmp", "leave it out, and set its size by config.tmp_size"),
    (
        "/dev/shm",
        "leave it out, and set its size by config.shm_size",
    ),
    ("/run", "leave it out"),
];

/// One of `tmpfs`: `PATH` or `PATH:OPTIONS`. `limit` is the memory limit of the task, in bytes.
pub(super) fn of_text(
    option: String,
    text: &str,
    limit: Option<u64>,
) -> Result<Tmpfs, ConfigError> {
    let (path, words) = text.split_once(':').unwrap_or((text, ""));
    let mut tmpfs = Tmpfs {
        target: target(&option, path)?,
        size: default_size(limit),
        mode: MODE,
        read_only: false,
        restrictions: Restrictions::default(),
        option,
    };
    for word in words.split(',').filter(|word| !word.is_empty()) {
        apply(&mut tmpfs, word, limit)?;
    }
    Ok(tmpfs)
}

fn apply(tmpfs: &mut Tmpfs, word: &str, limit: Option<u64>) -> Result<(), ConfigError> {
    let option = &tmpfs.option;
    let restrictions = &mut tmpfs.restrictions;
    match word.split_once('=') {
        None => match word {
            "rw" => tmpfs.read_only = false,
            "ro" => tmpfs.read_only = true,
            "suid" => restrictions.nosuid = false,
            "nosuid" => restrictions.nosuid = true,
            "nodev" => restrictions.nodev = true,
            "exec" => restrictions.noexec = false,
            "noexec" => restrictions.noexec = true,
            _ => return Err(unknown(option, word)),
        },
        Some(("size", size)) => tmpfs.size = Some(tmpfs_size(option, size, limit)?),
        Some(("mode", digits)) => tmpfs.mode = octal(option, digits)?,
        Some(_) => return Err(unknown(option, word)),
    }
    Ok(())
}

fn unknown(option: &str, word: &str) -> ConfigError {
    let reason = format!(
        "{} is not one of size=SIZE, mode=MODE, ro, rw, nosuid, suid, nodev, noexec, exec",
        quoted(word)
    );
    ConfigError::new(option, reason)
}

fn octal(option: &str, digits: &str) -> Result<u32, ConfigError> {
    let is_octal = digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let mode = u32::from_str_radix(digits, 8).ok();
    let mode = mode.filter(|mode| is_octal && *mode <= MODE_MAX);
    mode.ok_or_else(|| {
        let reason = format!(
            "{} is not a mode: use one in octal such as 1777 or 0700",
            quoted(digits)
        );
        ConfigError::new(option, reason)
    })
}

/// That of a `mount` block.
pub(super) fn of_block(
    option: String,
    block: &MountOptions,
    restrictions: Restrictions,
    limit: Option<u64>,
) -> Result<Tmpfs, ConfigError> {
    let at = |name: &str| format!("{option}.{name}");
    let given = block.tmpfs_options.as_ref();
    let size = given.and_then(|given| given.size.as_ref());
    let size = size.map(|number| {
        let option = at("tmpfs_options.size");
        whole(&option, number, 1..=i64::MAX)?;
        tmpfs_size(&option, &number.0, limit)
    });
    let mode = given.map(|given| decimal(&at("tmpfs_options.mode"), &given.mode));
    Ok(Tmpfs {
        target: target(&at("target"), &block.target)?,
        size: size.transpose()?.or_else(|| default_size(limit)),
        mode: mode.transpose()?.unwrap_or(MODE),
        read_only: block.read_only,
        restrictions,
        option,
    })
}

/// docker's number is that of the kernel. Written with the digits of an octal one it is another mode, and for all usual ones a mode that
/// takes permissions from the owner.
fn decimal(option: &str, number: &Number) -> Result<u32, ConfigError> {
    let mode = whole(option, number, 0..=i64::from(MODE_MAX))?;
    let mode = u32::try_from(mode).unwrap_or(MODE);
    if mode & OWNER == OWNER {
        return Ok(mode);
    }
    let reason = format!(
        "{mode} is {mode:04o} in octal, which takes permissions from the owner: use a decimal number as with docker, such as 1023 for 1777, 511 for 0777 or 448 for 0700"
    );
    Err(ConfigError::new(option, reason))
}

/// Half of the memory limit, as for `/tmp`.
fn default_size(limit: Option<u64>) -> Option<u64> {
    limit.map(|limit| limit / 2)
}

fn target(option: &str, text: &str) -> Result<PathBuf, ConfigError> {
    let target = mount_point(option, text)?;
    match OWN.iter().find(|(own, _)| target.as_os_str() == *own) {
        None => Ok(target),
        Some((own, remedy)) => {
            let reason = format!("{own:?} is a temporary file system in every container: {remedy}");
            Err(ConfigError::new(option, reason))
        }
    }
}
