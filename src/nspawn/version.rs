//! What each version of systemd-nspawn can do: the only table of systemd versions, and the only rule that decides
//! whether a version can be used on a host. The fingerprint and the start of a task both use it. Pure.

use crate::container::CgroupLayout;

/// The oldest supported version.
pub const OLDEST: u32 = 247;

/// What a version of systemd-nspawn added, changed or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// `--setenv=` accepts control characters in a value.
    ControlCharacters,
    /// `--private-users-ownership=`; before it there is only `--private-users-chown`.
    Ownership,
    /// `--private-users=identity`.
    IdentityRange,
    /// `--setenv=NAME` takes the value from the environment of systemd-nspawn, which only root can read.
    HiddenValues,
    /// `--bind=…:idmap`.
    MappedBinds,
    /// `--private-users=managed`.
    ManagedRange,
    /// Cgroup v1 is no longer supported: `/sys/fs/cgroup` itself has to be cgroup v2.
    UnifiedOnly,
}

impl Feature {
    /// Every feature.
    pub const ALL: &[Self] = &[
        Self::ControlCharacters,
        Self::Ownership,
        Self::IdentityRange,
        Self::HiddenValues,
        Self::MappedBinds,
        Self::ManagedRange,
        Self::UnifiedOnly,
    ];

    /// The first version that has it.
    pub const fn since(self) -> u32 {
        match self {
            Self::ControlCharacters => 248,
            Self::Ownership | Self::IdentityRange => 249,
            Self::HiddenValues | Self::MappedBinds => 250,
            Self::ManagedRange | Self::UnifiedOnly => 258,
        }
    }

    /// Whether this version has it.
    pub const fn is_in(self, version: u32) -> bool {
        version >= self.since()
    }
}

/// Why a version can't be used on a host with this cgroup layout, or `None` if it can.
pub fn unusable(version: u32, cgroup: CgroupLayout) -> Option<String> {
    if version < OLDEST {
        return Some(format!(
            "systemd-nspawn {version} is too old: {OLDEST} or later is needed"
        ));
    }
    if Feature::UnifiedOnly.is_in(version) && cgroup != CgroupLayout::V2 {
        return Some(format!(
            "systemd-nspawn {version} needs a host with cgroup v2 only, mounted at /sys/fs/cgroup"
        ));
    }
    None
}

/// Why the systemd of an image, of this version, can't boot on a host with this cgroup layout, or `None` if it can: it no longer supports
/// cgroup v1 from the same version on as systemd-nspawn.
pub fn unbootable(version: u32, cgroup: CgroupLayout) -> Option<String> {
    let refuses = Feature::UnifiedOnly.is_in(version) && cgroup != CgroupLayout::V2;
    refuses.then(|| {
        let last = Feature::UnifiedOnly.since() - 1;
        format!(
            "the image has systemd {version}, which boots only on a host with cgroup v2 only, mounted at /sys/fs/cgroup; on this host {last} and earlier do"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(
        246,
        CgroupLayout::V2,
        Some("systemd-nspawn 246 is too old: 247 or later is needed")
    )]
    #[case(247, CgroupLayout::V1, None)]
    #[case(257, CgroupLayout::Hybrid, None)]
    #[case(257, CgroupLayout::None, None)]
    #[case(258, CgroupLayout::V2, None)]
    #[case(
        258,
        CgroupLayout::Hybrid,
        Some("systemd-nspawn 258 needs a host with cgroup v2 only, mounted at /sys/fs/cgroup")
    )]
    #[case(
        262,
        CgroupLayout::None,
        Some("systemd-nspawn 262 needs a host with cgroup v2 only, mounted at /sys/fs/cgroup")
    )]
    fn an_unusable_version_is_explained(
        #[case] version: u32,
        #[case] cgroup: CgroupLayout,
        #[case] text: Option<&str>,
    ) {
        assert_eq!(unusable(version, cgroup).as_deref(), text);
    }

    /// A version number anywhere else would be a second table.
    #[test]
    fn no_other_file_compares_with_a_version() {
        let sources = [
            ("nspawn/argv.rs", include_str!("argv.rs")),
            ("nspawn/probe.rs", include_str!("probe.rs")),
            (
                "driver/fingerprint.rs",
                include_str!("../driver/fingerprint.rs"),
            ),
        ];
        for (name, text) in sources {
            let code = text.split("#[cfg(test)]").next().unwrap_or(text);
            let code = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"));
            let numbers: Vec<_> = code
                .filter(|line| (OLDEST..=261).any(|version| line.contains(&format!(" {version}"))))
                .collect();
            assert!(numbers.is_empty(), "{name}: {numbers:?}");
        }
    }

    #[test]
    fn every_feature_is_newer_than_the_oldest_version() {
        for feature in Feature::ALL {
            assert!(feature.since() > OLDEST, "{feature:?}");
            assert!(!feature.is_in(feature.since() - 1) && feature.is_in(feature.since()));
        }
    }
}
