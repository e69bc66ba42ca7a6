//! The limits of cgroups as the kernel shows them, to be compared before and after an event.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The contents of the files of some cgroups that hold a limit, by path.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Dump(BTreeMap<PathBuf, String>);

impl Dump {
    /// The limits of these cgroups. One that does not exist has none.
    pub fn of(groups: impl IntoIterator<Item = PathBuf>) -> Self {
        let groups = groups.into_iter();
        Self(groups.flat_map(|group| files(&group)).collect())
    }

    /// Whether one of the files has one of these names.
    pub fn has(&self, names: &[&str]) -> bool {
        let mut found = self.0.keys().filter_map(|path| path.file_name()?.to_str());
        found.any(|name| names.contains(&name))
    }

    /// The differences to a later dump, one per line; empty if there are none.
    pub fn differences(&self, later: &Self) -> String {
        let paths = self.0.keys().chain(later.0.keys());
        let mut lines: Vec<_> = paths
            .filter(|path| self.0.get(*path) != later.0.get(*path))
            .map(|path| {
                let (before, after) = (self.0.get(path), later.0.get(path));
                format!("{}: {before:?}, then {after:?}", path.display())
            })
            .collect();
        lines.sort();
        lines.dedup();
        lines.join("\n")
    }
}

fn files(group: &Path) -> BTreeMap<PathBuf, String> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        let writable = entry.metadata().ok()?.permissions().mode() & 0o222 != 0;
        let text = is_limit(&name, writable).then(|| fs::read_to_string(entry.path()).ok())??;
        Some((entry.path(), text))
    };
    entries.filter_map(read).collect()
}

/// Whether a file of a group holds a limit. Writable are also counters that can be reset, and requests to the kernel.
fn is_limit(name: &str, writable: bool) -> bool {
    const CONTROLLERS: [&str; 6] = ["memory.", "cpu.", "pids.", "cpuset.", "io.", "hugetlb."];
    const OTHERS: [&str; 6] = [
        "usage",
        "failcnt",
        "peak",
        "pressure",
        "reclaim",
        "force_empty",
    ];
    if name == "devices.list" || name.starts_with("cgroup.max.") {
        return true;
    }
    writable
        && CONTROLLERS.iter().any(|prefix| name.starts_with(prefix))
        && !OTHERS.iter().any(|word| name.contains(word))
}
