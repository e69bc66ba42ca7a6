//! Values as Nomad's job files write them, for the driver and for the development agent, which reads job files itself.

pub mod duration;
pub mod signal;
