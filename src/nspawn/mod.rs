//! Knowledge about systemd-nspawn: the command line of a container, which version has which option, and the meaning of
//! what it prints. Starts no container; depends only on the model in `container` and on `rootfs_path`.

pub mod argv;
pub mod env_filter;
pub mod idmap;
pub mod image_init;
pub mod machine_id;
pub mod ownership;
pub mod probe;
pub mod refusal;
pub mod resolver;
pub mod skeleton;
pub mod version;
