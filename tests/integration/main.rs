//! The hermetic tests: a list of modules, nothing more.

mod fake;
mod house;
