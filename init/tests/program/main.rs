//! Tests of the real init as an ordinary process, without a container and without root. As a subreaper it gets its orphans, as PID 1 would.

#![expect(clippy::disallowed_methods, reason = "the tests start the program")]

mod confinement;
mod ending;
mod harness;
mod hostile;
mod session;
mod signals;
mod surroundings;
