//! The hermetic tests: a list of modules, nothing more.

mod cli;
mod harness;
mod house;
