//! The engine room: how systemd says it. Turns a container into the words of systemd-nspawn's command line, knows which version
//! has which word, and reads what the tool says of itself. Uses no other room; starts no container.

pub mod argv;
pub mod hidden;
pub mod idmap;
pub mod ownership;
pub mod ports;
pub mod probe;
pub mod refusal;
pub mod root;
pub mod version;
