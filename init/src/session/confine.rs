//! Gives a process of a session the limits and privileges of the container, and no others. Increases nothing but limits, in the one step
//! that runs before the container is entered.

use std::fs;
use std::io;

use nspawn_init::session_spec::Confinement;
use nspawn_init::{StartError, Step};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use super::failed;
use crate::raw;

/// By number (`RLIMIT_…`), on all architectures that the driver supports.
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Before the container is entered: hard limits may be higher than those of the plugin, which only the host's root may do. The soft limits
/// follow when everything else is done.
pub(super) fn raise_limits(confinement: &Confinement) -> Result<(), StartError> {
    for &(number, _, hard) in &confinement.limits {
        set_limit(number, hard, hard)?;
    }
    let score = confinement.oom_score_adj.to_string();
    fs::write("/proc/self/oom_score_adj", score)
        .or_else(|error| match error.kind() {
            // Only a privileged process may lower it.
            io::ErrorKind::PermissionDenied => Ok(()),
            _ => Err(error),
        })
        .map_err(failed(Step::Confine, "oom_score_adj"))
}

/// Immediately before the command is executed.
pub(super) fn lower_limits(confinement: &Confinement) -> Result<(), StartError> {
    let mut limits = confinement.limits.iter();
    limits.try_for_each(|&(number, soft, hard)| set_limit(number, soft, hard))
}

fn set_limit(number: u32, soft: Option<u64>, hard: Option<u64>) -> Result<(), StartError> {
    let index = usize::try_from(number).unwrap_or(usize::MAX);
    let Some(resource) = RESOURCES.get(index).copied() else {
        return Ok(());
    };
    let limit = Rlimit {
        current: soft,
        maximum: hard,
    };
    setrlimit(resource, limit).map_err(failed(Step::Confine, "limits"))
}

/// Takes away every capability that the container does not have, and installs its seccomp programs. Without `no_new_privs` that needs
/// CAP_SYS_ADMIN, so the capabilities in force are the last ones to go.
pub(super) fn restrict(confinement: &Confinement) -> Result<(), StartError> {
    let failed_with = |error: Errno| failed(Step::Confine, "capabilities")(error);
    let bounding = CapabilitySet::from_bits_retain(confinement.bounding);
    for capability in all_capabilities() {
        if !bounding.contains(capability) && capability_is_in_bounding_set(capability) == Ok(true) {
            remove_capability_from_bounding_set(capability).map_err(failed_with)?;
        }
    }
    for filter in &confinement.filters {
        raw::install(filter).map_err(failed(Step::Filters, ""))?;
    }
    let own = capabilities(None).map_err(failed_with)?;
    let inheritable = CapabilitySet::from_bits_retain(confinement.inheritable);
    let sets = CapabilitySets {
        effective: own.effective & bounding,
        permitted: own.permitted & bounding,
        inheritable,
    };
    if sets != own {
        set_capabilities(None, sets).map_err(failed_with)?;
    }
    Ok(())
}

/// In the command's process, as its user.
pub(super) fn finish(confinement: &Confinement) -> Result<(), StartError> {
    let failed_with = |error: Errno| failed(Step::Confine, "privileges")(error);
    let ambient = CapabilitySet::from_bits_retain(confinement.ambient);
    if !ambient.is_empty() {
        let own = capabilities(None).map_err(failed_with)?;
        for capability in all_capabilities() {
            if (ambient & own.permitted & own.inheritable).contains(capability) {
                configure_capability_in_ambient_set(capability, true).map_err(failed_with)?;
            }
        }
    }
    if confinement.no_new_privileges {
        set_no_new_privs(true).map_err(failed_with)?;
    }
    lower_limits(confinement)
}

/// Every capability that this kernel can know.
fn all_capabilities() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number))
}
