//! systemd-nspawn: turns a container into its command line, knows which version has which option, and reads what the tool says of
//! itself. Uses no other room; starts no container.

pub mod argv;
pub mod env_filter;
pub mod idmap;
pub mod ownership;
pub mod ports;
pub mod probe;
pub mod refusal;
pub mod skeleton;
pub mod version;
