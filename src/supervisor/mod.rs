//! Supervisor of one container: a process per container (this binary as `supervise DIR`) that is the parent of systemd-nspawn and
//! outlives the plugin and the agent. One file or directory for each process:
//!
//! | module | runs in |
//! |---|---|
//! | [`client`], [`exec_defaults`] | the plugin |
//! | [`supervise`] | the supervisor process |
//! | [`enter`], `credentials`, `joined_network` | the exec shim, which becomes systemd-nspawn |
//!
//! [`protocol`] is what client and supervisor process exchange, [`framing`] how a message is delimited; [`init_channel`] is what the
//! supervisor process and the container's init exchange; [`logs`] opens the output of a container, in both.

pub mod client;
mod connection;
mod credentials;
pub mod enter;
pub mod exec_defaults;
pub mod framing;
pub mod init_channel;
mod joined_network;
pub mod logs;
pub mod protocol;
pub mod supervise;

pub use client::{REQUEST_TIMEOUT, Status, SupervisorClient};
pub use protocol::{Action, StartFailure, StartStep};
