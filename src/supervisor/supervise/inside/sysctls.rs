//! Kernel settings of the container's namespaces. The files below `/proc/sys` act on the namespaces of the thread that writes them,
//! so a thread joins those of the container and ends when they are written. Nothing is ever written in a namespace of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::thread;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;

use super::{own_namespace, refused};
use crate::container::Cause;
use crate::nspawn::refusal::cause_of_host_error;
use crate::supervisor::protocol::StartFailure;
use crate::sys::process::ProcessHandle;

/// The namespaces that have settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Namespace {
    Ipc,
    Net,
    Uts,
}

impl Namespace {
    /// The namespace of a setting, whose name has `/` between its parts. Other settings are those of the whole host.
    fn of(name: &str) -> Option<Self> {
        const IPC: [&str; 4] = ["kernel/msg", "kernel/sem", "kernel/shm", "fs/mqueue/"];
        const UTS: [&str; 2] = ["kernel/domainname", "kernel/hostname"];
        if name.starts_with("net/") {
            Some(Self::Net)
        } else if IPC.iter().any(|prefix| name.starts_with(prefix)) {
            Some(Self::Ipc)
        } else {
            UTS.contains(&name).then_some(Self::Uts)
        }
    }

    /// The name of its file in `/proc/<pid>/ns`.
    fn file(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Net => "net",
            Self::Uts => "uts",
        }
    }

    fn kind(self) -> CloneFlags {
        match self {
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
        }
    }
}

/// A setting with all that is needed to write it.
struct Setting<'a> {
    name: &'a str,
    value: &'a str,
    file: PathBuf,
    namespace: Namespace,
}

impl<'a> Setting<'a> {
    /// Refuses a setting that has no namespace.
    fn new(name: &'a str, value: &'a str) -> Result<Self, StartFailure> {
        let below = with_slashes(name);
        let is_name = |part: &str| !matches!(part, "" | "." | "..");
        let namespace = Namespace::of(&below).filter(|_| below.split('/').all(is_name));
        let Some(namespace) = namespace else {
            let reason = "it is not a setting of the container's ipc, network or uts namespace";
            return Err(failed(name, value, Cause::Config, reason));
        };
        Ok(Self {
            name,
            value,
            file: PathBuf::from("/proc/sys").join(below),
            namespace,
        })
    }

    fn failed(&self, error: &io::Error) -> StartFailure {
        let kind = self.namespace.file();
        let (cause, reason) = match error.kind() {
            io::ErrorKind::NotFound => (
                Cause::Config,
                format!("the kernel has no such setting in the {kind} namespace of the container"),
            ),
            io::ErrorKind::PermissionDenied => (
                Cause::Config,
                format!(
                    "the kernel does not let it be changed in the {kind} namespace of the container"
                ),
            ),
            io::ErrorKind::InvalidInput => (Cause::Config, error.to_string()),
            _ if error.raw_os_error() == Some(nix::libc::ERANGE) => {
                (Cause::Config, error.to_string())
            }
            _ => (cause_of_host_error(error), error.to_string()),
        };
        failed(self.name, self.value, cause, &reason)
    }

    /// Writes it, in the namespaces of this thread.
    fn write(&self) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&self.file)?;
        // In one call: the kernel takes each write as a whole value.
        let written = file.write(self.value.as_bytes())?;
        match written == self.value.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The same with the effective user of the container's root. With a user namespace, the settings of an ipc namespace belong to
    /// that user, and the kernel gives the host's root no rights on them. Only this thread changes its user, and real and saved
    /// user stay root's, so no process of that user can signal the supervisor.
    fn write_as(&self, root: Uid) -> io::Result<()> {
        set_thread_res_uid(None, root, None)?;
        let written = self.write();
        set_thread_res_uid(None, Uid::ROOT, None)?;
        written
    }
}

/// The name as a path: as in sysctl(8), the first separator decides whether `.` separates and `/` stands for a dot, or `/` separates.
fn with_slashes(name: &str) -> String {
    match name.find(['.', '/']).map(|at| name.as_bytes()[at]) {
        Some(b'.') => {
            let swapped = name.chars().map(|char| match char {
                '.' => '/',
                '/' => '.',
                other => other,
            });
            swapped.collect()
        }
        _ => name.to_owned(),
    }
}

fn failed(name: &str, value: &str, cause: Cause, reason: &str) -> StartFailure {
    refused(cause, format!("sysctl {name} = {value:?}: {reason}"))
}

/// Writes the settings in the namespaces of the container.
pub(super) fn apply(
    sysctls: &BTreeMap<String, String>,
    leader: &ProcessHandle,
) -> Result<(), StartFailure> {
    let settings = sysctls
        .iter()
        .map(|(name, value)| Setting::new(name, value));
    let settings = settings.collect::<Result<Vec<_>, _>>()?;
    let Some(first) = settings.first() else {
        return Ok(());
    };
    let namespaces = namespaces(&settings, leader)?;
    let root = root_of(leader).map_err(|error| first.failed(&error))?;
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().spawn_scoped(scope, || write_all(&settings, &namespaces, root));
        let thread = thread.map_err(|error| first.failed(&error))?;
        thread.join().unwrap_or_else(|_| {
            Err(first.failed(&io::Error::other("the thread that writes it has panicked")))
        })
    })
}

/// The namespaces of these settings. Fails if the container does not have one of them for itself.
fn namespaces(
    settings: &[Setting<'_>],
    leader: &ProcessHandle,
) -> Result<Vec<(Namespace, File)>, StartFailure> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for setting in settings {
        let namespace = setting.namespace;
        if !seen.insert(namespace) {
            continue;
        }
        let own = own_namespace(leader, namespace.file());
        let Some(own) = own.map_err(|error| setting.failed(&error))? else {
            let kind = namespace.file();
            let reason = format!(
                "the container shares the {kind} namespace of the host, so this would change the host"
            );
            return Err(failed(setting.name, setting.value, Cause::Config, &reason));
        };
        found.push((namespace, own));
    }
    Ok(found)
}

/// Joins the namespaces and writes the settings. Runs in a thread of its own.
fn write_all(
    settings: &[Setting<'_>],
    namespaces: &[(Namespace, File)],
    root: Uid,
) -> Result<(), StartFailure> {
    for (namespace, file) in namespaces {
        if let Err(error) = setns(file, namespace.kind()) {
            let setting = settings
                .iter()
                .find(|setting| setting.namespace == *namespace);
            let error = io::Error::other(format!(
                "its {} namespace can't be joined: {error}",
                namespace.file()
            ));
            return setting.map_or(Ok(()), |setting| Err(setting.failed(&error)));
        }
    }
    for setting in settings {
        let written = match setting.write() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && root != Uid::ROOT => {
                setting.write_as(root)
            }
            other => other,
        };
        written.map_err(|error| setting.failed(&error))?;
    }
    Ok(())
}

/// The host's id of the container's root.
fn root_of(leader: &ProcessHandle) -> io::Result<Uid> {
    let map = fs::read_to_string(format!("/proc/{}/uid_map", leader.process().pid))?;
    super::devices::IdMap::parse(&map)
        .root()
        .map(Uid::from_raw)
        .ok_or_else(|| io::Error::other("its root user has no id on the host"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::this_process;
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("net.ipv4.ip_forward", "net/ipv4/ip_forward")]
    #[case(
        "net.ipv4.conf.eth0/100.forwarding",
        "net/ipv4/conf/eth0.100/forwarding"
    )]
    #[case(
        "net/ipv4/conf/eth0.100/forwarding",
        "net/ipv4/conf/eth0.100/forwarding"
    )]
    #[case("kernel", "kernel")]
    fn a_name_becomes_a_path_as_in_sysctl(#[case] name: &str, #[case] path: &str) {
        assert_eq!(with_slashes(name), path);
    }

    #[rstest]
    #[case("kernel.msgmax", Namespace::Ipc)]
    #[case("kernel.shm_rmid_forced", Namespace::Ipc)]
    #[case("fs.mqueue.msg_max", Namespace::Ipc)]
    #[case("net.core.somaxconn", Namespace::Net)]
    #[case("kernel.domainname", Namespace::Uts)]
    fn a_setting_has_a_namespace(#[case] name: &str, #[case] namespace: Namespace) {
        assert_eq!(Setting::new(name, "1").unwrap().namespace, namespace);
    }

    #[rstest]
    #[case("kernel.panic")]
    #[case("kernel.core_pattern")]
    #[case("vm.overcommit_memory")]
    #[case("fs.file-max")]
    #[case("net/../kernel/panic")]
    #[case("net./././kernel.panic")]
    #[case("net..x")]
    #[case("/net/x")]
    #[case("net")]
    #[case("")]
    fn a_setting_of_the_host_is_refused(#[case] name: &str) {
        let sysctls = BTreeMap::from([(name.to_owned(), "1".to_owned())]);
        let failure = apply(&sysctls, &this_process()).unwrap_err();
        assert_eq!(failure.cause(), Cause::Config);
        let want = format!("sysctl {name} = \"1\": it is not a setting of");
        assert!(failure.reason.starts_with(&want), "{failure:?}");
    }

    /// The value that is refused is the one that the host has, so that a failure of this test changes nothing.
    #[rstest]
    #[case("kernel.shmmni")]
    #[case("net.ipv4.ip_forward")]
    #[case("kernel.domainname")]
    fn a_shared_namespace_is_refused(#[case] name: &str) {
        let file = PathBuf::from("/proc/sys").join(with_slashes(name));
        let value = fs::read_to_string(file).unwrap_or_default();
        let sysctls = BTreeMap::from([(name.to_owned(), value.trim().to_owned())]);
        let failure = apply(&sysctls, &this_process()).unwrap_err();
        assert_eq!(failure.cause(), Cause::Config);
        assert!(
            failure.reason.contains("namespace of the host"),
            "{failure:?}"
        );
    }
}
