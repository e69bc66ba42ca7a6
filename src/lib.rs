//! A HashiCorp Nomad task driver that runs tasks in systemd-nspawn containers.
//!
//! A request passes through the modules in this order; no module uses one that comes before it:
//!
//! | module | input | output |
//! |---|---|---|
//! | [`go_plugin`] | environment and a unix socket | a served gRPC connection |
//! | [`driver`] | a protobuf request | configuration bytes and what Nomad allocated |
//! | [`config`] | those bytes and what Nomad allocated | a checked [`container::ContainerSpec`] |
//! | [`task`] | a spec | one call on the backend; owns the state of the task |
//! | [`backend`] | a spec | a launch spec: argv, environment, files |
//! | [`supervisor`] | a launch spec | a running process, its control socket, an exit record |
//! | [`cleanup`] | the records of a start | nothing of it left: processes killed, leases released |
//! | [`state`] | records | files of the task directory, locks on it |
//! | [`lease`] | one resource of a start | it released |
//! | [`seccomp`] | a container, or the kind of one | the filters of systemd-nspawn, read or kept |
//! | [`nspawn`], [`cgroup`] | plain values | argv, parsed tool output, readings |
//!
//! The commands for people are in the crate `dev-agent`, with a small Nomad-like host that starts a plugin the way Nomad does; only
//! `main` and the tests use it. `docs/architecture.md` follows one task through the modules and lists the files it leaves on disk.

// The lowest modules are crates, which the development agent uses too.
pub use job_values::signal;
pub use nomad_proto as proto;

pub mod blocking;
pub mod container;
pub mod failpoint;
pub mod rootfs_path;
pub mod sys;

pub mod go_plugin;

pub mod driver;

pub mod config;

pub mod task;

pub mod backend;

pub mod supervisor;

pub mod exec;

pub mod cleanup;

pub mod state;

pub mod lease;

pub mod cgroup;
pub mod journal;
pub mod mounts;
pub mod network;
pub mod nspawn;
pub mod seccomp;
