//! What the driver guarantees over the plugin's socket, as scenarios that are generic over [`World`]: the integration tests run them with the
//! fake, the end-to-end tests with the real systemd-nspawn. A scenario that needs what only one of them has asks [`World::has`], which
//! reports the reason. What the socket adds nothing to is in the contract of the backend, `tests/contract/`.

use std::time::Duration;

use dev_agent::{Plugin, TaskExit};
use rstest::rstest;
use support::wire::{Need, Running, World, refusal};
use support::{DEADLINE, eventually, within};

// Defined beside this module by the crate that runs the suite.
use super::world;

mod ends;
mod environment;
mod exec;
mod exec_command;
mod failed_starts;
mod inspect;
mod killed;
mod later_driver;
mod oom;
mod processes;
mod recover;
mod release;
mod resources;
mod secrets;
mod statistics;

/// Prints `up` and runs until it is ended.
const ON_AND_ON: &str = "echo up; exec sleep 1000";
/// Prints `up` and ignores both signals that may be sent to stop it.
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";
