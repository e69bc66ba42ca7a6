//! The device policy of one start: where it is, and how it is put in force.
//!
//! systemd-nspawn itself needs more devices than the container. In cgroup v2 it is not in the cgroup of the payload, so that is where the
//! policy is: the supervisor makes that cgroup beforehand, and systemd-nspawn takes one that exists. In cgroup v1 both are in the cgroup of
//! the start, so the policy allows what systemd-nspawn needs until the container is up.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::devices::{self, DeviceRules, Rule};
use super::group::Group;
use super::layout::{Layout, Place};
use super::limits::{Limit, Unenforced};
use crate::sys::bpf;

/// The cgroup that a policy is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Home {
    /// That of the start, in the hierarchy of the devices controller.
    #[serde(rename = "version_1")]
    Version1(PathBuf),
    /// That of the payload.
    #[serde(rename = "version_2")]
    Version2(PathBuf),
}

/// What the container may use, and where that is enforced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DevicePolicy {
    home: Home,
    container: Vec<Rule>,
    /// In cgroup v1: what systemd-nspawn may use beyond that until the container is up.
    #[serde(default)]
    only_nspawn: Vec<Rule>,
}

impl DevicePolicy {
    pub(super) fn new(place: &Place, rules: &DeviceRules) -> Result<Self, Unenforced> {
        let (home, only_nspawn) = match place.controllers.get("devices") {
            Some(group) => (Home::Version1(group.clone()), rules.only_nspawn()),
            None if place.version_2 => (Home::Version2(place.payload()), Vec::new()),
            None => {
                return Err(unenforced(
                    "this host has neither a devices controller nor cgroup v2",
                ));
            }
        };
        Ok(Self {
            home,
            container: rules.container(),
            only_nspawn,
        })
    }

    /// Puts the policy in force, before systemd-nspawn is started. In cgroup v1 the cgroup exists.
    pub(super) fn enforce(&self) -> Result<(), Unenforced> {
        match &self.home {
            Home::Version1(group) => {
                let rules = self.container.iter().chain(&self.only_nspawn);
                allow(group, rules)
            }
            Home::Version2(payload) => attach(payload, &self.container),
        }
    }

    /// Whether systemd-nspawn may use more until the container is up.
    pub(super) fn changes(&self) -> bool {
        !self.only_nspawn.is_empty()
    }

    /// Takes from the container what only systemd-nspawn needed. What is open stays open.
    pub(super) fn settle(&self) -> Result<(), Unenforced> {
        match &self.home {
            Home::Version1(group) if self.changes() => {
                let file = group.join("devices.deny");
                let denied = open(&file).and_then(|mut deny| {
                    let mut rules = self.only_nspawn.iter();
                    rules.try_for_each(|rule| deny.write_all(line(rule).as_bytes()))
                });
                denied.map_err(|error| unwritten(&file, &error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether this host can enforce a device policy, as far as that is known without a container.
pub fn has_device_policy(layout: &Layout) -> bool {
    layout.controllers.contains_key("devices")
        || layout.tracks_in_version_2() && bpf::load_device_filter(&devices::program(&[])).is_ok()
}

/// Denies everything but these devices in a cgroup of cgroup v1.
fn allow<'a>(group: &Path, rules: impl Iterator<Item = &'a Rule>) -> Result<(), Unenforced> {
    let file = group.join("devices.deny");
    open(&file)
        .and_then(|mut deny| deny.write_all(b"a\n"))
        .map_err(|error| unwritten(&file, &error))?;
    let file = group.join("devices.allow");
    let allowed = open(&file).and_then(|mut allow| {
        for rule in rules {
            match allow.write_all(line(rule).as_bytes()) {
                // The cgroup above does not have the device either, such as in a driver that runs in a container itself.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                other => other?,
            }
        }
        Ok(())
    });
    allowed.map_err(|error| unwritten(&file, &error))
}

fn line(rule: &Rule) -> String {
    format!("{rule}\n")
}

/// Makes the cgroup of the payload, and attaches a program to it that allows only these devices. It ends with the cgroup.
fn attach(payload: &Path, rules: &[Rule]) -> Result<(), Unenforced> {
    let made = Group::new(payload)
        .create()
        // Against the umask of the supervisor: in a container with a user namespace root is another user.
        .and_then(|()| fs::set_permissions(payload, fs::Permissions::from_mode(0o755)))
        .and_then(|()| File::open(payload));
    let cgroup =
        made.map_err(|error| unenforced(format!("{} can't be made: {error}", payload.display())))?;
    let program = bpf::load_device_filter(&devices::program(rules)).map_err(|error| {
        unenforced(format!(
            "the kernel refuses a BPF program for them: {error}"
        ))
    })?;
    bpf::attach_device_filter(program.as_fd(), cgroup.as_fd()).map_err(|error| {
        let payload = payload.display();
        unenforced(format!(
            "a BPF program can't be attached to {payload}: {error}"
        ))
    })
}

/// Opens a file of a cgroup, which must exist: the kernel makes these files. Each write to it is one command.
fn open(file: &Path) -> io::Result<File> {
    fs::OpenOptions::new().write(true).open(file)
}

fn unwritten(file: &Path, error: &io::Error) -> Unenforced {
    unenforced(format!("{} can't be written: {error}", file.display()))
}

fn unenforced(reason: impl Into<String>) -> Unenforced {
    Unenforced {
        limit: Limit::Devices,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use crate::cgroup::CgroupPath;
    use crate::container::Root;

    fn place(group: &Path, controllers: &[&str], version_2: bool) -> Place {
        let own = |name: &&str| ((*name).to_owned(), group.to_owned());
        Place {
            tracking: CgroupPath {
                group: group.to_owned(),
                mirror: None,
            },
            version_2,
            granted: false,
            controllers: controllers.iter().map(own).collect::<BTreeMap<_, _>>(),
        }
    }

    /// A cgroup with the files of the devices controller; returns what has been written to them.
    fn written(rules: &DeviceRules) -> [String; 3] {
        let temp = tempfile::tempdir().unwrap();
        let group = temp.path();
        let [deny, allow] = ["devices.deny", "devices.allow"].map(|name| group.join(name));
        for file in [&deny, &allow] {
            fs::write(file, "").unwrap();
        }
        let policy = DevicePolicy::new(&place(group, &["devices"], true), rules).unwrap();
        policy.enforce().unwrap();
        let at_start = [&deny, &allow].map(|file| fs::read_to_string(file).unwrap());
        fs::write(&deny, "").unwrap();
        policy.settle().unwrap();
        let [denied, allowed] = at_start;
        [denied, allowed, fs::read_to_string(&deny).unwrap()]
    }

    #[test]
    fn version_1_denies_everything_and_then_allows_what_is_listed() {
        let [deny, allow, settled] = written(&DeviceRules::default());
        assert_eq!(deny, "a\n");
        assert!(
            allow.starts_with("b 0:0 rwm\nc 0:0 rwm\nc 1:3 rwm\n"),
            "{allow}"
        );
        assert_eq!(allow.lines().count(), devices::EVERY_CONTAINER.len());
        assert_eq!(settled, "");
    }

    #[test]
    fn version_1_takes_the_devices_of_systemd_nspawn_away_once_the_container_is_up() {
        let image = Root::Image("/no/such/disk.raw".into());
        let [_, allow, settled] = written(&DeviceRules::new(&[], &[], &image));
        for line in ["b 7:* rw", "c 10:237 rw"] {
            assert!(allow.lines().any(|it| it == line), "{allow}");
            assert!(settled.lines().any(|it| it == line), "{settled}");
        }
        assert!(!settled.contains("rwm"), "{settled}");
    }

    #[test]
    fn what_can_t_be_enforced_is_named_with_the_reason() {
        let temp = tempfile::tempdir().unwrap();
        let rules = DeviceRules::default();
        let none = DevicePolicy::new(&place(temp.path(), &[], false), &rules).unwrap_err();
        assert_eq!(none.limit, Limit::Devices);
        assert!(
            none.reason
                .contains("neither a devices controller nor cgroup v2")
        );
        let version_1 = DevicePolicy::new(&place(temp.path(), &["devices"], false), &rules);
        let refused = version_1.unwrap().enforce().unwrap_err();
        assert!(
            refused
                .reason
                .contains("devices.deny can't be written: No such file"),
            "{}",
            refused.reason
        );
        // Not a cgroup, or this process may not load programs.
        let version_2 = DevicePolicy::new(&place(temp.path(), &[], true), &rules).unwrap();
        let refused = version_2.enforce().unwrap_err();
        assert!(refused.reason.contains("BPF program"), "{}", refused.reason);
    }

    /// A cgroup of the test, removed at the end.
    struct OwnGroup(Group);

    impl Drop for OwnGroup {
        fn drop(&mut self) {
            self.0.kill();
            assert!(self.0.wait_empty(std::time::Duration::from_secs(60)));
            self.0.remove().unwrap();
        }
    }

    /// The kernel accepts the program and asks it, also beside one that allows more.
    #[expect(
        clippy::disallowed_methods,
        reason = "the test needs a process in the cgroup"
    )]
    #[test]
    fn version_2_lets_a_process_open_only_what_is_listed() {
        let layout = Layout::of_this_host();
        let top = layout.tracking.clone();
        let top = top.filter(|_| nix::unistd::geteuid().is_root() && layout.tracks_in_version_2());
        let Some(top) = top else {
            return support::not_applicable("needs root and cgroup v2");
        };
        assert!(has_device_policy(&layout));
        let name = format!("device-policy-test-{}", std::process::id());
        let own = OwnGroup(Group::new(top.join(name)));
        let place = place(own.0.path(), &[], true);
        let all = DeviceRules::new(&[], &[bound("/dev/loop-control")], &directory());
        let script = r#"echo 0 > "$0/cgroup.procs"
            for node in /dev/null /dev/loop-control; do (: < "$node") 2>&1; done"#;
        let run = || {
            let mut shell = std::process::Command::new("sh");
            let shell = shell.args(["-c", script]).arg(place.payload());
            let output = shell.env("LC_ALL", "C").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        DevicePolicy::new(&place, &all).unwrap().enforce().unwrap();
        assert_eq!(run(), "");
        let usual = DevicePolicy::new(&place, &DeviceRules::default());
        usual.unwrap().enforce().unwrap();
        let refused = run();
        assert!(
            refused.contains("/dev/loop-control: Operation not permitted"),
            "{refused}"
        );
        assert_eq!(refused.lines().count(), 1, "{refused}");
        let mode = fs::metadata(place.payload()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    fn bound(node: &str) -> crate::container::Mount {
        crate::container::Mount::new(node, "/srv/node")
    }

    fn directory() -> Root {
        Root::Directory("/".into())
    }
}
