//! Which ranges of ids to try for a container, and which ids of the host belong to somebody else: users and groups, and the ranges that an
//! administrator has given to them for their own containers.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash as _, Hasher as _};

use super::{FIRST, IDS, LAST};

/// Ids that are in use.
#[derive(Debug, Default)]
pub(super) struct TakenIds {
    /// The first and the last id of each range.
    ranges: Vec<(u32, u32)>,
}

impl TakenIds {
    /// Those of the users and the groups of this host, as far as they are in its files. One that can't be read names none.
    pub(super) fn of_accounts() -> Self {
        let mut taken = Self::default();
        for file in ["/etc/passwd", "/etc/group"] {
            taken.add_accounts(&fs::read_to_string(file).unwrap_or_default());
        }
        taken
    }

    /// The same with the subordinate ids.
    pub(super) fn of_host() -> Self {
        let mut taken = Self::of_accounts();
        for file in ["/etc/subuid", "/etc/subgid"] {
            taken.add_subordinate(&fs::read_to_string(file).unwrap_or_default());
        }
        taken
    }

    /// `NAME:PASSWORD:ID:…`
    fn add_accounts(&mut self, text: &str) {
        let ids = text
            .lines()
            .filter_map(|line| line.split(':').nth(2)?.parse().ok());
        self.ranges.extend(ids.map(|id| (id, id)));
    }

    /// `NAME:FIRST:COUNT`. What root may use is for its containers, of which this is one.
    fn add_subordinate(&mut self, text: &str) {
        let ranges = text.lines().filter_map(|line| {
            let mut words = line.split(':');
            if matches!(words.next()?.trim(), "root" | "0") {
                return None;
            }
            let first: u32 = words.next()?.trim().parse().ok()?;
            let count: u32 = words.next()?.trim().parse().ok()?;
            Some((first, first.saturating_add(count.checked_sub(1)?)))
        });
        self.ranges.extend(ranges);
    }

    /// Whether none of these ids is in use.
    pub(super) fn is_free(&self, first: u32, count: u32) -> bool {
        let last = first.saturating_add(count - 1);
        let mut ranges = self.ranges.iter();
        !ranges.any(|(from, to)| *from <= last && first <= *to)
    }
}

/// The first ids of the ranges to try for a machine, without end: in an order that depends on its name alone, and is another one for another name.
pub(super) fn candidates(machine: &str) -> impl Iterator<Item = u32> {
    (0_u32..).map(move |attempt| {
        let mut hasher = DefaultHasher::new();
        (machine, attempt).hash(&mut hasher);
        let ranges = u64::from((LAST - FIRST) / IDS) + 1;
        // Less than the number of ranges, so it fits.
        let index = u32::try_from(hasher.finish() % ranges).unwrap_or_default();
        FIRST + index * IDS
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_users_and_subordinate_ranges_are_not_free() {
        let mut taken = TakenIds::default();
        taken.add_accounts("root:x:0:0::/root:/bin/sh\nbroken\nldap:x:1000000:7:::\n");
        taken.add_subordinate("root:1:4294967294\n0:1:4294967294\nuser:2000000:65536\nempty:5:0\nbroken:x:y\nend:4294967295:10\n");
        for (first, free) in [
            (524_288, true),
            (1_000_000 - 65_536, true),
            (1_000_000 - 65_535, false),
            (1_000_000, false),
            (1_000_001, true),
            (1_934_464, true),
            (1_934_465, false),
            (2_065_535, false),
            (2_065_536, true),
        ] {
            assert_eq!(taken.is_free(first, 65_536), free, "{first}");
        }
    }

    #[test]
    fn candidates_begin_ranges_and_differ_by_name() {
        let of = |name| candidates(name).take(5).collect::<Vec<_>>();
        assert_eq!(of("web"), of("web"));
        assert_ne!(of("web"), of("db"));
        assert!(
            of("web")
                .iter()
                .all(|first| first % IDS == 0 && (FIRST..=LAST).contains(first))
        );
    }
}
