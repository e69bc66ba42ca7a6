//! The state directory: one task directory per start with its records, the locks on them, and which agent they belong to. Used by
//! the plugin, the supervisor process and the exec shim.

mod launch_spec_record;
pub mod lock;
pub mod owner;
pub mod state_dir;
pub mod task_dir;

pub use lock::TaskLock;
pub use task_dir::{LaunchSpec, Pid1, TaskDir};
