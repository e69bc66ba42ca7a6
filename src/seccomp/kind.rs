//! What the filters of systemd-nspawn depend on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::container::{ContainerSpec, Mode, NetworkNamespace, Users};
use crate::sys::kernel;

/// Everything that decides which filters systemd-nspawn builds and is known before it is started. The libraries that it has loaded are known
/// only then: they are kept with the filters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Kind {
    /// systemd-nspawn itself.
    pub(super) program: FileIdentity,
    /// Release and build of the kernel.
    kernel: [String; 2],
    architecture: String,
    /// The capabilities that the job adds to those of systemd-nspawn.
    capabilities: BTreeSet<String>,
    /// With a network of its own a container has `CAP_NET_ADMIN`.
    private_network: bool,
    /// systemd-nspawn takes other capabilities from a container with a user namespace than from one without.
    users: UserIds,
}

/// How the ids of a container are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum UserIds {
    Host,
    Identity,
    Mapped,
}

impl Kind {
    /// That of a container which this program is to start. `None` if the container init can't install its filters: it runs only without
    /// `boot`, and needs `CAP_SYS_ADMIN` in the container, which it has as root only.
    pub fn of(spec: &ContainerSpec, program: &Path) -> io::Result<Option<Self>> {
        if spec.payload.mode == Mode::Boot || spec.payload.user.is_some() {
            return Ok(None);
        }
        Ok(Some(Self {
            program: FileIdentity::of(program)?,
            kernel: kernel::build()?,
            architecture: std::env::consts::ARCH.to_owned(),
            capabilities: spec.payload.capabilities.iter().cloned().collect(),
            private_network: matches!(spec.network.namespace, NetworkNamespace::Private { .. }),
            users: match &spec.users {
                Users::Host => UserIds::Host,
                Users::Private { range, .. } if range == "identity" => UserIds::Identity,
                Users::Private { .. } => UserIds::Mapped,
            },
        }))
    }

    /// The name of the file with its filters.
    pub(super) fn file_name(&self) -> String {
        use std::fmt::Write as _;
        let digest = Sha256::digest(packets::encode(self));
        digest.iter().fold(String::new(), |mut name, byte| {
            let _ = write!(name, "{byte:02x}");
            name
        })
    }
}

/// A file that was not changed or replaced as long as all of this is the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct FileIdentity {
    pub(super) path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    /// That of the file to which this path leads.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Self::through(path, path)
    }

    /// That of the file to which a link of the kernel leads, under the path by which other processes find it.
    pub(super) fn through(link: &Path, path: &Path) -> io::Result<Self> {
        let about = fs::metadata(link)?;
        Ok(Self {
            path: path.to_owned(),
            device: about.dev(),
            inode: about.ino(),
            size: about.size(),
            modified: (about.mtime(), about.mtime_nsec()),
            changed: (about.ctime(), about.ctime_nsec()),
        })
    }

    /// Whether the path still leads to this file, and the file is unchanged.
    pub(super) fn holds(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Link;
    use std::os::unix::fs::symlink;

    fn kind(change: impl FnOnce(&mut ContainerSpec)) -> Option<Kind> {
        let spec = ContainerSpec::for_test("task", "/tree").with(change);
        Kind::of(&spec, Path::new("/bin/sh")).unwrap()
    }

    #[test]
    fn what_decides_about_filters_is_in_the_kind() {
        let name = |change: fn(&mut ContainerSpec)| kind(change).unwrap().file_name();
        let plain = name(|_| {});
        assert_eq!(plain.len(), 64);
        assert_eq!(name(|spec| spec.payload.mode = Mode::ProcessTwo), plain);
        assert_eq!(name(|spec| spec.identity.machine = "other".into()), plain);
        let added = name(|spec| spec.payload.capabilities = vec!["CAP_SYS_TIME".into()]);
        let private = name(|spec| {
            spec.network.namespace = NetworkNamespace::Private {
                link: Link::None,
                ports: Vec::new(),
                interfaces: Vec::new(),
            };
        });
        let users = ["pick", "identity"].map(|range| {
            let change = |spec: &mut ContainerSpec| {
                spec.users = Users::Private {
                    range: range.into(),
                    ownership: None,
                };
            };
            kind(change).unwrap().file_name()
        });
        assert!(users[0] != plain && users[1] != plain && users[0] != users[1]);
        assert_ne!(added, plain);
        assert_ne!(private, plain);
    }

    #[test]
    fn filters_that_the_init_can_not_install_are_those_of_nspawn() {
        assert_eq!(kind(|spec| spec.payload.mode = Mode::Boot), None);
        assert_eq!(kind(|spec| spec.payload.user = Some("web".into())), None);
        let spec = ContainerSpec::for_test("task", "/tree");
        Kind::of(&spec, Path::new("/no/such/program")).unwrap_err();
    }

    #[test]
    fn a_file_that_was_changed_or_replaced_is_another() {
        let temp = tempfile::tempdir().unwrap();
        let (file, other) = (temp.path().join("a"), temp.path().join("b"));
        let link = temp.path().join("link");
        fs::write(&file, "1").unwrap();
        fs::write(&other, "1").unwrap();
        symlink("a", &link).unwrap();
        let known = FileIdentity::of(&link).unwrap();
        assert!(known.holds());
        fs::remove_file(&link).unwrap();
        symlink("b", &link).unwrap();
        assert!(!known.holds());
        let known = FileIdentity::of(&file).unwrap();
        fs::write(&file, "23").unwrap();
        assert!(!known.holds());
        fs::remove_file(&file).unwrap();
        assert!(!known.holds());
    }
}
