//! A container spec and a started container for tests. Not `cfg(test)`: the integration tests and the end-to-end tests link the library as the plugin does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use super::{
    Console, ContainerSpec, Description, Dns, Identity, Mode, Network, NetworkNamespace, Payload,
    Process, Readiness, Resources, Root, Rootfs, Started, Users, Volatile,
};

impl ContainerSpec {
    /// A plain container with the task name `task` that runs `/bin/true` in this directory: without a user namespace, a network or
    /// a cgroup of its own, without mounts, and with its output discarded. Tests change what they are about by [`Self::with`].
    pub fn for_test(task: &str, root: impl Into<PathBuf>) -> Self {
        Self {
            identity: Identity {
                id: format!("0f1e/{task}/0000abcd"),
                alloc_dir: "/alloc/0f1e".into(),
                machine: format!("{task}-0f1e"),
            },
            description: Description::default(),
            rootfs: Rootfs {
                source: Root::Directory(root.into()),
                ephemeral: false,
                read_only: false,
                volatile: Volatile::No,
                pivot_root: None,
            },
            payload: Payload {
                mode: Mode::Plain,
                command: vec!["/bin/true".to_owned()],
                environment: BTreeMap::new(),
                credentials: Vec::new(),
                working_directory: None,
                user: None,
                capabilities: Vec::new(),
                console: Console::Pipe,
                journal: None,
                readiness: Readiness::Started,
                stdout: None,
                stderr: None,
            },
            users: Users::Host,
            mounts: Vec::new(),
            tmpfs: Vec::new(),
            network: Network {
                namespace: NetworkNamespace::Host,
                resolv_conf: None,
                dns: Dns::default(),
                host_name: None,
                extra_hosts: Vec::new(),
            },
            resources: Resources::default(),
        }
    }

    /// The same spec with a change.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Started {
    /// A plain container that has been started under this id, in this boot, without cgroups. Its processes do not exist.
    pub fn for_test(id: &str, boot: &str) -> Self {
        let nobody = Process { pid: 0, start: 0 };
        Self {
            id: id.to_owned(),
            machine: "t-a".to_owned(),
            state: "/none".into(),
            boot: boot.to_owned(),
            supervisor: nobody,
            leader: nobody,
            mode: Mode::Plain,
            cgroup: None,
            controllers: BTreeMap::new(),
            filters: None,
            network: None,
            started_at: SystemTime::UNIX_EPOCH,
            notes: Vec::new(),
        }
    }
}
