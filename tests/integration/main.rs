//! The hermetic tests: a list of modules, nothing more.

#![expect(
    clippy::disallowed_methods,
    reason = "the tests start the programs under test"
)]

mod agents;
mod cli;
mod configure;
mod contract;
mod docs;
mod events;
mod examples;
mod fake;
mod faults;
mod fingerprint;
mod handshake;
mod harness;
mod hostile;
mod house;
mod lifecycle;
mod logs;
mod ports;
mod reconcile;
mod recover;
mod relay;
mod rerun;
mod responsive;
mod run_command;
mod run_exits;
mod run_files;
mod run_signals;
mod second_process;
mod secrets;
mod shutdown;
mod signals;
mod start_failures;
mod stats;
mod suite;
mod troubles;
