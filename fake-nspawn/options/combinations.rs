//! Which options exclude or require each other.

use super::{Mode, Options, Refusal, Users, Volatile};
use crate::values;

impl Options {
    /// Rejects invalid combinations, in the order of the real tool.
    pub(super) fn verify(&mut self) -> Result<(), Refusal> {
        let refuse = |message: &str| Err(Refusal::invalid(message));
        if self.mode == Mode::Boot && self.kill_signal.is_none() {
            self.kill_signal = Some(crate::process::RTMIN + 3);
        }
        if self.ephemeral && self.template.is_some() && self.directory.is_none() {
            self.directory = self.template.take();
        }
        self.read_only |= self.volatile != Volatile::No;
        self.read_only |= self.mounts.iter().any(|mount| mount.destination() == "/");
        // Up to 257 the host's udev is checked first, and only then the options that `--image` excludes.
        if self.users == Users::Managed && !self.private_network {
            return refuse(
                "Managed user namespace operation requires private networking, as otherwise /sys/ may not be mounted.",
            );
        }
        if self.directory.is_some() && self.image.is_some() {
            return refuse("--directory= and --image= may not be combined.");
        }
        if self.template.is_some() && self.image.is_some() {
            return refuse("--template= and --image= may not be combined.");
        }
        if self.ephemeral && self.template.is_some() {
            return refuse("--ephemeral and --template= may not be combined.");
        }
        let journal = self.link_journal.as_deref().unwrap_or("auto");
        let tries = journal.starts_with("try-") && self.version > 247;
        if self.ephemeral && !["no", "auto"].contains(&journal) && !tries {
            return refuse("--ephemeral and --link-journal={host,guest} may not be combined.");
        }
        let chown = self.ownership.as_deref() == Some("chown")
            || (self.version < 249 && self.users == Users::Pick && self.ownership.is_some());
        if chown && self.read_only {
            return refuse(if self.version < 249 {
                "--read-only and --private-users-chown may not be combined."
            } else {
                "--read-only and --private-users-ownership=chown may not be combined."
            });
        }
        if self.network_namespace.is_some() && self.network_options {
            return refuse(
                "--network-namespace-path= cannot be combined with other network options.",
            );
        }
        if self.bridge.is_some() && self.zone.is_some() {
            return refuse("--network-bridge= and --network-zone= may not be combined.");
        }
        if !self.ports.is_empty() && !self.private_network {
            return refuse("Cannot use --port= without private networking.");
        }
        self.verify_ambient()?;
        if self.bind_users && self.users == Users::No {
            return refuse("--bind-user= requires --private-users");
        }
        Ok(())
    }

    fn verify_ambient(&self) -> Result<(), Refusal> {
        let refuse = |message: &str| Err(Refusal::invalid(message));
        let network = if self.private_network {
            values::NET_ADMIN
        } else {
            0
        };
        let retained = (self.retained | network) & !self.dropped;
        if self.ambient == 0 {
            return Ok(());
        }
        if self.ambient == u64::MAX {
            return refuse("AmbientCapability= does not support the value all.");
        }
        if self.ambient & retained != self.ambient {
            return refuse(
                "AmbientCapability= setting is not fully covered by Capability= setting.",
            );
        }
        if self.mode == Mode::Boot {
            return refuse("AmbientCapability= setting is not useful for boot mode.");
        }
        Ok(())
    }
}
