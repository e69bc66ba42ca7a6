//! The hermetic tests: a list of modules, nothing more.

mod cli;
mod fake;
mod harness;
mod house;
