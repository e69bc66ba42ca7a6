//! The hermetic tests: a list of modules, nothing more.

mod cli;
mod contract;
mod fake;
mod harness;
mod house;
