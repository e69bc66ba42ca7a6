//! What the kernel knows: processes by pidfd, their seccomp filters, `/proc`, mount tables, trees of mounts and their id mappings, its version and
//! boot id, network namespaces, BPF programs for cgroups; files that are replaced as a whole; and the C library's malloc settings. Knows nothing of tasks.

pub mod bpf;
mod ffi;
mod files;
mod id_map;
pub mod kernel;
pub mod mount_namespace;
pub mod mount_tree;
pub mod netns;
pub mod process;
#[cfg(test)]
pub(crate) mod testing;
pub mod trace;

pub use proc_files as procfs;

pub use ffi::{return_free_memory, share_malloc_arena};
pub use files::{open_regular_file, replace_file};
pub use id_map::{Extent, IdMap};
