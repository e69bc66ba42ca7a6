//! The fingerprint: health and attributes of the node, from a probe of the host and the plugin's configuration. Pure. The
//! description of a given state never varies, because every new description is an event that is sent to Nomad's servers.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::PluginConfig;
use crate::container::{CgroupLayout, Probe};
use crate::nspawn::version::{self, Feature};
use crate::proto::driver::FingerprintResponse;
use crate::proto::driver::fingerprint_response::HealthState;
use crate::proto::structs::{Attribute, attribute::Value};

/// One fingerprint, comparable with the previous one.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fingerprint {
    health: HealthState,
    description: String,
    attributes: BTreeMap<&'static str, Value>,
}

impl Fingerprint {
    pub(super) fn of(plugin_config: &PluginConfig, probe: &Probe) -> Self {
        if !plugin_config.enabled {
            return Self::undetected("disabled by the plugin configuration (enabled = false)");
        }
        if !probe.root {
            return Self::undetected("Driver must run as root");
        }
        let version = match &probe.nspawn {
            Ok(version) => *version,
            Err(reason) => return Self::undetected(reason),
        };
        let (health, description) = if let Some(reason) = version::unusable(version, probe.cgroup) {
            (HealthState::Unhealthy, reason)
        } else if let Err(reason) = probe.openat2.as_ref().and(probe.state_dir.as_ref()) {
            (HealthState::Unhealthy, reason.clone())
        } else if !Feature::HiddenValues.is_in(version) {
            let since = Feature::HiddenValues.since();
            let text = format!(
                "Healthy; systemd-nspawn {version} shows the environment of booted tasks in the process list, \
                 {since} and later do not"
            );
            (HealthState::Healthy, text)
        } else {
            (HealthState::Healthy, "Healthy".to_owned())
        };
        Self {
            health,
            description,
            attributes: attributes(plugin_config, probe, version),
        }
    }

    /// An undetected host, for a reason that an operator can act on.
    pub(super) fn undetected(reason: &str) -> Self {
        Self {
            health: HealthState::Undetected,
            description: reason.to_owned(),
            attributes: BTreeMap::new(),
        }
    }

    /// The protobuf message. Attributes in `published` that no longer exist are sent empty, which removes them from the node.
    pub(super) fn response(&self, published: &mut BTreeSet<&'static str>) -> FingerprintResponse {
        published.extend(self.attributes.keys());
        let empty = Value::StringVal(String::new());
        let value = |name| self.attributes.get(name).unwrap_or(&empty).clone();
        let attribute = |name| Attribute {
            value: Some(value(name)),
            unit: String::new(),
        };
        FingerprintResponse {
            attributes: published
                .iter()
                .map(|name| ((*name).to_owned(), attribute(*name)))
                .collect(),
            health: self.health.into(),
            health_description: self.description.clone(),
            err: String::new(),
        }
    }
}

fn attributes(
    plugin_config: &PluginConfig,
    probe: &Probe,
    version: u32,
) -> BTreeMap<&'static str, Value> {
    let cgroup = match probe.cgroup {
        CgroupLayout::V2 => "v2",
        CgroupLayout::Hybrid => "hybrid",
        CgroupLayout::V1 => "v1",
        CgroupLayout::None => "none",
    };
    // Those that a job can set a limit of.
    let limits = ["cpu", "cpuset", "devices", "memory", "pids"];
    let limits = limits
        .iter()
        .filter(|name| probe.controllers.contains(**name));
    let limits = limits.copied().collect::<Vec<_>>().join(",");
    BTreeMap::from([
        ("driver.nspawn", Value::BoolVal(true)),
        (
            "driver.nspawn.version",
            Value::StringVal(version.to_string()),
        ),
        (
            "driver.nspawn.volumes",
            Value::BoolVal(plugin_config.volumes),
        ),
        ("driver.nspawn.cgroup", Value::StringVal(cgroup.to_owned())),
        ("driver.nspawn.cgroup.controllers", Value::StringVal(limits)),
        (
            "driver.nspawn.user_namespaces",
            Value::BoolVal(probe.user_namespaces),
        ),
        ("driver.nspawn.machined", Value::BoolVal(probe.machined)),
        (
            "driver.nspawn.idmapped_mounts",
            Value::BoolVal(probe.idmapped_mounts),
        ),
        (
            "driver.nspawn.seccomp_cache",
            Value::BoolVal(probe.seccomp_cache.is_ok()),
        ),
        (
            "driver.nspawn.boot_environment_hidden",
            Value::BoolVal(Feature::HiddenValues.is_in(version)),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::{hex, plugin_config, probe};
    use prost::Message as _;
    use rstest::rstest;

    fn host(change: impl FnOnce(&mut PluginConfig, &mut Probe)) -> (PluginConfig, Probe) {
        let (mut plugin_config, mut probe) = (plugin_config(), probe());
        change(&mut plugin_config, &mut probe);
        (plugin_config, probe)
    }

    const TOO_OLD: &str = "systemd-nspawn 246 is too old: 247 or later is needed";
    const TOO_NEW: &str =
        "systemd-nspawn 258 needs a host with cgroup v2 only, mounted at /sys/fs/cgroup";
    const SHOWS: &str = "Healthy; systemd-nspawn 247 shows the environment of booted tasks in the process list, \
        250 and later do not";
    const OFF: &str = "disabled by the plugin configuration (enabled = false)";

    #[rstest]
    #[case::fine(host(|_, _| ()), HealthState::Healthy, "Healthy")]
    #[case::oldest(host(|_, p| p.nspawn = Ok(247)), HealthState::Healthy, SHOWS)]
    #[case::hides(host(|_, p| p.nspawn = Ok(250)), HealthState::Healthy, "Healthy")]
    #[case::unsafe_state(host(|_, p| p.state_dir = Err("not here".into())), HealthState::Unhealthy, "not here")]
    #[case::old_kernel(host(|_, p| p.openat2 = Err("no openat2".into())), HealthState::Unhealthy, "no openat2")]
    #[case::old(host(|_, p| p.nspawn = Ok(246)), HealthState::Unhealthy, TOO_OLD)]
    #[case::new_on_v1(host(|_, p| { p.nspawn = Ok(258); p.cgroup = CgroupLayout::V1 }), HealthState::Unhealthy, TOO_NEW)]
    #[case::new_on_hybrid(host(|_, p| { p.nspawn = Ok(258); p.cgroup = CgroupLayout::Hybrid }), HealthState::Unhealthy, TOO_NEW)]
    #[case::new_on_v2(host(|_, p| p.nspawn = Ok(262)), HealthState::Healthy, "Healthy")]
    #[case::v1(host(|_, p| p.cgroup = CgroupLayout::V1), HealthState::Healthy, "Healthy")]
    #[case::missing(host(|_, p| p.nspawn = Err("not on PATH".into())), HealthState::Undetected, "not on PATH")]
    #[case::user(host(|_, p| p.root = false), HealthState::Undetected, "Driver must run as root")]
    #[case::off(host(|c, p| { c.enabled = false; p.root = false }), HealthState::Undetected, OFF)]
    fn every_host_has_its_health(
        #[case] (plugin_config, probe): (PluginConfig, Probe),
        #[case] health: HealthState,
        #[case] description: &str,
    ) {
        let print = Fingerprint::of(&plugin_config, &probe);
        assert_eq!(
            (print.health, print.description.as_str()),
            (health, description)
        );
        assert_eq!(
            print.attributes.is_empty(),
            health == HealthState::Undetected
        );
    }

    #[test]
    fn a_node_is_healthy_exactly_where_a_start_is_not_refused() {
        let layouts = [
            CgroupLayout::V2,
            CgroupLayout::Hybrid,
            CgroupLayout::V1,
            CgroupLayout::None,
        ];
        for version in 246..=262 {
            for cgroup in layouts {
                let (plugin_config, probe) = host(|_, probe| {
                    (probe.nspawn, probe.cgroup) = (Ok(version), cgroup);
                });
                let print = Fingerprint::of(&plugin_config, &probe);
                let refused = version::unusable(version, cgroup);
                let healthy = print.health == HealthState::Healthy;
                assert_eq!(healthy, refused.is_none(), "{version} {cgroup:?}");
                if let Some(reason) = refused {
                    assert_eq!(print.description, reason);
                }
            }
        }
    }

    #[rstest]
    #[case(247, false)]
    #[case(249, false)]
    #[case(250, true)]
    #[case(252, true)]
    fn an_attribute_shows_whether_boot_hides_the_environment(
        #[case] version: u32,
        #[case] hidden: bool,
    ) {
        let (plugin_config, probe) = host(|_, probe| probe.nspawn = Ok(version));
        let print = Fingerprint::of(&plugin_config, &probe);
        assert_eq!(
            print.attributes["driver.nspawn.boot_environment_hidden"],
            Value::BoolVal(hidden)
        );
    }

    #[test]
    fn an_attribute_that_disappears_is_sent_as_empty() {
        let mut published = BTreeSet::new();
        let first = Fingerprint::of(&plugin_config(), &probe()).response(&mut published);
        assert_eq!(
            first.attributes["driver.nspawn"].value,
            Some(Value::BoolVal(true))
        );
        assert_eq!(
            first.attributes["driver.nspawn.version"].value,
            Some(Value::StringVal("252".to_owned()))
        );
        let gone = Fingerprint::undetected("gone").response(&mut published);
        assert_eq!(gone.attributes.len(), first.attributes.len());
        let empty = Some(Value::StringVal(String::new()));
        assert!(
            gone.attributes
                .values()
                .all(|attribute| attribute.value == empty)
        );
        let never = Fingerprint::undetected("gone").response(&mut BTreeSet::new());
        assert!(never.attributes.is_empty());
    }

    #[test]
    fn the_message_has_the_golden_bytes() {
        let print = Fingerprint {
            health: HealthState::Healthy,
            description: "Healthy".to_owned(),
            attributes: BTreeMap::from([(
                "driver.nspawn.version",
                Value::StringVal("252".to_owned()),
            )]),
        };
        let golden = "0a1e0a156472697665722e6e737061776e2e76657273696f6e12051a0332353210021a074865616c746879";
        assert_eq!(
            hex(&print.response(&mut BTreeSet::new()).encode_to_vec()),
            golden
        );
    }
}
