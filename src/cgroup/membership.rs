//! Which cgroups a process is in, in the text of `/proc/<pid>/cgroup`.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use super::layout::Layout;

/// The cgroup in the hierarchy with this controller or name, such as `freezer` or `name=systemd`, as a path below its root.
pub(super) fn group_of<'a>(memberships: &'a str, controller: &str) -> Option<&'a str> {
    memberships.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let mut controllers = parts.next()?.split(',');
        controllers
            .any(|name| name == controller)
            .then(|| parts.next())?
    })
}

impl Layout {
    /// The cgroups of a process in the hierarchies of cgroup v1 controllers, by controller, and in the named one that only mirrors cgroup v2,
    /// by `name=systemd`. Fails if one is not there: a process that joined the others alone would escape a limit.
    pub fn version_1_groups(&self, memberships: &str) -> io::Result<BTreeMap<String, PathBuf>> {
        let controllers = self.controllers.iter();
        let controllers = controllers.map(|(name, hierarchy)| (&**name, hierarchy));
        let mirror = self.mirror.iter().map(|mirror| ("name=systemd", mirror));
        let mut groups = BTreeMap::new();
        for (name, hierarchy) in controllers.chain(mirror) {
            let group = group_of(memberships, name).map(|group| group.trim_start_matches('/'));
            let group = group.map(|group| hierarchy.join(group));
            let Some(group) = group.filter(|group| group.is_dir()) else {
                let text = format!(
                    "the control group of {name} is not in {}",
                    hierarchy.display()
                );
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            };
            groups.insert(name.to_owned(), group);
        }
        Ok(groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::CgroupLayout;
    use std::fs;

    const GROUPS: &str =
        "9:cpu,cpuacct:/a\n7:freezer:/nomad/x:y\n1:name=systemd:/b\n2:name=other:/d\n0::/c\n";

    #[test]
    fn a_group_is_found_by_a_whole_name() {
        assert_eq!(group_of(GROUPS, "freezer"), Some("/nomad/x:y"));
        assert_eq!(group_of(GROUPS, "cpuacct"), Some("/a"));
        assert_eq!(group_of(GROUPS, "name=systemd"), Some("/b"));
        assert_eq!(group_of(GROUPS, "systemd"), None);
        assert_eq!(group_of(GROUPS, "cpua"), None);
    }

    #[test]
    fn groups_of_version_1_are_found_in_their_hierarchies() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for group in ["both/a", "frozen/nomad/x:y", "named/b"] {
            fs::create_dir_all(at(group)).unwrap();
        }
        let mut layout = Layout {
            kind: CgroupLayout::Hybrid,
            tracking: Some(at("unified")),
            mirror: Some(at("named")),
            controllers: [("cpu", "both"), ("cpuacct", "both"), ("freezer", "frozen")]
                .map(|(name, hierarchy)| (name.to_owned(), at(hierarchy)))
                .into(),
        };
        let wanted = [
            ("cpu", "both/a"),
            ("cpuacct", "both/a"),
            ("freezer", "frozen/nomad/x:y"),
            ("name=systemd", "named/b"),
        ];
        let wanted = wanted.map(|(name, group)| (name.to_owned(), at(group)));
        assert_eq!(layout.version_1_groups(GROUPS).unwrap(), wanted.into());
        layout.controllers.insert("pids".to_owned(), at("pids"));
        let error = layout.version_1_groups(GROUPS).unwrap_err().to_string();
        assert!(error.contains("pids"), "{error}");
    }
}
