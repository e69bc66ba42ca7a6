//! A small stand-alone plugin host: it starts a plugin as Nomad's agent does, encodes configuration by the plugin's own
//! schema, creates an allocation directory, and drives one task from start to exit. The `run` command in [`cli`] and the
//! integration tests use it. It does not depend on the driver. It schedules nothing, stores nothing between two runs, and knows nothing of containers: it only sees what
//! the plugin reports.
//!
//! ```text
//! Plugin::launch ─ set_config ─ healthy ─┐
//! Allocation::create ─ open_logs ────────┼─ StartTask ─ WaitTask ─ DestroyTask ─ Plugin::shutdown ─ Allocation::remove
//! configure::encode(task schema) ────────┘
//! ```

pub mod allocation;
pub mod calls;
pub mod cli;
pub mod configure;
pub mod error;
pub mod exec;
pub mod handshake;
pub mod log;
mod node;
pub mod plugin;
pub mod run;
pub mod variables;

pub use allocation::{Allocation, Logs, TaskSpec};
pub use calls::{TaskEvents, TaskExit};
pub use error::HostError;
pub use exec::{ExecOutput, ExecSession};
pub use log::LogLine;
pub use plugin::{Launch, Plugin, Stopped};
pub use run::{Run, RunEvent, run_task};
pub use variables::Variables;
