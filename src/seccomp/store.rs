//! The captured filters on disk, a file for each kind in a directory of the state directory. Whatever is not exactly what the driver has
//! written is not used, and replaced by the next capture.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nspawn_init::Filter;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::kind::{FileIdentity, Kind};
use crate::sys::replace_file;

/// The directory. Its name can't be that of a task directory.
pub const DIRECTORY: &str = ".seccomp";

/// The form of the files.
const FORM: u32 = 1;

/// Files are about 30 KiB long.
const MAX_BYTES: u64 = 1 << 20;

/// How many kinds are kept: jobs choose capabilities.
pub const MAX_KINDS: usize = 64;

/// Filters that were read from a container of this kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    form: u32,
    kind: Kind,
    /// The libraries that systemd-nspawn had loaded.
    libraries: Vec<FileIdentity>,
    /// The capability bounding set of the container.
    pub bounding: u64,
    /// The programs, the oldest first.
    pub filters: Vec<Filter>,
}

impl Captured {
    pub(super) fn new(
        kind: Kind,
        libraries: Vec<FileIdentity>,
        bounding: u64,
        filters: Vec<Filter>,
    ) -> Self {
        Self {
            form: FORM,
            kind,
            libraries,
            bounding,
            filters,
        }
    }

    /// That of the container from which they come.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.filters.len()).unwrap_or(u32::MAX)
    }

    /// Whether these are the filters that systemd-nspawn would build now for their kind.
    pub fn holds(&self) -> bool {
        self.libraries.iter().all(FileIdentity::holds)
    }

    fn is_complete(&self) -> bool {
        self.form == FORM && !self.filters.is_empty()
    }
}

/// The directory with captured filters.
#[derive(Debug, Clone)]
pub struct Store(PathBuf);

impl Store {
    /// That of this state directory, which has been checked.
    pub fn of(state_dir: &Path) -> Self {
        Self(state_dir.join(DIRECTORY))
    }

    /// The filters of this kind. `None` if there are none that can be used; a file that can't is as good as none.
    pub fn load(&self, kind: &Kind) -> Option<Captured> {
        let path = self.0.join(kind.file_name());
        match self.read(&path) {
            Ok(captured)
                if captured.is_complete() && captured.kind == *kind && captured.holds() =>
            {
                Some(captured)
            }
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let path = path.display();
                tracing::warn!(%path, %error, "captured seccomp filters are not used");
                None
            }
        }
    }

    fn read(&self, path: &Path) -> io::Result<Captured> {
        check(&fs::symlink_metadata(&self.0)?)?;
        let no_link = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let file = File::options()
            .read(true)
            .custom_flags(no_link)
            .open(path)?;
        let about = file.metadata()?;
        check(&about)?;
        if !about.is_file() || about.nlink() != 1 || about.len() > MAX_BYTES {
            return Err(io::Error::other("it is not a file of the driver"));
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        let content = match bytes.split_at_checked(DIGEST_BYTES) {
            Some((digest, content)) if *digest == *Sha256::digest(content) => content,
            _ => return Err(io::Error::other("it is damaged")),
        };
        // The error may quote the content, which is not secret.
        Ok(serde_json::from_slice(content)?)
    }

    /// Keeps filters, in place of earlier ones of their kind.
    pub fn save(&self, captured: &Captured) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        check(&fs::symlink_metadata(&self.0)?)?;
        self.make_room()?;
        let content = packets::encode(captured);
        let name = captured.kind.file_name();
        replace_file(&self.0, &name, &[&Sha256::digest(&content), &content])
    }

    /// Removes everything if there is too much of it.
    fn make_room(&self) -> io::Result<()> {
        if fs::read_dir(&self.0)?.count() >= MAX_KINDS {
            for entry in fs::read_dir(&self.0)? {
                remove_file(&entry?.path())?;
            }
        }
        Ok(())
    }

    /// Removes the filters of this kind.
    pub fn remove(&self, kind: &Kind) -> io::Result<()> {
        remove_file(&self.0.join(kind.file_name()))
    }
}

/// Removes a file. A missing one is success: another process may have removed it.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The length of a SHA-256 digest.
const DIGEST_BYTES: usize = 32;

/// Only the driver's user may have made and may change it.
fn check(about: &fs::Metadata) -> io::Result<()> {
    if about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        let text = "it belongs to another user, or other users can access it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::ContainerSpec;
    use rstest::rstest;
    use std::os::unix::fs::{PermissionsExt, symlink};

    struct Kept {
        temp: tempfile::TempDir,
        store: Store,
        kind: Kind,
        captured: Captured,
    }

    /// Filters that were saved; a library of theirs is `library` in the directory.
    fn kept() -> Kept {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::of(temp.path());
        let library = temp.path().join("library");
        fs::write(&library, "1").unwrap();
        let spec = ContainerSpec::for_test("task", "/tree");
        let kind = Kind::of(&spec, Path::new("/bin/sh")).unwrap().unwrap();
        let filters = vec![Filter(vec![(6, 0, 0, 1)]), Filter(vec![(6, 0, 0, 2)])];
        let libraries = vec![FileIdentity::of(&library).unwrap()];
        let captured = Captured::new(kind.clone(), libraries, 0xff, filters);
        store.save(&captured).unwrap();
        Kept {
            temp,
            store,
            kind,
            captured,
        }
    }

    fn file(kept: &Kept) -> PathBuf {
        kept.store.0.join(kept.kind.file_name())
    }

    #[test]
    fn filters_are_read_back_for_their_kind_alone() {
        let kept = kept();
        assert_eq!(kept.store.load(&kept.kind).as_ref(), Some(&kept.captured));
        let spec = ContainerSpec::for_test("task", "/tree");
        let other = Kind::of(&spec, Path::new("/bin/cat")).unwrap().unwrap();
        assert_eq!(kept.store.load(&other), None);
        fs::rename(file(&kept), kept.store.0.join(other.file_name())).unwrap();
        assert_eq!(kept.store.load(&other), None, "it is of another kind");
        assert_eq!(kept.store.load(&kept.kind), None);
    }

    #[rstest]
    #[case::truncated(|kept: &Kept| {
        let whole = fs::read(file(kept)).unwrap();
        fs::write(file(kept), &whole[..whole.len() - 1]).unwrap();
    })]
    #[case::empty(|kept: &Kept| fs::write(file(kept), "").unwrap())]
    #[case::changed(|kept: &Kept| {
        let mut whole = fs::read(file(kept)).unwrap();
        let last = whole.len() - 5;
        whole[last] ^= 1;
        fs::write(file(kept), whole).unwrap();
    })]
    #[case::writable_by_others(|kept: &Kept| mode(&file(kept), 0o602))]
    #[case::in_a_directory_of_others(|kept: &Kept| mode(&kept.store.0, 0o777))]
    #[case::link(|kept: &Kept| {
        let real = kept.temp.path().join("real");
        fs::rename(file(kept), &real).unwrap();
        symlink(real, file(kept)).unwrap();
    })]
    #[case::two_names(|kept: &Kept| {
        fs::hard_link(file(kept), kept.temp.path().join("second")).unwrap();
    })]
    #[case::directory(|kept: &Kept| {
        fs::remove_file(file(kept)).unwrap();
        fs::create_dir(file(kept)).unwrap();
    })]
    #[case::other_form(|kept: &Kept| {
        let later = Captured { form: FORM + 1, ..kept.captured.clone() };
        kept.store.save(&later).unwrap();
    })]
    #[case::no_filters(|kept: &Kept| {
        let none = Captured { filters: Vec::new(), ..kept.captured.clone() };
        kept.store.save(&none).unwrap();
    })]
    #[case::other_library(|kept: &Kept| fs::write(kept.temp.path().join("library"), "22").unwrap())]
    fn what_the_driver_has_not_written_is_not_used(#[case] change: fn(&Kept)) {
        let kept = kept();
        change(&kept);
        assert_eq!(kept.store.load(&kept.kind), None);
    }

    #[test]
    fn what_can_not_be_used_is_replaced() {
        let kept = kept();
        fs::write(file(&kept), "other").unwrap();
        mode(&file(&kept), 0o666);
        kept.store.save(&kept.captured).unwrap();
        assert!(kept.store.load(&kept.kind).is_some());
        mode(&kept.store.0, 0o777);
        kept.store.save(&kept.captured).unwrap_err();
    }

    #[test]
    fn the_number_of_files_is_limited() {
        let kept = kept();
        for number in 1..MAX_KINDS {
            fs::write(kept.store.0.join(number.to_string()), "").unwrap();
        }
        kept.store.save(&kept.captured).unwrap();
        assert_eq!(fs::read_dir(&kept.store.0).unwrap().count(), 1);
        assert!(kept.store.load(&kept.kind).is_some());
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}
