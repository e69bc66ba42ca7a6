//! What the kernel knows: processes by pidfd, `/proc`, mount tables, its version and boot id. Knows nothing of tasks.

pub mod kernel;
mod pidfd;
pub mod process;
pub mod procfs;
