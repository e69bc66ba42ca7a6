//! Checks and creates the state directory, which contains the task directories. Its content decides what root kills and unmounts,
//! so it is refused if another user could add or replace files there. Does not change the mode of a directory that existed
//! before: others may need it as it is, and secrets are in the task directories, which are always new.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// The kernel's own limit.
const MAX_LINKS: usize = 40;
const STICKY: u32 = 0o1000;

/// Why a state directory is refused.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It is a symlink.
    #[error("plugin.state_dir: {link} is a symbolic link; set it to the directory itself")]
    Link {
        /// The symlink.
        link: PathBuf,
    },
    /// Something else is at its path.
    #[error("plugin.state_dir: {path} is not a directory")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// It belongs to another user.
    #[error(
        "plugin.state_dir: {path} belongs to user {owner}; it and the directories above it must belong to root"
    )]
    Foreign {
        /// The directory, or one above it.
        path: PathBuf,
        /// The uid of its owner.
        owner: u32,
    },
    /// Others can write it.
    #[error(
        "plugin.state_dir: {path} is writable by other users (mode {mode:04o}); only root may write to it and the directories above it"
    )]
    Writable {
        /// The directory, or one above it.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It can't be read or created.
    #[error("{path}")]
    Io {
        /// Which directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Checks that other users can't modify this state directory, if it exists, or anything above it. Changes nothing.
pub fn check(state_dir: &Path) -> Result<(), StateDirError> {
    let mut left = parts(state_dir);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        let path = at.join(part);
        let about = match fs::symlink_metadata(&path) {
            Ok(about) => about,
            // The driver creates what is missing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(StateDirError::Io { path, source }),
        };
        if about.uid() != 0 && about.uid() != nix::unistd::geteuid().as_raw() {
            let owner = about.uid();
            return Err(StateDirError::Foreign { path, owner });
        }
        if about.is_symlink() {
            links += 1;
            if path == state_dir || links > MAX_LINKS {
                return Err(StateDirError::Link { link: path });
            }
            let target = match fs::read_link(&path) {
                Ok(target) => target,
                Err(source) => return Err(StateDirError::Io { path, source }),
            };
            if target.is_absolute() {
                at = "/".into();
            }
            let mut all = parts(&target);
            all.append(&mut left);
            left = all;
            continue;
        }
        if !about.is_dir() && left.is_empty() {
            return Err(StateDirError::NotADirectory { path });
        }
        if !about.is_dir() {
            // Nothing can be below it now. Perhaps a directory is mounted there later.
            return Ok(());
        }
        let mode = about.mode() & 0o7777;
        let group_counts = about.gid() != 0;
        let writable = mode & 0o002 != 0 || (group_counts && mode & 0o020 != 0);
        // In a sticky directory others can replace only their own files, and the owner of the next component is checked anyway.
        if writable && (left.is_empty() || mode & STICKY == 0) {
            return Err(StateDirError::Writable { path, mode });
        }
        at = path;
    }
    Ok(())
}

/// Checks this state directory, and creates it and missing directories above it with access for root only.
pub fn secure(state_dir: &Path) -> Result<(), StateDirError> {
    check(state_dir)?;
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir);
    made.map_err(|source| StateDirError::Io {
        path: state_dir.to_owned(),
        source,
    })
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A directory of the test's own, below a world-writable one.
    fn place() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_missing_state_directory_is_created_for_root_only() {
        let place = place();
        let state = place.path().join("a/b");
        secure(&state).unwrap();
        secure(&state).unwrap();
        for made in [&state, &place.path().join("a")] {
            assert_eq!(fs::metadata(made).unwrap().mode() & 0o7777, 0o700);
        }
    }

    #[rstest]
    #[case::private(0o700, true)]
    #[case::readable(0o755, true)]
    #[case::writable_by_all(0o777, false)]
    #[case::writable_by_all_and_sticky(0o1777, false)]
    fn the_mode_of_an_existing_directory_is_checked_and_kept(
        #[case] given: u32,
        #[case] good: bool,
    ) {
        let place = place();
        let state = place.path().join("state");
        fs::create_dir(&state).unwrap();
        mode(&state, given);
        let checked = secure(&state);
        assert_eq!(checked.is_ok(), good, "{checked:?}");
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o7777, given);
        if let Err(error) = checked {
            let text = error.to_string();
            assert!(text.contains("plugin.state_dir"), "{text}");
            assert!(text.contains(state.to_str().unwrap()), "{text}");
        }
    }

    #[rstest]
    #[case::open(0o777, false)]
    #[case::open_and_sticky(0o1777, true)]
    fn the_directories_above_are_checked_too(#[case] given: u32, #[case] good: bool) {
        let place = place();
        let above = place.path().join("above");
        fs::create_dir_all(above.join("state")).unwrap();
        mode(&above.join("state"), 0o700);
        mode(&above, given);
        let checked = check(&above.join("state"));
        assert_eq!(checked.is_ok(), good, "{checked:?}");
    }

    #[test]
    fn a_link_is_refused_and_a_link_above_is_followed() {
        let place = place();
        let real = place.path().join("real");
        fs::create_dir_all(real.join("state")).unwrap();
        mode(&real, 0o700);
        mode(&real.join("state"), 0o700);
        symlink("real/state", place.path().join("link")).unwrap();
        let refused = check(&place.path().join("link")).unwrap_err();
        assert!(matches!(refused, StateDirError::Link { .. }), "{refused}");
        symlink(&real, place.path().join("absolute")).unwrap();
        symlink("absolute/../real", place.path().join("relative")).unwrap();
        check(&place.path().join("relative/state")).unwrap();
        mode(&real, 0o777);
        let refused = check(&place.path().join("relative/state")).unwrap_err();
        assert!(
            matches!(refused, StateDirError::Writable { .. }),
            "{refused}"
        );
        mode(&real, 0o700);
    }

    #[test]
    fn circular_links_are_an_error() {
        let place = place();
        symlink("b", place.path().join("a")).unwrap();
        symlink("a", place.path().join("b")).unwrap();
        let refused = check(&place.path().join("a/state")).unwrap_err();
        assert!(matches!(refused, StateDirError::Link { .. }), "{refused}");
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        let place = place();
        let state = place.path().join("state");
        fs::create_dir(&state).unwrap();
        mode(&state, 0o700);
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&state, Some(65534), None).unwrap();
            let refused = check(&state).unwrap_err();
            assert!(
                matches!(refused, StateDirError::Foreign { owner: 65534, .. }),
                "{refused}"
            );
        } else {
            // Only root can change the owner, so as another user only the positive case is checked.
            check(&state).unwrap();
        }
    }

    #[test]
    fn a_file_is_refused() {
        let place = place();
        let state = place.path().join("state");
        fs::write(&state, "").unwrap();
        let refused = secure(&state).unwrap_err();
        assert!(
            matches!(refused, StateDirError::NotADirectory { .. }),
            "{refused}"
        );
    }
}
