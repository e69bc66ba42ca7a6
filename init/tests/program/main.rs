//! The real program as an ordinary process: no container, no root. Its subreaper stands for the first process's orphans.

#![expect(
    clippy::disallowed_methods,
    reason = "what the program does is seen by starting it"
)]

mod confinement;
mod ending;
mod harness;
mod hostile;
mod requests;
mod signals;
mod surroundings;
