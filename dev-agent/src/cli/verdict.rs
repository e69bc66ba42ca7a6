//! What `run` does with the entries of a job file that it does not use.

/// What happens to an entry that is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has no meaning for a single run.
    Quiet,
    /// The task runs without it, and the user is informed.
    Ignored,
    /// The task would behave differently without it.
    Refused(&'static str),
}

use Verdict::{Ignored, Quiet, Refused};

/// Entries of a job.
pub(super) const JOB: &[(&str, Verdict)] = &[
    ("affinity", Ignored),
    ("all_at_once", Quiet),
    ("constraint", Ignored),
    ("migrate", Ignored),
    ("multiregion", Ignored),
    ("node_pool", Quiet),
    ("parameterized", Ignored),
    ("periodic", Ignored),
    ("priority", Quiet),
    ("reschedule", Ignored),
    ("spread", Ignored),
    ("type", Quiet),
    ("ui", Quiet),
    ("update", Ignored),
];

/// Entries of a group.
pub(super) const GROUP: &[(&str, Verdict)] = &[
    ("affinity", Ignored),
    ("constraint", Ignored),
    ("consul", Refused("Consul is not available")),
    ("disconnect", Ignored),
    ("ephemeral_disk", Ignored),
    ("max_client_disconnect", Ignored),
    ("migrate", Ignored),
    ("prevent_reschedule_on_lost", Ignored),
    ("reschedule", Ignored),
    ("restart", Ignored),
    ("scaling", Ignored),
    ("service", Ignored),
    ("shutdown_delay", Ignored),
    ("spread", Ignored),
    ("stop_after_client_disconnect", Ignored),
    ("update", Ignored),
    ("vault", Refused("Vault is not available")),
    ("volume", Refused("volumes are not supported; use bind")),
];

/// Entries of a task.
pub(super) const TASK: &[(&str, Verdict)] = &[
    ("action", Ignored),
    ("affinity", Ignored),
    ("artifact", Refused("artifacts are not downloaded")),
    ("constraint", Ignored),
    ("consul", Refused("Consul is not available")),
    ("csi_plugin", Refused("CSI plugins are not supported")),
    ("dispatch_payload", Refused("there is no dispatch payload")),
    ("identity", Refused("there is no server that signs tokens")),
    ("kind", Ignored),
    ("leader", Quiet),
    ("lifecycle", Ignored),
    ("logs", Ignored),
    ("restart", Ignored),
    ("scaling", Ignored),
    ("schedule", Ignored),
    ("secret", Refused("there is no secret store")),
    ("service", Ignored),
    ("shutdown_delay", Ignored),
    ("template", Refused("templates are not rendered")),
    ("vault", Refused("Vault is not available")),
    (
        "volume_mount",
        Refused("volumes are not supported; use bind"),
    ),
];

/// Entries of the resources of a task.
pub(super) const RESOURCES: &[(&str, Verdict)] = &[
    ("device", Refused("device plugins are not supported")),
    ("disk", Quiet),
    ("iops", Quiet),
    ("network", Refused("no ports are allocated")),
    ("numa", Ignored),
    ("secrets", Quiet),
];

/// Entries that a server adds to a job.
pub(super) const SET_BY_SERVER: &[&str] = &[
    "create_index",
    "modify_index",
    "job_modify_index",
    "submit_time",
    "version",
    "status",
    "stable",
];
