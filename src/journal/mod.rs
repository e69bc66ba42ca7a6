//! The journal of a booted container, read from its files: `follow` finds them and returns their entries as journald writes them, `format`
//! makes lines of them. Runs in the supervisor process. The files are the container's own, so nothing in them is trusted; see `file`.

mod compression;
mod entry;
mod file;
mod follow;
mod format;

pub use entry::{Entry, UnitChange};
pub use follow::Follower;
pub use format::line;

#[cfg(test)]
mod testing;
