//! The hermetic tests: a list of modules, nothing more.

#![expect(
    clippy::disallowed_methods,
    reason = "the tests start the programs they are about"
)]

mod cli;
mod fake;
mod harness;
mod house;
