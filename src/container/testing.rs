//! A container spec for tests. Not `cfg(test)`: the integration tests and the end-to-end tests link the library as the plugin does.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{
    Console, ContainerSpec, Description, Identity, Mode, Network, NetworkNamespace, Payload,
    Resources, Root, Rootfs, Users, Volatile,
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
                working_directory: None,
                user: None,
                capabilities: Vec::new(),
                console: Console::Pipe,
                stdout: None,
                stderr: None,
            },
            users: Users::Host,
            mounts: Vec::new(),
            network: Network {
                namespace: NetworkNamespace::Host,
                resolv_conf: None,
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
