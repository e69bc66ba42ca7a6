//! The hermetic tests: a list of modules, nothing more.

mod house;
