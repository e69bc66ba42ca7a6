//! The ids of a container: picks its range where the job leaves that open, and tells whether the driver or only systemd-nspawn knows it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use super::prepare::Host;
use crate::backend::BackendError;
use crate::container::{Cause, ContainerSpec, Root, Users};
use crate::lease::{SharedLocks, UidRange};
use crate::mounts::{IdRange, PICKED_IDS};
use crate::nspawn::refusal::cause_of_host_error;
use crate::nspawn::version::Feature;
use crate::sys::kernel;

/// The ids of a container, resolved as far as the driver can do that.
#[derive(Debug)]
pub(super) struct Ids {
    /// The user namespace as systemd-nspawn gets it.
    pub(super) users: Users,
    /// The range that was picked, and its lock.
    pub(super) picked: Option<(UidRange, SharedLocks)>,
    /// How mounts are made.
    pub(super) how: How,
}

/// How the mounts of a container are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// By the exec shim, with these ids; `None` are those of the host.
    Shim(Option<IdRange>),
    /// By the exec shim, and mapped by systemd-nspawn, which alone knows the ids.
    MappedByNspawn,
    /// By systemd-nspawn, because this process is not allowed to mount anything.
    Nspawn,
}

impl Ids {
    /// Resolves the ids of this container.
    pub(super) fn of(spec: &ContainerSpec, host: &Host) -> Result<Self, BackendError> {
        let users = spec.users.clone();
        let known = |users, how| {
            Ok(Self {
                users,
                picked: None,
                how,
            })
        };
        if !kernel::may_mount() {
            return known(users, How::Nspawn);
        }
        let Users::Private { range, ownership } = &users else {
            return known(users, How::Shim(None));
        };
        match range.as_str() {
            "pick" => Self::pick(spec, ownership.clone(), host),
            // They are those of the host.
            "identity" => known(users, How::Shim(None)),
            range => {
                let ids = match range {
                    "yes" => owner_of(&spec.rootfs.source).map(|owner| IdRange {
                        first: owner - owner % PICKED_IDS,
                        count: PICKED_IDS,
                    }),
                    range => numbers(range),
                };
                match ids {
                    Some(IdRange { first: 0, .. }) => known(users, How::Shim(None)),
                    Some(ids) => {
                        let own = base_of(&spec.rootfs.source) == Some(ids.first);
                        let keeps = own && ownership.as_deref() == Some("auto");
                        let mut users = users;
                        if keeps {
                            set_ownership_off(&mut users);
                        }
                        known(users, How::Shim(Some(ids)))
                    }
                    None => known(users, How::MappedByNspawn),
                }
            }
        }
    }

    fn pick(
        spec: &ContainerSpec,
        ownership: Option<String>,
        host: &Host,
    ) -> Result<Self, BackendError> {
        let owner = owner_of(&spec.rootfs.source);
        let machine = &spec.identity.machine;
        let changes_owners = ownership.as_deref() == Some("chown");
        let picked =
            UidRange::pick(owner, !changes_owners, machine).map_err(|error| BackendError::Start {
                machine: machine.clone(),
                step: "picking a range of user ids",
                cause: match error.kind() {
                    io::ErrorKind::ResourceBusy => Cause::Busy,
                    io::ErrorKind::InvalidInput => Cause::Config,
                    _ => cause_of_host_error(&error),
                },
                reason: error.to_string(),
            });
        let (first, lock) = picked?;
        // What `pick` means where nothing else is set.
        let usual = match Feature::Ownership.is_in(host.version) {
            true => "auto",
            false => "chown",
        };
        let usual = match base_of(&spec.rootfs.source) {
            Some(base) if base == first => "off",
            _ => usual,
        };
        let ownership = ownership.filter(|how| how != "auto");
        let count = PICKED_IDS;
        let range = UidRange { first: Some(first) };
        Ok(Self {
            users: Users::Private {
                range: format!("{first}:{count}"),
                ownership: Some(ownership.unwrap_or_else(|| usual.to_owned())),
            },
            picked: Some((range, lock)),
            how: How::Shim(Some(IdRange { first, count })),
        })
    }
}

/// The user to whom a root directory belongs.
fn owner_of(root: &Root) -> Option<u32> {
    match root {
        Root::Directory(root) => fs::metadata(root).ok().map(|root| root.uid()),
        Root::Image(_) => None,
    }
}

/// `FIRST[:COUNT]`
fn numbers(range: &str) -> Option<IdRange> {
    let (first, count) = match range.split_once(':') {
        None => (range, None),
        Some((first, count)) => (first, Some(count)),
    };
    Some(IdRange {
        first: first.parse().ok()?,
        count: count.map_or(Some(PICKED_IDS), |count| count.parse().ok())?,
    })
}

/// The first id of the range that a root directory belongs to. systemd-nspawn itself notices only for a range that it has picked that the files of the
/// root have their owners already.
pub(super) fn base_of(root: &Root) -> Option<u32> {
    owner_of(root).map(|owner| owner - owner % PICKED_IDS)
}

pub(super) fn set_ownership_off(users: &mut Users) {
    if let Users::Private { ownership, .. } = users {
        *ownership = Some("off".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_number_and_perhaps_a_count() {
        let range = |first, count| Some(IdRange { first, count });
        assert_eq!(numbers("1048576"), range(1_048_576, 65_536));
        assert_eq!(numbers("1048576:131072"), range(1_048_576, 131_072));
        for word in ["yes", "managed", "", "1:x"] {
            assert_eq!(numbers(word), None);
        }
    }
}
