//! A HashiCorp Nomad task driver that runs tasks in systemd-nspawn containers.
//!
//! A request enters at the front and walks through the rooms in this order; no room uses one to its left:
//!
//! | room | receives | hands on |
//! |---|---|---|
//! | [`go_plugin`] | environment and a unix socket | a served gRPC connection |
//! | [`driver`] | a wire request | configuration bytes and what Nomad granted |
//! | [`config`] | bytes and grants | a checked [`container::ContainerSpec`] |
//! | [`task`] | a spec | one call on the backend; the life of this task |
//! | [`backend`] | a spec | an order: argv, environment, files |
//! | [`supervisor`] | an order | a running process, a lifeline to it, an exit record |
//! | [`nspawn`], [`cgroup`] | words | argv, parsed tool output, readings |
//!
//! Beside them stand [`host`], a small Nomad-like host that starts a plugin the way Nomad does, and [`cli`], the lives a
//! person starts. Nothing uses those two. `docs/architecture.md` tells the walk of one task with the files it leaves on disk.

pub mod proto;

pub mod blocking;
pub mod container;
pub mod procfs;
pub mod rootfs_path;
pub mod signal;

pub mod go_plugin;

pub mod driver;

pub mod config;

pub mod task;

pub mod backend;

pub mod supervisor;

pub mod cgroup;
pub mod nspawn;

pub mod host;

pub mod cli;
