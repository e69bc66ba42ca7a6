//! The cgroups of sessions. A session has one of its own in the hierarchy that tracks processes, inside the container's, so that its limits
//! hold and its processes are counted: the kernel accepts no process in the container's cgroup itself once an init has enabled controllers
//! there. In cgroup v1 it joins the groups of the container's first process.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nspawn_init::session_spec::SessionCgroups;

use crate::cgroup::{Group, Layout};
use crate::container::Started;
use crate::sys::process::ProcessHandle;

/// The cgroup that systemd-nspawn makes for the container's processes.
const PAYLOAD: &str = "payload";

/// The names of sessions' cgroups. systemd in the container takes one for a scope that it has not made.
const PREFIX: &str = "nomad-exec-";
const SUFFIX: &str = ".scope";

/// Read once: a host whose cgroup hierarchies change loses the cgroups of its tasks.
static LAYOUT: LazyLock<Layout> = LazyLock::new(Layout::of_this_host);

/// The cgroups of a session that is being started. Dropping it removes those that were made for it.
#[derive(Debug, Default)]
pub(super) struct SessionGroups(SessionCgroups);

impl SessionGroups {
    /// Makes the cgroups of a new session in this container, none if it was started without. After an error nothing of them is left. Blocks.
    /// Fails with [`io::ErrorKind::NotFound`] if the container has ended.
    pub(super) fn create(started: &Started, leader: &ProcessHandle) -> io::Result<Self> {
        let memberships = fs::read_to_string(format!("/proc/{}/cgroup", leader.process().pid));
        // Otherwise the pid could be that of another process by now.
        if leader.wait(std::time::Duration::ZERO) {
            return Err(io::ErrorKind::NotFound.into());
        }
        match &started.cgroup {
            Some(group) => Self::create_in(&LAYOUT, group, &memberships?),
            None => Ok(Self::default()),
        }
    }

    fn create_in(layout: &Layout, group: &Path, memberships: &str) -> io::Result<Self> {
        let mut groups = Self::default();
        let mut joined = layout.version_1_groups(memberships)?;
        let payload = Group::new(group).child(PAYLOAD);
        // It is missing for a moment at the start.
        let parent = Some(payload).filter(|payload| payload.path().is_dir());
        let own = groups.create_own(&parent.unwrap_or_else(|| Group::new(group)))?;
        if layout.tracks_in_version_2() {
            groups.0.unified = Some(own);
        } else {
            groups.0.joined.push(own);
        }
        // Nomad stops what it runs outside of cgroup v2 by the freezer.
        if let Some(shared) = joined.get("freezer").cloned() {
            let own = groups.create_own(&Group::new(&shared))?;
            // Other controllers may be in the same hierarchy.
            for group in joined.values_mut().filter(|group| **group == shared) {
                group.clone_from(&own);
            }
        }
        let joined: BTreeSet<PathBuf> = joined.into_values().collect();
        groups.0.joined.extend(joined);
        Ok(groups)
    }

    /// Makes a cgroup that only this session uses.
    fn create_own(&mut self, parent: &Group) -> io::Result<PathBuf> {
        static CREATED: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = CREATED.fetch_add(1, Ordering::Relaxed);
            let name = format!("{PREFIX}{}-{number}{SUFFIX}", std::process::id());
            match parent.create_child(&name) {
                // Left by an earlier process with the same pid.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => {
                    let own = created?.path().to_owned();
                    self.0.own.push(own.clone());
                    return Ok(own);
                }
            }
        }
    }

    pub(super) fn cgroups(&self) -> &SessionCgroups {
        &self.0
    }

    /// Leaves the cgroups to the session, which removes them when it ends.
    pub(super) fn hand_over(mut self) -> SessionCgroups {
        std::mem::take(&mut self.0)
    }
}

impl Drop for SessionGroups {
    fn drop(&mut self) {
        for own in &self.0.own {
            // With the container's, if it can't be removed now.
            let _ = fs::remove_dir(own);
        }
    }
}

/// Kills every process of every session in this container. Returns when the signals are sent. Blocks.
pub fn kill_sessions(started: &Started) {
    let Some(group) = started.cgroup.as_deref().map(Group::new) else {
        return;
    };
    for parent in [group.child(PAYLOAD), group] {
        let groups = parent.children().into_iter();
        groups.filter(is_session).for_each(|group| group.kill());
    }
}

fn is_session(group: &Group) -> bool {
    let name = group.path().file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::CgroupLayout;
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;

    /// Directories in place of hierarchies.
    struct Host {
        root: tempfile::TempDir,
        layout: Layout,
    }

    impl Host {
        fn new(kind: CgroupLayout, controllers: &[(&str, &str)]) -> Self {
            let root = tempfile::tempdir().unwrap();
            let at = |name: &str| root.path().join(name);
            let controllers = controllers.iter();
            let controllers: BTreeMap<String, PathBuf> = controllers
                .map(|(name, hierarchy)| ((*name).to_owned(), at(hierarchy)))
                .collect();
            let layout = Layout {
                kind,
                tracking: Some(at("tracking")),
                mirror: Some(at("named")).filter(|_| kind == CgroupLayout::Hybrid),
                controllers,
            };
            Self { root, layout }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn with(self, groups: &[&str]) -> Self {
            for group in groups {
                fs::create_dir_all(self.at(group)).unwrap();
            }
            self
        }

        fn create(&self, memberships: &str) -> io::Result<SessionGroups> {
            SessionGroups::create_in(&self.layout, &self.at("tracking/start"), memberships)
        }

        /// How many cgroups of sessions there are.
        fn count(&self) -> usize {
            let mut pending = vec![Group::new(self.root.path())];
            let mut count = 0;
            while let Some(group) = pending.pop() {
                count += usize::from(is_session(&group));
                pending.extend(group.children());
            }
            count
        }
    }

    fn assert_own(own: &Path, parent: &Path) {
        assert_eq!(own.parent(), Some(parent));
        assert!(is_session(&Group::new(own)));
        let mode = fs::metadata(own).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755, "{own:?}");
    }

    #[test]
    fn with_version_2_a_session_has_one_of_its_own() {
        let host = Host::new(CgroupLayout::V2, &[]).with(&["tracking/start"]);
        let early = host.create("0::/start\n").unwrap().hand_over();
        assert_own(&early.own[0], &host.at("tracking/start"));
        let payload = host.at("tracking/start/payload");
        fs::create_dir(&payload).unwrap();
        let [first, second] = [(); 2].map(|()| host.create("0::/start\n").unwrap().hand_over());
        for groups in [&first, &second] {
            let unified = groups.unified.as_ref().unwrap();
            assert_own(unified, &payload);
            assert_eq!(
                (&groups.own, &groups.joined),
                (&vec![unified.clone()], &vec![])
            );
        }
        assert_ne!(first, second);
    }

    #[test]
    fn with_version_1_controllers_a_session_joins_the_first_process() {
        let controllers = [("cpu", "both"), ("cpuacct", "both"), ("freezer", "frozen")];
        let groups = [
            "tracking/start/payload",
            "named/x/payload",
            "both/x",
            "frozen/x/init",
        ];
        let host = Host::new(CgroupLayout::Hybrid, &controllers).with(&groups);
        let text = "3:cpu,cpuacct:/x\n2:freezer:/x/init\n1:name=systemd:/x/payload\n0::/start/p\n";
        let groups = host.create(text).unwrap().hand_over();
        let [tracked, frozen] = &groups.own[..] else {
            panic!("{groups:?}")
        };
        assert_own(tracked, &host.at("tracking/start/payload"));
        assert_own(frozen, &host.at("frozen/x/init"));
        assert_eq!(groups.unified.as_ref(), Some(tracked));
        let mut wanted = vec![
            host.at("both/x"),
            frozen.clone(),
            host.at("named/x/payload"),
        ];
        wanted.sort();
        assert_eq!(groups.joined, wanted);
    }

    #[test]
    fn with_version_1_alone_the_session_joins_its_own_in_the_named_hierarchy() {
        let controllers = [("cpu", "shared"), ("freezer", "shared")];
        let groups = ["tracking/start/payload", "shared/x"];
        let host = Host::new(CgroupLayout::V1, &controllers).with(&groups);
        let text = "2:cpu,freezer:/x\n1:name=systemd:/start/payload\n";
        let groups = host.create(text).unwrap().hand_over();
        assert_eq!(groups.unified, None);
        assert_eq!(groups.joined, groups.own);
        assert_own(&groups.own[0], &host.at("tracking/start/payload"));
        assert_own(&groups.own[1], &host.at("shared/x"));
    }

    #[test]
    fn nothing_is_left_of_a_session_that_does_not_start() {
        let groups = ["tracking/start/payload", "named/x", "frozen/x"];
        let controllers = [("freezer", "frozen")];
        let host = Host::new(CgroupLayout::Hybrid, &controllers).with(&groups);
        let text = "2:freezer:/x\n1:name=systemd:/x\n0::/start\n";
        let groups = host.create(text).unwrap();
        assert_eq!(host.count(), 2);
        drop(groups);
        assert_eq!(host.count(), 0);
        // The second can't be made.
        fs::remove_dir(host.at("frozen/x")).unwrap();
        fs::write(host.at("frozen/x"), "").unwrap();
        host.create(text).unwrap_err();
        assert_eq!(host.count(), 0);
        let gone = host
            .create("2:freezer:/gone\n1:name=systemd:/x\n")
            .unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }
}
