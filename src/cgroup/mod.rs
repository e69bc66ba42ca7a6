//! Cgroups of tasks: choosing the path, creating, limits, killing all processes, reading usage, removing. Processes are tracked in
//! cgroup v2 where it is mounted (unified or hybrid), otherwise in the named cgroup v1 hierarchy; limits are in the hierarchy of
//! their controller. Does not touch cgroups that the driver did not create, except those that Nomad has made for the task.

mod device_policy;
mod devices;
pub mod freezer;
mod group;
mod layout;
mod limits;
mod membership;
mod moves;
mod oom;
mod plan;
mod processes;
mod usage;

pub use device_policy::has_device_policy;
pub use devices::DeviceRules;
pub use group::Group;
pub use layout::{CgroupPath, Layout, Place};
pub use limits::{Limit, Setting, Unenforced};
pub use moves::prepare_moves;
pub use oom::OomCounter;
pub use plan::{CgroupPlan, unenforced_note};
pub use processes::MAX_PROCESSES;
pub use usage::UsageFiles;

/// The driver's own subtree, used where Nomad provides no cgroup.
const SUBTREE: &str = "nomad-driver-nspawn";
