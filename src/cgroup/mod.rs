//! Cgroups of tasks: choosing the path, creating, killing all processes, reading usage, removing. Uses cgroup v2 where
//! it is mounted (unified or hybrid), otherwise the named cgroup v1 hierarchy. Knows nothing about containers, and does
//! not touch cgroups that the driver did not create.

pub mod freezer;
mod group;
mod layout;
mod usage;

pub use group::Group;
pub use layout::{CgroupPath, Layout};

/// The driver's own subtree, used where Nomad provides no cgroup.
const SUBTREE: &str = "nomad-driver-nspawn";
